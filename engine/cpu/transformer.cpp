// A few tokens through the unified transformer on a CPU, in float32: from codes to logits in one
// call. Shapes and formulas: engine/cpu/native.py, which packs the weights and makes the calls.
//
// A small model's step is a hundred operations, and calling them one by one from Python is most of it:
// 0.7 of 1.2 ms for two rows of the bundled model, where all of it takes 0.3 here (Zen 4, `echogen bench
// engine --mode latency --model tiny --peer none`, also with ECHOGEN_NATIVE=0). What is left is the
// weights' bytes at few tokens and the multiply-adds at many.
//
// A token's numbers are summed in one order whatever else is in the call: products run down the
// inputs one by one, attention from the first key to the last. So a code has the same logits, to the
// last bit, drawn alone or in a crowd, in a step of one code or of sixteen, by one thread or by many.
//
// Threads share a call in one of two ways. Each takes some of the rows and runs them alone; nobody
// waits, but each reads all the weights. Or all run all rows together, and each computes some outputs
// of every product: weights are read once, by as many cores as there are, and after each product all
// wait for the last. A model whose weights come from memory is run in the second way.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

// PyTorch's OpenMP, where it is GNU's; elsewhere all runs on one thread. Between two of PyTorch's loops
// its threads wait spinning, and others have no core: with threads of its own a rollout of 256 rows of
// the bundled model was the quickest on one, 37.7 ms a step, and with PyTorch's on two, 19.7 (two cores
// of Zen 4, bench/results/rollout-cpu.json at 7a14276fa and at f0a0141ea).
extern "C" {
#if defined(__linux__)
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));
void GOMP_barrier() __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
#else
constexpr void (*GOMP_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
constexpr void (*GOMP_barrier)() = nullptr;
constexpr int (*omp_get_thread_num)() = nullptr, (*omp_get_num_threads)() = nullptr;
#endif
}

namespace {

// LANES: numbers of a register. TILE: tokens whose sums lie in registers, WIDE of each, beside WIDE
// of weights and one number of a token: 29 of 32 registers, or 13 of 16.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 6;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE = 6;
#else
constexpr int LANES = 4, TILE = 2;
#endif
constexpr int WIDE = 4, BLOCK = LANES * WIDE;  // outputs
// Rows of a block of weights to ask for ahead of time, 16 KiB with AVX-512. A step of 2 rows of a model
// of 110 million parameters takes 0.92 of the time without, of 8 rows 0.82; one row alone took 1.07
// times as long, so it goes without (two threads of an Intel Xeon with AMX; other processors have not
// been measured).
constexpr int AHEAD = 64;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

inline Vector all(float x) { return x - Vector{}; }

// By halves, each added in registers of its own size.
template <int N>
struct Floats {
    typedef float type __attribute__((vector_size(4 * N)));
};

template <int N>
inline float sum(typename Floats<N>::type v) {
    if constexpr (N == 4) {
        return (v[0] + v[2]) + (v[1] + v[3]);
    } else {
        typename Floats<N / 2>::type halves[2];
        std::memcpy(halves, &v, sizeof v);
        return sum<N / 2>(halves[0] + halves[1]);
    }
}

inline float sum(Vector v) { return sum<LANES>(v); }

// eˣ to a few units in the last place: x = n·ln 2 + r with |r| ≤ ½·ln 2, eʳ by its Taylor series to
// the seventh power, 2ⁿ by its bits. Outside of [-87, 88] as at the nearer end; NaN stays NaN.
inline Vector exp(Vector x) {
    const Vector low = all(-87.0f), high = all(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const float rounding = 12582912.0f;  // 1.5·2²³: what is added to it loses its fraction
    const Vector shifted = x * 1.44269504f + rounding, n = shifted - rounding;
    const Vector r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vector p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Integers power, bits;
    std::memcpy(&power, &shifted, sizeof power);
    std::memcpy(&bits, &p, sizeof bits);
    bits += power << 23;
    std::memcpy(&p, &bits, sizeof p);
    return x == x ? p : x;  // 2ⁿ may have made a number of a NaN's bits
}

int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

}  // namespace

// --- what Python passes (ctypes in engine/cpu/native.py) ---------------------------------------------

struct Layer {
    const float *qkv, *out, *gate_up, *down;
};

struct Model {
    const Layer* layers;
    const float *head_in, *head_in_bias, *head_out, *head_out_bias;
    const float* rope;  // [positions, head_dim], cosine and sine in turn
    int64_t depth, width, heads, kv_heads, head_dim, mlp, head_width, codes, positions;
    float eps;
};

// One sequence: its own keys and values [2, layers, kv_heads, capacity, head_dim], the last two
// dimensions' rows beside each other, and a prompt's in front of them, which may be many rows'
// [2, layers, kv_heads, prefix_tokens, head_dim].
struct Row {
    float* own;
    int64_t half_stride, layer_stride, head_stride, capacity;
    const float* prefix;
    int64_t prefix_tokens;
};

struct Call {
    const float* table;   // [ids, width], embeddings
    int64_t ids_known;
    const int64_t *ids, *row, *at;  // of each token; `at` counts from the end of its row's prefix
    int64_t tokens;
    const Row* rows;
    int64_t rows_known;
    float* logits;        // [tokens or rows, padded(codes)]
    int64_t last_only;    // logits of each row's last token alone
    int64_t threads;
    int64_t together;     // threads share every product, instead of the rows
};

enum Result : int { DONE, BAD_ID, BAD_ROW, BAD_PLACE, NO_MEMORY };

namespace {

// One of some threads that run the same tokens together.
struct Member {
    int64_t rank = 0, count = 1;

    // Its share of `all` things: from the first up to, not including, the second.
    int64_t begin(int64_t all) const { return all * rank / count; }
    int64_t end(int64_t all) const { return all * (rank + 1) / count; }

    // Wait until every member is here.
    void meet() const {
        if (count > 1) GOMP_barrier();
    }
};

// --- products ------------------------------------------------------------------------------------

struct Product {
    const float* x;       // [tokens, inputs] at x_stride
    int64_t x_stride;
    const float* weight;  // outputs in blocks and a narrower last one, each [inputs, block]
    int64_t inputs, outputs;
    float* y;             // [tokens, outputs] at y_stride
    int64_t y_stride;
    const float* scale = nullptr;  // of each token, before the bias
    const float* bias = nullptr;
    bool add = false;     // to what y holds
};

template <int T, int V>
void tile(const Product& p, int64_t token, int64_t output) {
    Vector sums[T][V] = {};
    const float *x = p.x + token * p.x_stride, *w = p.weight + output * p.inputs;
#pragma GCC unroll 4
    for (int64_t k = 0; k < p.inputs; ++k) {
        Vector column[V];
        for (int v = 0; v < V; ++v) {
            column[v] = load(w + (k * V + v) * LANES);
            if (T > 1 && v * LANES % 16 == 0)  // once a cache line; past the weights' end it does nothing
                __builtin_prefetch(w + ((k + AHEAD) * V + v) * LANES);
        }
        for (int t = 0; t < T; ++t) {
            const float number = x[t * p.x_stride + k];
            for (int v = 0; v < V; ++v) sums[t][v] += column[v] * number;
        }
    }
    for (int t = 0; t < T; ++t) {
        float* y = p.y + (token + t) * p.y_stride + output;
        for (int v = 0; v < V; ++v) {
            Vector result = sums[t][v];
            if (p.scale) result *= p.scale[token + t];
            if (p.bias) result += load(p.bias + output + v * LANES);
            if (p.add) result += load(y + v * LANES);
            store(y + v * LANES, result);
        }
    }
}

template <int V>
void block(const Product& p, int64_t tokens, int64_t output) {
    int64_t t = 0;
    for (; t + TILE <= tokens; t += TILE) tile<TILE, V>(p, t, output);
    switch (tokens - t) {
        case 5: return tile<5, V>(p, t, output);
        case 4: return tile<4, V>(p, t, output);
        case 3: return tile<3, V>(p, t, output);
        case 2: return tile<2, V>(p, t, output);
        case 1: return tile<1, V>(p, t, output);
    }
}

// A member's share of the outputs, in whole blocks.
void multiply(const Product& p, int64_t tokens, Member who) {
    const int64_t blocks = (p.outputs + BLOCK - 1) / BLOCK, end = who.end(blocks) * BLOCK;
    int64_t output = who.begin(blocks) * BLOCK;
    for (; output < end && output + BLOCK <= p.outputs; output += BLOCK)
        block<WIDE>(p, tokens, output);
    if (output >= end) return;
    switch ((p.outputs - output) / LANES) {
        case 3: return block<3>(p, tokens, output);
        case 2: return block<2>(p, tokens, output);
        case 1: return block<1>(p, tokens, output);
    }
}

// --- the other operations ------------------------------------------------------------------------

// 1/√(mean x² + eps) of each token; the gains lie in the weights behind.
void inverse_norms(const float* x, int64_t tokens, int64_t width, float eps, float* into) {
    const int64_t stride = padded(width);  // filled up with zeros
    for (int64_t t = 0; t < tokens; ++t, x += stride) {
        Vector squares{};
        for (int64_t i = 0; i < stride; i += LANES) squares += load(x + i) * load(x + i);
        into[t] = 1.0f / std::sqrt(sum(squares) / width + eps);
    }
}

// Numbers 2i and 2i + 1 of every head turned by the angle of the place.
void turn(float* heads, int64_t count, const float* rope, int64_t dim) {
    for (int64_t h = 0; h < count; ++h, heads += dim) {
        for (int64_t i = 0; i < dim; i += 2) {
            const float a = heads[i], b = heads[i + 1], cosine = rope[i], sine = rope[i + 1];
            heads[i] = a * cosine - b * sine;
            heads[i + 1] = a * sine + b * cosine;
        }
    }
}

// Keys and values of one head and layer: of a prefix, then the row's own.
struct Keys {
    const float *prefix_keys, *prefix_values, *own_keys, *own_values;
    int64_t prefix, count;
};

template <int V>
void score(const Vector* query, const float* keys, int64_t count, float* scores) {
    Vector q[V];
    for (int v = 0; v < V; ++v) q[v] = query[v];
    for (int64_t j = 0; j < count; ++j, keys += V * LANES) {
        Vector products{};
        for (int v = 0; v < V; ++v) products += q[v] * load(keys + v * LANES);
        scores[j] = sum(products);
    }
}

template <int V>
void mix(const float* weights, const float* values, int64_t count, Vector* mixed) {
    Vector sums[V];  // a copy, which can lie in registers
    for (int v = 0; v < V; ++v) sums[v] = mixed[v];
    for (int64_t j = 0; j < count; ++j, values += V * LANES)
        for (int v = 0; v < V; ++v) sums[v] += load(values + v * LANES) * weights[j];
    for (int v = 0; v < V; ++v) mixed[v] = sums[v];
}

// softmax(q·kᵀ/√dim)·v of one query head; `scores` holds padded(count) numbers.
template <int DIM>
void attend(const float* query, const Keys& keys, float* scores, float* out) {
    constexpr int V = DIM / LANES;
    Vector q[V], mixed[V] = {}, weights{};
    for (int v = 0; v < V; ++v) q[v] = load(query + v * LANES) * (1.0f / std::sqrt(float(DIM)));
    const int64_t prefix = keys.prefix, count = keys.count, end = padded(count);
    score<V>(q, keys.prefix_keys, prefix, scores);
    score<V>(q, keys.own_keys, count - prefix, scores + prefix);
    for (int64_t j = count; j < end; ++j) scores[j] = -std::numeric_limits<float>::infinity();
    Vector most = load(scores);
    for (int64_t j = LANES; j < end; j += LANES) {
        const Vector next = load(scores + j);
        most = next > most ? next : most;
    }
    float top = most[0];
    for (int i = 1; i < LANES; ++i) top = most[i] > top ? most[i] : top;
    for (int64_t j = 0; j < end; j += LANES) store(scores + j, exp(load(scores + j) - top));
    for (int64_t j = count; j < end; ++j) scores[j] = 0;
    for (int64_t j = 0; j < end; j += LANES) weights += load(scores + j);
    mix<V>(scores, keys.prefix_values, prefix, mixed);
    mix<V>(scores + prefix, keys.own_values, count - prefix, mixed);
    const float whole = 1.0f / sum(weights);
    for (int v = 0; v < V; ++v) store(out + v * LANES, mixed[v] * whole);
}

using Attend = void (*)(const float*, const Keys&, float*, float*);

Attend attend_for(int64_t head_dim) {
    switch (head_dim) {
        case 16: return attend<16>;
        case 32: return attend<32>;
        case 48: return attend<48>;
        case 64: return attend<64>;
        case 80: return attend<80>;
        case 96: return attend<96>;
        case 112: return attend<112>;
        case 128: return attend<128>;
    }
    return nullptr;
}

// --- the transformer -----------------------------------------------------------------------------

// Buffers for some tokens, in one piece of memory that ends with it. Of the last two each thread has its
// own: inverse norms, which each computes for itself, and scores.
struct Buffers {
    struct Free {
        void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
    };
    std::unique_ptr<float[], Free> memory;
    float *x, *qkv, *attended, *hidden, *own;
    int64_t norms_size, own_size;

    Buffers(const Model& m, int64_t tokens, int64_t longest, int64_t threads)
        : norms_size(padded(tokens)), own_size(norms_size + padded(longest)) {
        const int64_t qkv_width = (m.heads + 2 * m.kv_heads) * m.head_dim;
        const int64_t mlp = 2 * padded(m.mlp), head = padded(m.head_width);
        const int64_t sizes[] = {padded(m.width), qkv_width, m.heads * m.head_dim,
                                 mlp > head ? mlp : head};
        int64_t total = threads * own_size;
        for (int64_t size : sizes) total += tokens * size;
        memory.reset(static_cast<float*>(
            ::operator new[](total * sizeof(float), std::align_val_t(64))));
        x = memory.get();
        qkv = x + tokens * sizes[0];
        attended = qkv + tokens * sizes[1];
        hidden = attended + tokens * sizes[2];
        own = hidden + tokens * sizes[3];
    }

    float* norms(Member who) const { return own + who.rank * own_size; }
    float* scores(Member who) const { return norms(who) + norms_size; }
};

// Tokens `begin` … `end` of a call, whole rows, run by up to `threads` members.
class Part {
public:
    Part(const Model& model, const Call& call, int64_t begin, int64_t end, float* logits,
         int64_t threads)
        : m(model), ids(call.ids + begin), row(call.row + begin), at(call.at + begin), c(call),
          tokens(end - begin), logits(logits), attend(attend_for(model.head_dim)),
          buffers(model, tokens, longest(), threads) {}

    // Number of logits that it writes.
    int64_t answers() const {
        int64_t count = 0;
        for (int64_t t = 0; t < tokens; ++t) count += answered(t);
        return count;
    }

    void run(Member who) {
        const int64_t stride = padded(m.width);
        for (int64_t t = who.begin(tokens); t < who.end(tokens); ++t) {
            float* x = buffers.x + t * stride;
            std::memcpy(x, c.table + ids[t] * m.width, m.width * sizeof(float));
            std::memset(x + m.width, 0, (stride - m.width) * sizeof(float));
        }
        who.meet();
        for (int64_t l = 0; l < m.depth; ++l) layer(l, who);
        if (c.last_only) {
            if (who.rank == 0) keep_last();
            who.meet();
        }
        head(answers(), who);
    }

private:
    const Model& m;
    const int64_t *ids, *row, *at;
    const Call& c;
    int64_t tokens;
    float* logits;
    Attend attend;
    Buffers buffers;

    bool answered(int64_t t) const {
        return !c.last_only || t + 1 == tokens || row[t + 1] != row[t];
    }

    int64_t keys_of(int64_t t) const { return c.rows[row[t]].prefix_tokens + at[t] + 1; }

    int64_t longest() const {
        int64_t most = 0;
        for (int64_t t = 0; t < tokens; ++t) most = keys_of(t) > most ? keys_of(t) : most;
        return most;
    }

    // Between two meetings no member reads what another writes.
    void layer(int64_t l, Member who) {
        const Layer& w = m.layers[l];
        const Buffers& b = buffers;
        const int64_t stride = padded(m.width), mlp = padded(m.mlp), queries = m.heads * m.head_dim;
        const int64_t qkv = queries + 2 * m.kv_heads * m.head_dim;
        float* norms = b.norms(who);
        inverse_norms(b.x, tokens, m.width, m.eps, norms);
        multiply({b.x, stride, w.qkv, m.width, qkv, b.qkv, qkv, norms}, tokens, who);
        who.meet();
        for (int64_t h = who.begin(m.kv_heads); h < who.end(m.kv_heads); ++h) heads(l, h, who);
        who.meet();
        multiply({b.attended, queries, w.out, queries, stride, b.x, stride, nullptr, nullptr, true},
                 tokens, who);
        who.meet();
        inverse_norms(b.x, tokens, m.width, m.eps, norms);
        multiply({b.x, stride, w.gate_up, m.width, 2 * mlp, b.hidden, 2 * mlp, norms}, tokens, who);
        who.meet();
        const int64_t each = mlp / LANES, all = tokens * each;
        for (int64_t i = who.begin(all); i < who.end(all); ++i) {
            float* gate = b.hidden + i / each * 2 * mlp + i % each * LANES;
            const Vector g = load(gate), up = load(gate + mlp);
            store(gate, g / (exp(-g) + 1.0f) * up);
        }
        who.meet();
        multiply({b.hidden, 2 * mlp, w.down, m.mlp, stride, b.x, stride, nullptr, nullptr, true},
                 tokens, who);
        who.meet();
    }

    // Turn the keys of a head and the queries that read them, put keys and values into the rows'
    // caches, and attend: head by head, so that rows of one prompt find its keys in the nearest cache.
    void heads(int64_t l, int64_t kv_head, Member who) {
        const int64_t dim = m.head_dim, group = m.heads / m.kv_heads, queries = m.heads * dim;
        const int64_t stride = queries + 2 * m.kv_heads * dim, first = kv_head * group;
        for (int64_t t = 0; t < tokens; ++t) {
            float* qkv = buffers.qkv + t * stride;
            float *key = qkv + queries + kv_head * dim, *value = key + m.kv_heads * dim;
            const float* rope = m.rope + (keys_of(t) - 1) * dim;
            turn(qkv + first * dim, group, rope, dim);
            turn(key, 1, rope, dim);
            const Row& r = c.rows[row[t]];
            float* to = r.own + l * r.layer_stride + kv_head * r.head_stride + at[t] * dim;
            std::memcpy(to, key, dim * sizeof(float));
            std::memcpy(to + r.half_stride, value, dim * sizeof(float));
        }
        for (int64_t h = first; h < first + group; ++h)
            for (int64_t t = 0; t < tokens; ++t)
                attend(buffers.qkv + t * stride + h * dim, keys(l, t, kv_head),
                       buffers.scores(who), buffers.attended + t * queries + h * dim);
    }

    Keys keys(int64_t l, int64_t t, int64_t h) const {
        const Row& r = c.rows[row[t]];
        const int64_t held = r.prefix_tokens * m.head_dim, half = m.depth * m.kv_heads * held;
        const float* prefix = r.prefix + (l * m.kv_heads + h) * held;
        const float* own = r.own + l * r.layer_stride + h * r.head_stride;
        return {prefix, prefix + half, own, own + r.half_stride, r.prefix_tokens, keys_of(t)};
    }

    void keep_last() {
        const int64_t stride = padded(m.width);
        int64_t kept = 0;
        for (int64_t t = 0; t < tokens; ++t)
            if (answered(t))
                std::memmove(buffers.x + kept++ * stride, buffers.x + t * stride,
                             stride * sizeof(float));
    }

    // Logits after the first `count` tokens of the stream.
    void head(int64_t count, Member who) {
        const Buffers& b = buffers;
        const int64_t stride = padded(m.width), wide = padded(m.head_width), out = padded(m.codes);
        float* norms = b.norms(who);
        inverse_norms(b.x, count, m.width, m.eps, norms);
        multiply({b.x, stride, m.head_in, m.width, wide, b.hidden, wide, norms, m.head_in_bias},
                 count, who);
        who.meet();
        for (int64_t i = who.begin(count * wide); i < who.end(count * wide); ++i) {
            const float h = b.hidden[i];
            b.hidden[i] = 0.5f * h * (1.0f + std::erf(h * 0.707106781f));
        }
        who.meet();
        multiply({b.hidden, wide, m.head_out, m.head_width, out, logits, out, nullptr,
                  m.head_out_bias},
                 count, who);
    }
};

Result check(const Model& m, const Call& c) {
    for (int64_t t = 0; t < c.tokens; ++t) {
        if (c.ids[t] < 0 || c.ids[t] >= c.ids_known) return BAD_ID;
        if (c.row[t] < 0 || c.row[t] >= c.rows_known) return BAD_ROW;
        const Row& r = c.rows[c.row[t]];
        if (c.at[t] < 0 || c.at[t] >= r.capacity) return BAD_PLACE;
        if (r.prefix_tokens + c.at[t] >= m.positions) return BAD_PLACE;
    }
    return DONE;
}

}  // namespace

// Whether the attention of such heads is here.
extern "C" int echogen_fits(int64_t head_dim) { return attend_for(head_dim) != nullptr; }

// Outputs are filled up to a multiple of `echogen_lanes`, and packed in blocks of `echogen_block`.
extern "C" int echogen_lanes() { return LANES; }
extern "C" int echogen_block() { return BLOCK; }

namespace {

using Parts = std::vector<std::unique_ptr<Part>>;

bool threaded() {
    return GOMP_parallel && GOMP_barrier && omp_get_thread_num && omp_get_num_threads;
}

// As many of the parts at once as there are threads.
void run_share(void* all) {
    const Parts& parts = *static_cast<const Parts*>(all);
    for (size_t i = omp_get_thread_num(); i < parts.size(); i += omp_get_num_threads())
        parts[i]->run({});
}

void run_member(void* part) {
    static_cast<Part*>(part)->run({omp_get_thread_num(), omp_get_num_threads()});
}

void run_all(Parts& parts) {
    if (parts.size() > 1 && threaded())
        GOMP_parallel(run_share, &parts, unsigned(parts.size()), 0);
    else
        for (const auto& part : parts) part->run({});
}

}  // namespace

// Whether more than one thread can be had.
extern "C" int echogen_threaded() { return threaded(); }

// Run a call's tokens, those of a row beside each other and in order; each sees its row's prefix and
// the row's own keys up to itself. Nothing is written where a token is refused.
extern "C" int echogen_run(const Model* model, const Call* call) {
    const Call& c = *call;
    if (const Result bad = check(*model, c)) return bad;
    try {
        if (c.together && c.threads > 1 && threaded()) {
            Part part(*model, c, 0, c.tokens, c.logits, c.threads);
            GOMP_parallel(run_member, &part, unsigned(c.threads), 0);
            return DONE;
        }
        Parts parts;
        int64_t begin = 0;
        float* logits = c.logits;
        for (int64_t i = 1; i <= c.threads && begin < c.tokens; ++i) {
            int64_t end = i == c.threads ? c.tokens : c.tokens * i / c.threads;
            while (end < c.tokens && end > begin && c.row[end] == c.row[end - 1]) ++end;
            if (end <= begin) continue;
            parts.push_back(std::make_unique<Part>(*model, c, begin, end, logits, 1));
            logits += parts.back()->answers() * padded(model->codes);
            begin = end;
        }
        run_all(parts);
        return DONE;
    } catch (const std::bad_alloc&) {  // of the parts' buffers; none has run
        return NO_MEMORY;
    }
}

// --- noise ---------------------------------------------------------------------------------------

// The uniforms of kernels/reference/philox.py, the same numbers to the last bit: Philox-4x32-10 with
// the seed as key and (column / 4, position, draw, 0) as counter; float32 [rows, columns].
extern "C" void echogen_uniform(uint64_t seed, const int64_t* draw, const int64_t* position,
                                int64_t rows, int64_t columns, float* out) {
    constexpr int COUNT = 16, ROUNDS = 10;  // counters at a time, which registers hold
    for (int64_t row = 0; row < rows; ++row, out += columns) {
        for (int64_t first = 0; first < columns; first += 4 * COUNT) {
            uint32_t c[4][COUNT], key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
            for (int i = 0; i < COUNT; ++i) {
                c[0][i] = uint32_t(first / 4 + i);
                c[1][i] = uint32_t(position[row]);
                c[2][i] = uint32_t(draw[row]);
                c[3][i] = 0;
            }
            for (int round = 0; round < ROUNDS; ++round) {
                for (int i = 0; i < COUNT; ++i) {
                    const uint64_t a = uint64_t(c[0][i]) * 0xD2511F53u;
                    const uint64_t b = uint64_t(c[2][i]) * 0xCD9E8D57u;
                    c[0][i] = uint32_t(b >> 32) ^ c[1][i] ^ key[0];
                    c[2][i] = uint32_t(a >> 32) ^ c[3][i] ^ key[1];
                    c[1][i] = uint32_t(b);
                    c[3][i] = uint32_t(a);
                }
                key[0] += 0x9E3779B9u;
                key[1] += 0xBB67AE85u;
            }
            float found[4 * COUNT];
            for (int i = 0; i < COUNT; ++i)
                for (int word = 0; word < 4; ++word)
                    found[4 * i + word] = (float(c[word][i] >> 9) + 0.5f) * 0x1p-23f;
            const int64_t left = columns - first;
            std::memcpy(out + first, found, sizeof(float) * (left < 4 * COUNT ? left : 4 * COUNT));
        }
    }
}
