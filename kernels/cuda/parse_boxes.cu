// The grammar of boxes as a finite-state machine over tokens, for both codecs of engine/prompt.py,
// and the tokens that may follow. Formulas and shapes: kernels/parse_boxes.py.
//
// A machine lives in the registers of one thread; it reads a box's few tokens once. What is long is
// the mask, a byte a word of the vocabulary: its blocks each write a span of one row, 16 bytes a
// thread, after one of their threads has run the machine over the row.
#include "device.cuh"

constexpr int THREADS = 256;
constexpr int BYTES = 16;  // of the mask, a thread

enum Phase { OPEN, NUMBER, SPACE, COMPLETE, CLOSED, DEAD };

// Four names and no array for the corners: registers cannot be indexed by a variable, and nvcc for
// sm_100 makes that of comparisons with a loop's counter, in 32 bytes of local memory.
struct State {
    int phase, field, value, digits, x1, y1, x2, y2;
};

// The coordinate due: x1 and y1 leave room for x2 > x1 and y2 > y1.
DEVICE int lowest(const State& s) { return s.field < 2 ? 0 : (s.field == 2 ? s.x1 : s.y1) + 1; }
DEVICE int highest(const State& s, int scale) { return s.field < 2 ? scale - 1 : scale; }

DEVICE void finish_number(State& s, int value, int next) {
    s.x1 = s.field == 0 ? value : s.x1;
    s.y1 = s.field == 1 ? value : s.y1;
    s.x2 = s.field == 2 ? value : s.x2;
    s.y2 = s.field == 3 ? value : s.y2;
    s.phase = s.field == 3 ? COMPLETE : next;
    s.field += 1;
}

// Boxes of four location tokens, first … first + bins − 1.
struct LocationCodec {
    long long first;
    int scale;

    DEVICE State start() const { return {NUMBER, 0, 0, 0, 0, 0, 0, 0}; }
    DEVICE bool fits(const State& s, long long token) const {  // no difference: it may overflow
        return s.phase == NUMBER && token >= first + lowest(s) && token <= first + highest(s, scale);
    }
    DEVICE void feed(State& s, long long token) const {
        if (fits(s, token))
            finish_number(s, static_cast<int>(token - first), NUMBER);
        else
            s.phase = DEAD;
    }
};

// Whether digits that spell `value`, perhaps with more behind, can be an integer in low … high.
DEVICE bool completable(int value, int low, int high) {
    if (value == 0) return low == 0;
    for (int spread = 1; value <= high; value *= 10, spread *= 10)
        if (value + spread > low) return true;
    return false;
}

// Boxes spelled "[x1, y1, x2, y2]"; pieces [width, vocab] holds the characters of each token,
// zeros behind them, nothing but zeros for a token that is no part of a box.
struct TextCodec {
    const unsigned char* pieces;
    long long width, vocab;
    int scale;

    DEVICE State start() const { return {OPEN, 0, 0, 0, 0, 0, 0, 0}; }
    DEVICE void character(State& s, int c) const {
        const int digit = c - '0';
        if (s.phase == NUMBER && digit >= 0 && digit <= 9) {
            const bool leading_zero = s.digits > 0 && s.value == 0;
            s.value = 10 * s.value + digit;
            s.digits += 1;
            if (leading_zero || !completable(s.value, lowest(s), highest(s, scale))) s.phase = DEAD;
        } else if (s.phase == NUMBER && s.digits > 0 && c == (s.field < 3 ? ',' : ']') &&
                   s.value >= lowest(s)) {
            finish_number(s, s.value, SPACE);
        } else if ((s.phase == OPEN && c == '[') || (s.phase == SPACE && c == ' ')) {
            s.phase = NUMBER;
            s.value = s.digits = 0;
        } else {
            s.phase = DEAD;
        }
    }
    DEVICE void feed(State& s, long long token) const {
        if (token < 0 || token >= vocab || pieces[token] == 0) {
            s.phase = DEAD;
            return;
        }
        for (long long i = 0; i < width && s.phase != DEAD; ++i) {
            const int c = pieces[i * vocab + token];
            if (c == 0) return;
            character(s, c);
        }
    }
};

// The state behind `count` tokens. A complete box may be closed; behind that mark nothing counts.
template <class Codec>
DEVICE State run(const Codec& codec, const long long* tokens, long long count, long long close) {
    State s = codec.start();
    for (long long i = 0; i < count && s.phase != CLOSED && s.phase != DEAD; ++i) {
        if (tokens[i] == close)
            s.phase = s.phase == COMPLETE ? CLOSED : DEAD;
        else
            codec.feed(s, tokens[i]);
    }
    return s;
}

template <class Codec>
DEVICE void parse(const Codec& codec, const long long* tokens, float* boxes, long long rows,
                  long long length, long long close) {
    const long long row = block() * THREADS + thread();
    if (row >= rows) return;
    const State s = run(codec, tokens + row * length, length, close);
    const bool whole = s.phase == COMPLETE || s.phase == CLOSED;
    const int corners[4] = {s.x1, s.y1, s.x2, s.y2};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float value = static_cast<float>(corners[i]) / static_cast<float>(codec.scale);
        boxes[4 * row + i] = whole ? value : float_of_bits(0x7fc00000u);
    }
}

DEVICE bool may_follow(const LocationCodec& codec, const State& s, long long token) {
    return codec.fits(s, token);
}

DEVICE bool may_follow(const TextCodec& codec, State s, long long token) {
    if (s.phase == COMPLETE || s.phase == CLOSED || s.phase == DEAD) return false;
    codec.feed(s, token);
    return s.phase != DEAD;
}

template <class Codec>
DEVICE void allow(const Codec& codec, const long long* tokens, const long long* lengths,
                  unsigned char* mask, long long length, long long vocab, long long close) {
    SHARED_MEMORY(shared);
    State& state = *reinterpret_cast<State*>(shared);
    const long long spans = (vocab + THREADS * BYTES - 1) / (THREADS * BYTES);
    const long long row = block() / spans;
    if (thread() == 0) {
        const long long asked = lengths[row];
        const long long count = asked < 0 ? 0 : asked > length ? length : asked;
        state = run(codec, tokens + row * length, count, close);
    }
    barrier();
    const State s = state;
    const bool whole = s.phase == COMPLETE || s.phase == CLOSED;
    const long long first = (block() % spans * THREADS + thread()) * BYTES;
    if (first >= vocab) return;
    unsigned char* out = mask + row * vocab + first;
    unsigned bytes[BYTES / 4] = {0, 0, 0, 0};
#pragma unroll
    for (int word = 0; word < BYTES / 4; ++word) {
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            const long long token = first + 4 * word + i;
            const bool allowed = token == close ? whole : may_follow(codec, s, token);
            bytes[word] |= (allowed ? 1u : 0u) << (8 * i);
        }
    }
    if (vocab % BYTES == 0) {
        store16(out, {bytes[0], bytes[1], bytes[2], bytes[3]});
        return;
    }
#pragma unroll
    for (int i = 0; i < BYTES; ++i)
        if (first + i < vocab) out[i] = (bytes[i / 4] >> (8 * (i % 4))) & 0xffu;
}

extern "C" {

__global__ void __launch_bounds__(THREADS)
parse_location_boxes(const long long* tokens, float* boxes, long long rows, long long length,
                     long long first, long long bins, long long close) {
    parse(LocationCodec{first, static_cast<int>(bins - 1)}, tokens, boxes, rows, length, close);
}

__global__ void __launch_bounds__(THREADS)
allowed_location_mask(const long long* tokens, const long long* lengths, unsigned char* mask,
                      long long length, long long vocab, long long first, long long bins,
                      long long close) {
    allow(LocationCodec{first, static_cast<int>(bins - 1)}, tokens, lengths, mask, length, vocab,
          close);
}

__global__ void __launch_bounds__(THREADS)
parse_text_boxes(const long long* tokens, const unsigned char* pieces, float* boxes,
                 long long rows, long long length, long long width, long long vocab,
                 long long scale, long long close) {
    parse(TextCodec{pieces, width, vocab, static_cast<int>(scale)}, tokens, boxes, rows, length,
          close);
}

__global__ void __launch_bounds__(THREADS)
allowed_text_mask(const long long* tokens, const long long* lengths, const unsigned char* pieces,
                  unsigned char* mask, long long length, long long width, long long vocab,
                  long long scale, long long close) {
    allow(TextCodec{pieces, width, vocab, static_cast<int>(scale)}, tokens, lengths, mask, length,
          vocab, close);
}

}  // extern "C"
