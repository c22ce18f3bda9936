// What CUDA C++ spells differently from plain C++, and nothing else. The kernels include no other
// header, so that NVRTC compiles them as nvcc does; a C++ compiler finds the same names in
// tests/kernels/emulator.h, which runs the kernels' own source on a CPU.
#pragma once

struct alignas(16) Words {
    unsigned x, y, z, w;
};

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

DEVICE int thread() { return threadIdx.x; }
DEVICE long long block() { return blockIdx.x; }
DEVICE long long blocks() { return gridDim.x; }
DEVICE void barrier() { __syncthreads(); }
DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 16 bytes at an address that is a multiple of 16.
DEVICE Words load16(const void* from) { return *static_cast<const Words*>(from); }
DEVICE void store16(void* to, Words words) { *static_cast<Words*>(to) = words; }

// The 32 bytes around an address into the L2 cache, for whoever reads them later.
DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Where something lies in shared memory, to which bytes may be added.
using SharedAddress = unsigned;
DEVICE SharedAddress shared_address(const void* at) {
    unsigned long long address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(at));
    return static_cast<unsigned>(address);
}

// 16 bytes from global to shared memory without passing through registers or L1; zeros, and nothing
// read, where `inside` is false. A copy has landed once copies_wait says so, for its own thread.
DEVICE void copy16(SharedAddress to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `N` of this thread's groups of copies are under way.
template <int N>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// See kernels/overlap.py. Launched the ordinary way, neither does anything.
DEVICE void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// c [16, 8] += a [16, 16] · b [16, 8] of a warp, bfloat16 in and float32 out, fragments as the PTX
// manual lays them out ("mma.m16n8k16").
DEVICE void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two bfloat16 numbers times two others.
DEVICE unsigned multiply_bf16x2(unsigned a, unsigned b) {
    unsigned product;  // sm_80 has no product of its own: a·b + (−0)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
    return product;
}

// Two floats rounded to bfloat16, the first in the low half.
DEVICE unsigned pack_bf16x2(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }

#else
#include "emulator.h"
#endif

DEVICE float low_half(unsigned pair) { return float_of_bits(pair << 16); }
DEVICE float high_half(unsigned pair) { return float_of_bits(pair & 0xffff0000u); }
