/* What the adapters of a step's tokens add to the output of one layer; see __init__.py and ../layers.py.

   Sums are float32 whatever the numbers are, rounded where a product ends. Every token is computed by itself, so that
   one adapter's broken numbers reach no other token. A word is a float32, or two neighbouring bfloat16: matrices are
   kept such that the words that are multiplied with one word of x lie side by side (`Packing` in families.py). */

#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16
#define MANY 16 /* rows whose sums are in registers together */
#else
#define LANES 8
#define MANY 4
#endif
#define STRIP 16 /* directions are padded to a multiple: LANES in families.py */
#define VECTORS (STRIP / LANES)
#define WORD 4
#define SCRATCH 16384 /* words of what is between input and output that a thread keeps */
#define MOST_ROWS 64
#define WORTH_THREADS (1 << 21)
#define LINE 64

enum { FLOAT32, BFLOAT16 };

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint32_t loose_words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* All fields are 64 bits wide, so that NumPy arrays of integers are these. */
typedef struct {
    const uint8_t *inner, *outer; /* what A x is read with, and U */
    const float *shift;           /* (k), U'b; may be absent */
    int64_t line, from_output;    /* directions there are, and whether A x is read off the output */
} directions;

/* Tokens whose adapters are of one family; per layer of the model the offset, rank and directions of its numbers. */
typedef struct {
    const int64_t *offsets, *ranks, *directions;
    int64_t shared, start, count;
} run;

typedef struct {
    const run *runs;
    const int64_t *rows;        /* the token's row in the input and the output */
    const uint8_t *const *data; /* the token's adapter */
    const directions *known;
    const int64_t *shapes; /* (layers, 2): out, in */
    int64_t layers, count, tokens, kind, threads;
} step;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t padded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
INLINE int64_t size_of(int kind) { return kind == FLOAT32 ? 4 : 2; }
INLINE int64_t words_of(int64_t numbers, int kind) { return kind == FLOAT32 ? numbers : (numbers + 1) / 2; }

INLINE float number(const uint8_t *from, int kind, int64_t at) {
    uint32_t bits = 0;
    if (kind == FLOAT32) memcpy(&bits, from + 4 * at, 4);
    else memcpy((uint8_t *)&bits + 2, from + 2 * at, 2);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vector load(const uint8_t *from, int kind, int64_t at) {
    if (kind == FLOAT32) return *(const loose *)(from + 4 * at);
    return (vector)(__builtin_convertvector(*(const halves *)(from + 2 * at), words) << 16);
}

/* Nearest even; what is no number stays none. */
INLINE void store(uint8_t *to, int kind, int64_t at, vector value) {
    if (kind == FLOAT32) {
        *(loose *)(to + 4 * at) = value;
        return;
    }
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((void *)(to + 2 * at), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
    const words bits = (words)value, broken = (words)(value != value);
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(halves *)(to + 2 * at) = __builtin_convertvector((broken & 0x7fc0) | (~broken & rounded), halves);
#endif
}

/* sum + x w in every lane, for one word of x. */
INLINE vector plus(vector sum, uint32_t x, const uint8_t *w, int kind) {
    if (kind == FLOAT32) {
        float factor;
        memcpy(&factor, &x, 4);
        return sum + factor * *(const loose *)w;
    }
#if defined(__AVX512BF16__)
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)_mm512_loadu_si512(w));
#else
    const words pair = *(const loose_words *)w;
    const uint32_t high = x & 0xffff0000u, low = x << 16;
    float first, second;
    memcpy(&first, &low, 4);
    memcpy(&second, &high, 4);
    sum += first * (vector)(pair << 16);
    return sum + second * (vector)(pair & 0xffff0000u);
#endif
}

INLINE uint32_t word(const uint8_t *from, int64_t at) {
    uint32_t value;
    memcpy(&value, from + WORD * at, WORD);
    return value;
}

/* One strip of z for some rows: z[row] = sum over words of x[row] times `inner`, minus `shift`. Few rows have several
   sums each, or every product would wait for the one before. */
INLINE void strip_of(const uint8_t *const *x, int rows, int sums_each, const uint8_t *inner, int64_t line, int64_t n,
                     const float *shift, int kind, uint8_t *z, int64_t stride) {
    const int64_t count = n * size_of(kind) / WORD;
    vector sums[MANY][VECTORS * 4] = {0};
    int64_t at = 0;
    for (; at + sums_each <= count; at += sums_each)
        for (int each = 0; each < sums_each; each++)
            for (int part = 0; part < VECTORS; part++)
                for (int row = 0; row < rows; row++) {
                    vector *sum = &sums[row][each * VECTORS + part];
                    *sum = plus(*sum, word(x[row], at + each), inner + WORD * ((at + each) * line + part * LANES), kind);
                }
    for (; at < words_of(n, kind); at++)
        for (int row = 0; row < rows; row++) {
            uint32_t last = 0;
            memcpy(&last, x[row] + WORD * at, (size_t)smaller(WORD, n * size_of(kind) - WORD * at));
            for (int part = 0; part < VECTORS; part++)
                sums[row][part] = plus(sums[row][part], last, inner + WORD * (at * line + part * LANES), kind);
        }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < VECTORS; part++) {
            vector sum = sums[row][part];
            for (int each = 1; each < sums_each; each++) sum += sums[row][each * VECTORS + part];
            if (shift) sum -= *(const loose *)(shift + part * LANES);
            store(z + row * stride, kind, part * LANES, sum);
        }
}

INLINE void inner_product(const uint8_t *const *x, int64_t rows, const uint8_t *inner, int64_t line, int64_t n,
                          int64_t rank, const float *shift, int kind, uint8_t *z, int64_t stride) {
    for (int64_t strip = 0; strip < rank; strip += STRIP) {
        const uint8_t *w = inner + WORD * strip;
        const float *s = shift ? shift + strip : 0;
        uint8_t *to = z + strip * size_of(kind);
        int64_t row = 0;
        for (; row + MANY <= rows; row += MANY)
            strip_of(x + row, MANY, 1, w, line, n, s, kind, to + row * stride, stride);
        for (; row + 4 <= rows; row += 4) strip_of(x + row, 4, 2, w, line, n, s, kind, to + row * stride, stride);
        for (; row < rows; row++) strip_of(x + row, 1, 4, w, line, n, s, kind, to + row * stride, stride);
    }
}

/* y[row] += z[row] times `outer`, `count` registers of columns. */
INLINE void columns_of(uint8_t *const *y, int rows, const uint8_t *z, int64_t stride, const uint8_t *outer, int64_t n,
                       int64_t depth, int kind, int64_t at, int count) {
    vector sums[4][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < count; part++) sums[row][part] = load(y[row], kind, at + part * LANES);
    for (int64_t k = 0; k < depth; k++)
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < count; part++) {
                const uint8_t *w = outer + WORD * (k * n + at + part * LANES);
                sums[row][part] = plus(sums[row][part], word(z + row * stride, k), w, kind);
            }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < count; part++) store(y[row], kind, at + part * LANES, sums[row][part]);
}

/* What is left over of whole registers goes by way of memory. */
INLINE void last_columns(uint8_t *y, const uint8_t *z, const uint8_t *outer, int64_t n, int64_t depth, int kind, int64_t at) {
    uint8_t rest[4 * LANES] = {0}, column[WORD * LANES] = {0};
    const size_t bytes = (size_t)((n - at) * size_of(kind));
    memcpy(rest, y + at * size_of(kind), bytes);
    vector sum = load(rest, kind, 0);
    for (int64_t k = 0; k < depth; k++) {
        memcpy(column, outer + WORD * (k * n + at), (size_t)(WORD * (n - at)));
        sum = plus(sum, word(z, k), column, kind);
    }
    store(rest, kind, 0, sum);
    memcpy(y + at * size_of(kind), rest, bytes);
}

INLINE void outer_product(uint8_t *const *y, int64_t rows, const uint8_t *z, int64_t stride, const uint8_t *outer,
                          int64_t n, int64_t rank, int kind) {
    const int64_t depth = words_of(rank, kind);
    int64_t at = 0;
    for (; at + 4 * LANES <= n; at += 4 * LANES) {
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) columns_of(y + row, 4, z + row * stride, stride, outer, n, depth, kind, at, 4);
        for (; row < rows; row++) columns_of(y + row, 1, z + row * stride, stride, outer, n, depth, kind, at, 4);
    }
    for (; at + LANES <= n; at += LANES)
        for (int64_t row = 0; row < rows; row++)
            columns_of(y + row, 1, z + row * stride, stride, outer, n, depth, kind, at, 1);
    if (at < n)
        for (int64_t row = 0; row < rows; row++) last_columns(y[row], z + row * stride, outer, n, depth, kind, at);
}

/* t = core z, one row. */
INLINE void through_core(const uint8_t *z, const uint8_t *core, int64_t rank, int kind, uint8_t *t) {
    const int64_t line = padded(rank, STRIP), depth = words_of(rank, kind);
    for (int64_t at = 0; at < line; at += LANES) {
        vector even = {0}, odd = {0};
        for (int64_t k = 0; k + 2 <= depth; k += 2) {
            even = plus(even, word(z, k), core + WORD * (k * line + at), kind);
            odd = plus(odd, word(z, k + 1), core + WORD * ((k + 1) * line + at), kind);
        }
        if (depth % 2) even = plus(even, word(z, depth - 1), core + WORD * ((depth - 1) * line + at), kind);
        store(t, kind, at, even + odd);
    }
}

INLINE void with_cores(const directions *shared, const int64_t *rows, const uint8_t *const *data, int64_t count,
                       int64_t offset, int64_t rank, const int64_t *shape, const uint8_t *x, uint8_t *y, int kind) {
    const int64_t out = shape[0], in = shape[1], size = size_of(kind), stride = padded(rank, STRIP) * size;
    const int64_t most = smaller(MOST_ROWS, WORD * SCRATCH / stride), bytes = words_of(rank, kind) * padded(rank, STRIP) * WORD;
    uint32_t between[2][SCRATCH];
    uint8_t *z = (uint8_t *)between[0], *t = (uint8_t *)between[1];
    const uint8_t *from[MOST_ROWS];
    uint8_t *to[MOST_ROWS];
    for (int64_t first = 0; first < count; first += most) {
        const int64_t some = smaller(most, count - first);
        for (int64_t row = 0; row < some; row++) {
            /* each row's core lies elsewhere: the processor cannot foresee it */
            const uint8_t *core = data[first + row] + offset * size;
            for (int64_t line = 0; line < bytes; line += LINE) __builtin_prefetch(core + line, 0, 3);
            to[row] = y + rows[first + row] * out * size;
            from[row] = shared->from_output ? to[row] : x + rows[first + row] * in * size;
        }
        inner_product(from, some, shared->inner, shared->line, shared->from_output ? out : in, rank, shared->shift, kind, z,
                      stride);
        for (int64_t row = 0; row < some; row++)
            through_core(z + row * stride, data[first + row] + offset * size, rank, kind, t + row * stride);
        outer_product(to, some, t, stride, shared->outer, out, rank, kind);
    }
}

INLINE void with_factors(const int64_t *rows, const uint8_t *const *data, int64_t count, int64_t offset, int64_t rank,
                         const int64_t *shape, const uint8_t *x, uint8_t *y, int kind) {
    const int64_t out = shape[0], in = shape[1], size = size_of(kind), stride = padded(rank, STRIP) * size;
    const int64_t most = smaller(MOST_ROWS, WORD * SCRATCH / stride);
    uint32_t between[SCRATCH];
    const uint8_t *from[MOST_ROWS];
    uint8_t *to[MOST_ROWS], *z = (uint8_t *)between;
    for (int64_t first = 0; first < count;) {
        const uint8_t *inner = data[first] + offset * size;
        const uint8_t *outer = inner + words_of(in, kind) * padded(rank, STRIP) * WORD;
        int64_t some = 0;
        /* tokens under one adapter follow each other */
        for (; some < most && first + some < count && data[first + some] == data[first]; some++) {
            from[some] = x + rows[first + some] * in * size;
            to[some] = y + rows[first + some] * out * size;
        }
        inner_product(from, some, inner, padded(rank, STRIP), in, rank, 0, kind, z, stride);
        outer_product(to, some, z, stride, outer, out, rank, kind);
        first += some;
    }
}

/* Tokens from `start` to `stop`, in the order of `rows`. */
INLINE void tokens_of(const step *all, int64_t layer, const uint8_t *x, uint8_t *y, int64_t start, int64_t stop, int kind) {
    const int64_t *shape = all->shapes + 2 * layer;
    for (int64_t which = 0; which < all->count; which++) {
        const run *one = all->runs + which;
        const int64_t rank = one->ranks[layer], offset = one->offsets[layer];
        const int64_t first = one->start > start ? one->start : start;
        const int64_t count = smaller(one->start + one->count, stop) - first;
        if (!rank || count <= 0) continue;
        if (one->shared)
            with_cores(all->known + one->directions[layer], all->rows + first, all->data + first, count, offset, rank, shape, x,
                       y, kind);
        else with_factors(all->rows + first, all->data + first, count, offset, rank, shape, x, y, kind);
    }
}

/* A row of the pool: numbers of a record from the places where they lie, scaled; and whether all of them are finite. */
INLINE int row_of(const uint8_t *from, int from_kind, const int32_t *places, const float *scales, int64_t count, uint8_t *to,
                  int kind) {
    const vector nothing = {0};
    words broken = {0};
    for (int64_t at = 0; at < count; at += LANES) {
        vector values;
        for (int lane = 0; lane < LANES; lane++) values[lane] = number(from, from_kind, places[at + lane]);
        store(to, kind, at, values * *(const loose *)(scales + at));
        const vector kept = load(to, kind, at);
        broken |= (words)(kept - kept != nothing);
    }
    int finite = 1;
    for (int lane = 0; lane < LANES; lane++) finite &= !broken[lane];
    return finite;
}

/* The same for each pair of types; `count` is a multiple of STRIP. */
int64_t modicum_fill(const uint8_t *from, int64_t from_kind, const int32_t *places, const float *scales, int64_t count,
                     uint8_t *to, int64_t kind) {
    if (kind == FLOAT32)
        return from_kind == FLOAT32 ? row_of(from, FLOAT32, places, scales, count, to, FLOAT32)
                                    : row_of(from, BFLOAT16, places, scales, count, to, FLOAT32);
    return from_kind == FLOAT32 ? row_of(from, FLOAT32, places, scales, count, to, BFLOAT16)
                                : row_of(from, BFLOAT16, places, scales, count, to, BFLOAT16);
}

/* ---- threads: those of the OpenMP runtime that the caller already uses ---- */

typedef void parallel(void (*)(void *), void *, unsigned, unsigned);
typedef int ordinal(void);

static parallel *run_parallel;
static ordinal *thread_number, *thread_count;

void modicum_use_threads(parallel *run, ordinal *which, ordinal *count) {
    run_parallel = run;
    thread_number = which;
    thread_count = count;
}

typedef struct {
    const step *all;
    int64_t layer;
    const uint8_t *x;
    uint8_t *y;
} share;

static void float32_tokens(const share *mine, int64_t start, int64_t stop) {
    tokens_of(mine->all, mine->layer, mine->x, mine->y, start, stop, FLOAT32);
}

static void bfloat16_tokens(const share *mine, int64_t start, int64_t stop) {
    tokens_of(mine->all, mine->layer, mine->x, mine->y, start, stop, BFLOAT16);
}

static void some_tokens(const share *mine, int64_t start, int64_t stop) {
    if (mine->all->kind == FLOAT32) float32_tokens(mine, start, stop);
    else bfloat16_tokens(mine, start, stop);
}

static void one_share(void *argument) {
    const share *mine = (const share *)argument;
    const int64_t which = thread_number(), parts = thread_count(), blocks = padded(mine->all->tokens, 4) / 4;
    some_tokens(mine, blocks * which / parts * 4, smaller(blocks * (which + 1) / parts * 4, mine->all->tokens));
}

/* Adds to y (…, out) what the adapters of the step make of x (…, in) in one layer. */
void modicum_adapt(const step *all, int64_t layer, const uint8_t *x, uint8_t *y) {
    share mine = {all, layer, x, y};
    const int64_t work = all->tokens * 16 * (all->shapes[2 * layer] + all->shapes[2 * layer + 1]);
    if (all->threads > 1 && run_parallel && all->tokens > 4 && work >= WORTH_THREADS)
        run_parallel(one_share, &mine, (unsigned)all->threads, 0);
    else some_tokens(&mine, 0, all->tokens);
}
