// y = x·Wᵀ for at most 16 rows, at the speed of memory. Shapes and formulas: kernels/skinny_linear.py.
//
// The weight is all that costs: every byte of it is read once, 16 a copy, and goes by an asynchronous
// copy from global to shared memory. What keeps memory busy is the bytes under way (Little's law): on
// an H200 4.8 TB/s × 700 ns = 3.4 MB, or 25 KB an SM, on a B200 about 43 KB. One block of eight warps
// an SM keeps stages − 1 stages of 8 KB under way: 56 KB with eight stages, 24 KB with the four that
// are left where the rows of x fill shared memory. Blocks stay for all their tiles, and the copies of
// the next tile are under way while this one is summed.
//
// A tile is 8 (bfloat16) or 16 (fp8) rows of W. Its K is split over the warps in chunks of 64, whose
// parts are summed in shared memory in the order of warps: no atomics, the same result every time,
// and for a row the same result whatever the other rows. The tensor cores multiply a [16, 16] by
// b [16, 8]. In bfloat16 x is a (rows below 16 are zero) and the tile of W b; in fp8 the tile fills
// a, and 8 rows of x are b: up to 8 rows take half the products, where conversions from fp8 leave
// no issue slots to spare (a chunk takes 173 instructions at 8 rows and 181 at 16; with x as a it
// took 200 and 209, on sm_90). A lane's fragment is pairs along k of a row of W, and since any order
// of k will do as long as x has the same, a lane takes 16 bytes in a row as its fragments of several
// products. So a lane reads from shared memory only what it copied there itself, and the copies need
// no barrier.
#include "device.cuh"

constexpr int WARPS = 8, LANES = 32, THREADS = WARPS * LANES;
constexpr int UNIT = 8;        // numbers of x in 16 bytes
constexpr int CHUNK = 64;      // of K, a warp and stage
constexpr int COPIES = 2;      // of 16 bytes, a lane and stage
constexpr int MOST_STAGES = 8, FEWEST_STAGES = 4;

template <bool FP8>
struct Tiling {
    static constexpr int UNITS = FP8 ? 2 : 1;                   // of x that meet 16 bytes of W
    static constexpr int PIECE = 4 * UNITS * UNIT;              // of K, one copy of four lanes
    static constexpr int PIECES = CHUNK / PIECE;
    static constexpr int GROUPS = COPIES / PIECES;              // of 8 rows of W
    static constexpr int CHANNELS = 8 * GROUPS;
    static constexpr int WEIGHT_BYTES = FP8 ? 1 : 2;
};

struct Problem {
    const unsigned char* weight;
    long long rows, outputs, tiles;
    int depth, chunks, end;  // K, its chunks, and K filled up to as many chunks for every warp
    int swiglu, a_tile;      // outputs of a tile
};

template <bool FP8>
DEVICE Problem problem(const void* weight, long long rows, long long depth, long long channels,
                       int swiglu) {
    Problem p;
    p.weight = static_cast<const unsigned char*>(weight);
    p.rows = rows;
    p.depth = static_cast<int>(depth);
    p.swiglu = swiglu;
    p.outputs = channels >> swiglu;
    p.a_tile = Tiling<FP8>::CHANNELS >> swiglu;
    p.tiles = (p.outputs + p.a_tile - 1) / p.a_tile;
    p.chunks = (p.depth + CHUNK - 1) / CHUNK;
    p.end = (p.chunks + WARPS - 1) / WARPS * WARPS * CHUNK;
    return p;
}

// Row of W that is channel `c` of a tile: in a SwiGLU half of them gate, half of them up, so that
// both factors of an output meet in one block. −1: none.
DEVICE long long weight_row(const Problem& p, long long tile, int c) {
    const long long output = tile * p.a_tile + (c & (p.a_tile - 1));
    if (tile >= p.tiles || output >= p.outputs) return -1;
    return c < p.a_tile ? output : p.outputs + output;
}

// Where unit `u` of a row of x lies: with fp8 a lane takes two units, whose firsts of four lanes
// come before the seconds of four, as each of the two is one conflict-free read.
template <bool FP8>
DEVICE long long place(long long u) {
    return FP8 ? (u & ~7LL) | ((u & 1) << 2) | ((u >> 1) & 3) : u;
}

// One unit in the order in which W comes out of its bytes: with fp8 odd numbers before even ones.
template <bool FP8>
DEVICE Words arrange(Words v) {
    if (!FP8) return v;
    return {(v.x >> 16) | (v.y & 0xffff0000u), (v.x & 0xffffu) | (v.y << 16),
            (v.z >> 16) | (v.w & 0xffff0000u), (v.z & 0xffffu) | (v.w << 16)};
}

// Bytes 1 and 3 of four fp8 numbers (e4m3) as bfloat16, exactly: the bits at the place of the wider
// exponent are the number times 2^-120, since the exponents' biases are 7 and 127.
DEVICE unsigned bf16_of_fp8(unsigned four) {
    const unsigned bits = (four & 0x80008000u) | ((four & 0x7f007f00u) >> 4);
    return multiply_bf16x2(bits, 0x7b807b80u);
}

// What a lane copies next: a warp takes chunk after chunk of a tile, then of the block's next tile.
template <bool FP8>
struct Cursor {
    using T = Tiling<FP8>;
    static constexpr int STEP = WARPS * CHUNK;
    long long tile;
    int k;
    bool any[T::GROUPS];
    const unsigned char* from[T::GROUPS];

    DEVICE void enter(const Problem& p, long long to) {
        tile = to;
        k = thread() / LANES * CHUNK + thread() % 4 * (T::UNITS * UNIT);
#pragma unroll
        for (int group = 0; group < T::GROUPS; ++group) {
            const long long row = weight_row(p, tile, 8 * group + thread() % LANES / 4);
            any[group] = row >= 0;
            from[group] = p.weight + ((any[group] ? row : 0) * p.depth + k) * T::WEIGHT_BYTES;
        }
    }

    // Start a stage's copies. A group is committed also when nothing is left, to keep the count.
    DEVICE void fetch(const Problem& p, SharedAddress slot) {
#pragma unroll
        for (int i = 0; i < COPIES; ++i) {
            const int piece = i / T::GROUPS, group = i % T::GROUPS;
            copy16(slot + i * LANES * 16, from[group] + piece * T::PIECE * T::WEIGHT_BYTES,
                   any[group] && k + piece * T::PIECE < p.depth);
        }
        copies_commit();
        k += STEP;
#pragma unroll
        for (int group = 0; group < T::GROUPS; ++group) from[group] += STEP * T::WEIGHT_BYTES;
        if (k >= p.end) enter(p, tile + blocks());
    }
};

// Products side by side, of as many rows of x as one takes.
template <int ROWS, bool FP8>
constexpr int SIDES = FP8 && ROWS > 8 ? 2 : 1;

// Add the product of one chunk: of a lane's rows of x at `x`, and of its copies in `slot`. Two sums,
// as each product waits for the sum it adds to.
template <int ROWS, bool FP8>
DEVICE void multiply(float (&sum)[2][SIDES<ROWS, FP8>][4], const unsigned char* x, int x_stride,
                     const unsigned char* slot) {
    using T = Tiling<FP8>;
#pragma unroll
    for (int piece = 0; piece < T::PIECES; ++piece) {
        Words w[T::GROUPS];
#pragma unroll
        for (int group = 0; group < T::GROUPS; ++group)
            w[group] = load16(slot + (piece * T::GROUPS + group) * LANES * 16);
#pragma unroll
        for (int unit = 0; unit < T::UNITS; ++unit) {
            const unsigned char* at = x + (piece * T::UNITS + unit) * 4 * 16;
            Words low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
            if (ROWS >= 8 || thread() % LANES / 4 < ROWS) low = load16(at);
            if (ROWS > 8) high = load16(at + 8 * x_stride);
            if constexpr (FP8) {
                Words a[T::GROUPS];
#pragma unroll
                for (int group = 0; group < T::GROUPS; ++group) {
                    const unsigned first = unit ? w[group].z : w[group].x;
                    const unsigned second = unit ? w[group].w : w[group].y;
                    a[group] = {bf16_of_fp8(first), bf16_of_fp8(first << 8), bf16_of_fp8(second),
                                bf16_of_fp8(second << 8)};
                }
                mma(sum[0][0], a[0].x, a[1].x, a[0].y, a[1].y, low.x, low.y);
                mma(sum[1][0], a[0].z, a[1].z, a[0].w, a[1].w, low.z, low.w);
                if constexpr (ROWS > 8) {
                    mma(sum[0][1], a[0].x, a[1].x, a[0].y, a[1].y, high.x, high.y);
                    mma(sum[1][1], a[0].z, a[1].z, a[0].w, a[1].w, high.z, high.w);
                }
            } else {
                mma(sum[0][0], low.x, high.x, low.y, high.y, w[0].x, w[0].y);
                mma(sum[1][0], low.z, high.z, low.w, high.w, w[0].z, w[0].w);
            }
        }
    }
}

// fmaf here and below leaves the compiler no choice of which products to fuse with a sum: were it to
// choose otherwise for another ROWS, a row's result would depend on the number of rows.
DEVICE float square_sum(unsigned pair) {
    return fmaf(low_half(pair), low_half(pair), high_half(pair) * high_half(pair));
}

// Rounded before the gain as well as behind it, like Llama's norm.
DEVICE unsigned normed(unsigned pair, float inverse, unsigned gain) {
    return multiply_bf16x2(pack_bf16x2(low_half(pair) * inverse, high_half(pair) * inverse), gain);
}

// x into shared memory, zero beyond K and R, normed where there is a gain. Every thread takes the
// same units of all rows: one row alone is as quick, and sums in the same order, as sixteen.
template <int ROWS, bool FP8>
DEVICE void stage_rows(const unsigned char* from, const unsigned char* gain, float eps,
                       const Problem& p, unsigned char* x, int x_stride, float* parts) {
    const long long units = static_cast<long long>(p.chunks) * (CHUNK / UNIT);
    float squares[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) squares[row] = 0.0f;
    for (long long u = thread(); u < units; u += THREADS) {
        Words v[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            v[row] = {0, 0, 0, 0};
            if (row < p.rows && u * UNIT < p.depth)
                v[row] = load16(from + (row * p.depth + u * UNIT) * 2);
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            squares[row] += (square_sum(v[row].x) + square_sum(v[row].y)) +
                            (square_sum(v[row].z) + square_sum(v[row].w));
            store16(x + row * x_stride + place<FP8>(u) * 16, arrange<FP8>(v[row]));
        }
    }
    if (gain) {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
#pragma unroll
            for (int apart = LANES / 2; apart > 0; apart /= 2)
                squares[row] += shuffle_xor(squares[row], apart);
            if (thread() % LANES == 0) parts[row * WARPS + thread() / LANES] = squares[row];
        }
        barrier();
        float* inverse = parts + ROWS * WARPS;
        if (thread() < ROWS) {
            float total = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) total += parts[thread() * WARPS + warp];
            inverse[thread()] = rsqrtf(total / static_cast<float>(p.depth) + eps);
        }
        barrier();
        for (long long u = thread(); u < units && u * UNIT < p.depth; u += THREADS) {
            const Words g = arrange<FP8>(load16(gain + u * UNIT * 2));
            for (int row = 0; row < p.rows; ++row) {
                unsigned char* at = x + row * x_stride + place<FP8>(u) * 16;
                const Words v = load16(at);
                const float r = inverse[row];
                store16(at, {normed(v.x, r, g.x), normed(v.y, r, g.y), normed(v.z, r, g.z),
                             normed(v.w, r, g.w)});
            }
        }
    }
    barrier();
}

// Sum of the warps' parts of one output, in the order of warps.
template <int ROWS, int CHANNELS>
DEVICE float total(const float* parts, int row, int channel) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp)
        sum += parts[(warp * ROWS + row) * CHANNELS + channel];
    return sum;
}

template <int ROWS, bool FP8>
DEVICE void linear(const void* x_from, const void* weight, const float* scale, const void* gain,
                   const void* residual, void* out, long long rows, long long depth,
                   long long channels, float eps, long long swiglu, long long stages) {
    using T = Tiling<FP8>;
    SHARED_MEMORY(shared);
    const Problem p = problem<FP8>(weight, rows, depth, channels, swiglu != 0 ? 1 : 0);
    // Rows are 64 bytes off a multiple of 128, so that eight lanes' 16 bytes of two rows meet 32 banks.
    const int x_stride = p.chunks * CHUNK * 2 + 64;
    constexpr int STAGE = WARPS * COPIES * LANES * 16;
    unsigned char* x = shared + stages * STAGE;
    float* parts = reinterpret_cast<float*>(x + ROWS * x_stride);
    const int warp = thread() / LANES, lane = thread() % LANES;
    const int mine = (warp * COPIES * LANES + lane) * 16, ring = static_cast<int>(stages) * STAGE;
    const SharedAddress slots = shared_address(shared + mine);

    // Before W, as it would queue behind all that is asked of W here, up to 7.4 MB of all blocks,
    // and is read only once the rows are there.
    if (gain)
        for (long long u = 2 * thread(); u * UNIT < depth; u += 2 * THREADS)
            prefetch(static_cast<const unsigned char*>(gain) + u * UNIT * 2);
    Cursor<FP8> ahead;
    ahead.enter(p, block());
    int filled = 0, read = 0, half = 0;
    for (; filled < ring - STAGE; filled += STAGE) ahead.fetch(p, slots + filled);
    // Weights are there from the beginning; all else that is read may just have been written.
    wait_for_earlier();
    stage_rows<ROWS, FP8>(static_cast<const unsigned char*>(x_from),
                          static_cast<const unsigned char*>(gain), eps, p, x, x_stride, parts);

    // What one thread stores of a tile.
    const int out_row = thread() / p.a_tile, out_channel = thread() % p.a_tile;
    const unsigned short* kept = static_cast<const unsigned short*>(residual);
    for (long long tile = block(); tile < p.tiles; tile += blocks(), half ^= 1) {
        constexpr int PRODUCTS = SIDES<ROWS, FP8>;
        float sum[2][PRODUCTS][4];
#pragma unroll
        for (int i = 0; i < 2 * PRODUCTS * 4; ++i)
            sum[i / (PRODUCTS * 4)][i / 4 % PRODUCTS][i % 4] = 0.0f;
        // Asked for before the product, behind which their latency hides: what is needed after the
        // barrier may come from memory. The residual stays as it is read, for a conversion would
        // wait for it here.
        const long long output = tile * p.a_tile + out_channel;
        const bool stores = out_row < p.rows && output < p.outputs;
        const long long place_out = out_row * p.outputs + output;
        unsigned short added = 0;
        float scales[2] = {1.0f, 1.0f};
        if (stores && kept) added = kept[place_out];
        if (stores && scale) {
            scales[0] = scale[output];
            if (p.swiglu) scales[1] = scale[p.outputs + output];
        }
        const unsigned char* at = x + lane / 4 * x_stride + lane % 4 * 16;
        for (int k = warp * CHUNK; k < p.end; k += WARPS * CHUNK) {
            if (stages == MOST_STAGES)
                copies_wait<MOST_STAGES - 2>();
            else
                copies_wait<FEWEST_STAGES - 2>();
            // The slot read last time is free: only this lane reads it, and has.
            ahead.fetch(p, slots + filled);
            filled = filled + STAGE == ring ? 0 : filled + STAGE;
            if (k < p.depth) multiply<ROWS, FP8>(sum, at + k * 2, x_stride, shared + mine + read);
            read = read + STAGE == ring ? 0 : read + STAGE;
        }

        // Two buffers of parts: nobody writes this one again before all have passed the next barrier.
        float* part = parts + half * (WARPS * ROWS * T::CHANNELS);
#pragma unroll
        for (int i = 0; i < PRODUCTS * 4; ++i) {
            // Where the sum lies in c: a's rows go down, b's columns across.
            const int side = i / 4, down = lane / 4 + i % 4 / 2 * 8, across = lane % 4 * 2 + i % 2;
            const int row = FP8 ? 8 * side + across : down, channel = FP8 ? down : across;
            if (row < ROWS)
                part[(warp * ROWS + row) * T::CHANNELS + channel] =
                    sum[0][side][i % 4] + sum[1][side][i % 4];
        }
        barrier();
        if (stores) {
            float y = total<ROWS, T::CHANNELS>(part, out_row, out_channel);
            if (p.swiglu) {
                const float gate = y * scales[0];
                const float up = total<ROWS, T::CHANNELS>(part, out_row, p.a_tile + out_channel);
                y = gate / (1.0f + expf(-gate)) * (up * scales[1]);
            } else {
                y = fmaf(y, scales[0], low_half(added));
            }
            static_cast<unsigned short*>(out)[place_out] =
                static_cast<unsigned short>(pack_bf16x2(y, 0.0f));
        }
    }
    copies_wait<0>();  // the zeros beyond the last tile: nothing may land when this block is gone
}

#define SKINNY_LINEAR(NAME, ROWS, IS_FP8)                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
    NAME(const void* x, const void* weight, const float* scale, const void* gain,                 \
         const void* residual, void* out, long long rows, long long depth, long long channels,    \
         float eps, long long swiglu, long long stages) {                                         \
        linear<ROWS, IS_FP8>(x, weight, scale, gain, residual, out, rows, depth, channels, eps,   \
                             swiglu, stages);                                                     \
    }

SKINNY_LINEAR(skinny_linear_bf16_1, 1, false)
SKINNY_LINEAR(skinny_linear_bf16_2, 2, false)
SKINNY_LINEAR(skinny_linear_bf16_4, 4, false)
SKINNY_LINEAR(skinny_linear_bf16_8, 8, false)
SKINNY_LINEAR(skinny_linear_bf16_16, 16, false)
SKINNY_LINEAR(skinny_linear_fp8_1, 1, true)
SKINNY_LINEAR(skinny_linear_fp8_2, 2, true)
SKINNY_LINEAR(skinny_linear_fp8_4, 4, true)
SKINNY_LINEAR(skinny_linear_fp8_8, 8, true)
SKINNY_LINEAR(skinny_linear_fp8_16, 16, true)
