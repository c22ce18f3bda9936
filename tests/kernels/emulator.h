// Runs CUDA C++ kernels on a CPU: their own source, every thread of a block, so that a machine
// without a GPU tests the arithmetic of their indices. The names are those of
// kernels/cuda/device.cuh; fragments are laid out as the PTX manual says.
//
// Threads are fibers that switch where they wait for one another. Shared memory starts as NaN. A
// copy lands as late as its wait allows, and threads keep pace from the first to the last; or it lands
// as it is made, and from the last warp to the first each runs ahead until it waits for the others: a
// kernel must be right either way.
// Counted as faults are: a read of 16 bytes or a copy outside the arrays handed over, or off its
// alignment; a block whose shared memory was written beyond its end; a copy its thread did not wait
// for.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define DEVICE inline
#define SHARED_MEMORY(name) unsigned char* name = emulator::shared.data()
#define __global__
#define __launch_bounds__(...)

namespace emulator {

struct Copy {
    unsigned char* to;
    const void* from;
    bool inside;
};

struct Meeting {  // a barrier of some threads
    int arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    bool done;
    const Meeting* waits;
    int generation;  // of what it waits for
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

struct Range {
    const unsigned char *begin, *end;
};

constexpr size_t GUARD = 4096;  // bytes behind shared memory, which nothing may touch
inline std::vector<unsigned char> shared;
inline std::vector<Range> arrays;
inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting all;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline int current, faults;
inline long long block_index, grid;
inline bool early;
inline float floats[32][32];  // of the lanes of each warp
inline unsigned operands[32][32][6];

inline void meet(Meeting& meeting, int size) {
    if (++meeting.arrived == size) {
        meeting.arrived = 0;
        ++meeting.generation;
        return;
    }
    Fiber& fiber = fibers[current];
    fiber.waits = &meeting;
    fiber.generation = meeting.generation;
    swapcontext(&fiber.context, &scheduler);
}
inline void meet_warp() { meet(warps[current / 32], 32); }

inline bool within(const void* at, size_t size) {
    const auto* p = static_cast<const unsigned char*>(at);
    bool found = p >= shared.data() && p + size <= shared.data() + shared.size() - GUARD;
    for (const Range& r : arrays) found = found || (p >= r.begin && p + size <= r.end);
    found = found && reinterpret_cast<uintptr_t>(at) % size == 0;
    if (!found) ++faults;
    return found;
}

inline void land(const Copy& copy) {
    std::memset(copy.to, 0, 16);
    if (copy.inside && within(copy.from, 16)) std::memcpy(copy.to, copy.from, 16);
}

inline void enter() {
    kernel();
    for (const auto& group : fibers[current].groups) faults += !group.empty();
    faults += !fibers[current].open.empty();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

// Run a thread until it waits or is done; whether it could.
inline bool run(int thread) {
    Fiber& fiber = fibers[thread];
    if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation)) return false;
    fiber.waits = nullptr;
    current = thread;
    swapcontext(&scheduler, &fiber.context);
    return true;
}

inline bool run_all(int begin, int end) {
    bool any = false;
    for (int thread = begin; thread < end; ++thread) any |= run(thread);
    return any;
}

inline void start(int threads, size_t shared_bytes) {
    shared.assign(shared_bytes + GUARD, 0xff);
    fibers.resize(threads);
    warps.assign(threads / 32, {});
    all = {};
    for (Fiber& fiber : fibers) {
        fiber.done = false;
        fiber.waits = nullptr;
        fiber.open.clear();
        fiber.groups.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
}

// How many faults there were; −1 where threads wait for one another for ever.
inline int launch(long long blocks, int threads, size_t shared_bytes, std::function<void()> body) {
    kernel = std::move(body);
    grid = blocks;
    faults = 0;
    for (block_index = 0; block_index < blocks; ++block_index) {
        start(threads, shared_bytes);
        for (bool any = true; any;) {
            any = !early && run_all(0, threads);
            for (int warp = early ? threads / 32 - 1 : -1; warp >= 0; --warp)
                while (run_all(32 * warp, 32 * warp + 32)) any = true;
        }
        for (const Fiber& fiber : fibers)
            if (!fiber.done) return -1;
        const auto untouched = [](unsigned char byte) { return byte == 0xff; };
        faults += !std::all_of(shared.end() - GUARD, shared.end(), untouched);
    }
    return faults;
}

// A kernel called with its arguments as they lie in 8 bytes each.
template <class... A, size_t... I>
void call(void (*function)(A...), const uint64_t* values, std::index_sequence<I...>) {
    const auto read = [values](auto* to, size_t i) { std::memcpy(to, values + i, sizeof *to); };
    std::tuple<A...> arguments;
    (read(&std::get<I>(arguments), I), ...);
    std::apply(function, arguments);
}
template <class... A>
void call(void (*function)(A...), const uint64_t* values) {
    call(function, values, std::index_sequence_for<A...>{});
}

inline unsigned bits_of(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

}  // namespace emulator

DEVICE int thread() { return emulator::current; }
DEVICE long long block() { return emulator::block_index; }
DEVICE long long blocks() { return emulator::grid; }
DEVICE void barrier() { emulator::meet(emulator::all, static_cast<int>(emulator::fibers.size())); }

DEVICE float float_of_bits(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
DEVICE float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

DEVICE float shuffle_xor(float value, int mask) {
    using namespace emulator;
    const int warp = current / 32, lane = current % 32;
    floats[warp][lane] = value;
    meet_warp();
    const float other = floats[warp][lane ^ mask];
    meet_warp();
    return other;
}

DEVICE Words load16(const void* from) {
    Words words = {0, 0, 0, 0};
    if (emulator::within(from, 16)) std::memcpy(&words, from, 16);
    return words;
}
DEVICE void store16(void* to, Words words) {
    if (emulator::within(to, 16)) std::memcpy(to, &words, 16);
}

DEVICE void prefetch(const void* at) { emulator::within(at, 16); }  // no more than a fault

using SharedAddress = unsigned char*;
DEVICE SharedAddress shared_address(const void* at) {
    return const_cast<unsigned char*>(static_cast<const unsigned char*>(at));
}
DEVICE void copy16(SharedAddress to, const void* from, bool inside) {
    emulator::Fiber& fiber = emulator::fibers[emulator::current];
    if (!emulator::within(to, 16)) return;
    fiber.open.push_back({to, from, inside});
    if (emulator::early) emulator::land(fiber.open.back());
}
DEVICE void copies_commit() {
    emulator::Fiber& fiber = emulator::fibers[emulator::current];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int N>
DEVICE void copies_wait() {
    emulator::Fiber& fiber = emulator::fibers[emulator::current];
    for (; fiber.groups.size() > N; fiber.groups.pop_front())
        if (!emulator::early)
            for (const emulator::Copy& copy : fiber.groups.front()) emulator::land(copy);
}

DEVICE void wait_for_earlier() {}  // nothing runs beside a kernel here

DEVICE unsigned pack_bf16x2(float low, float high) {
    unsigned halves[2];
    for (int i = 0; i < 2; ++i) {
        const unsigned bits = emulator::bits_of(i ? high : low);
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;  // ties go to even
        halves[i] = nan ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    }
    return halves[0] | halves[1] << 16;
}
DEVICE unsigned multiply_bf16x2(unsigned a, unsigned b) {
    return pack_bf16x2(float_of_bits(a << 16) * float_of_bits(b << 16),
                       float_of_bits(a & 0xffff0000u) * float_of_bits(b & 0xffff0000u));
}

// PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type": of lane 4·g + t, a0 is
// row g, columns 2t and 2t + 1; a1 row g + 8; a2, a3 the same 8 columns on; b0 is rows 2t and 2t + 1
// of column g, b1 8 rows on; c0, c1 are row g, columns 2t and 2t + 1, c2, c3 row g + 8.
DEVICE void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1) {
    using namespace emulator;
    const int g = current % 32 / 4, t = current % 4;
    auto& warp = operands[current / 32];
    const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp[current % 32], mine, sizeof mine);
    meet_warp();
    const auto half = [](unsigned pair, int high) {
        return float_of_bits(high ? pair & 0xffff0000u : pair << 16);
    };
    for (int i = 0; i < 4; ++i) {
        const int column = 2 * t + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int from = k % 8 / 2;
            const float a = half(warp[4 * g + from][i / 2 + 2 * (k / 8)], k % 2);
            c[i] += a * half(warp[4 * column + from][4 + k / 8], k % 2);
        }
    }
    meet_warp();
}
