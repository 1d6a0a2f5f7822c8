/* What the adapters of a step's tokens add to the output of one layer; see __init__.py and ../layers.py.

   Sums are float32 whatever the numbers are, rounded once when they are added to the output. Every token is computed
   by itself, so that one adapter's broken numbers reach no other token. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define BLOCK 4       /* rows, and directions, whose sums are in registers together */
#define CORE_LANES 16 /* columns of a core are a multiple, LANES in families.py */
#define SCRATCH 16384 /* numbers between input and output that a thread keeps */
#define MOST_ROWS 64
#define WORTH_THREADS (1 << 21)
#define LINE 64

enum { FLOAT32, BFLOAT16 };

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* All fields are 64 bits wide, so that NumPy arrays of integers are these. */
typedef struct {
    const uint8_t *a, *ut; /* (k, in), absent where A x is read off the output, and (k, out) */
    const float *shift;    /* (k), U'b; may be absent */
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

INLINE float number(const uint8_t *from, int kind, int64_t at) {
    float value;
    if (kind == FLOAT32) {
        memcpy(&value, from + 4 * at, 4);
    } else {
        uint16_t bits;
        memcpy(&bits, from + 2 * at, 2);
        const uint32_t wide = (uint32_t)bits << 16;
        memcpy(&value, &wide, 4);
    }
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
    const words bits = (words)value, broken = (words)(value != value);
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(halves *)(to + 2 * at) = __builtin_convertvector((broken & 0x7fc0) | (~broken & rounded), halves);
}

INLINE float sum_of(vector value) {
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float lanes[LANES], sum = 0;
    memcpy(lanes, &value, sizeof lanes);
    for (int half = LANES / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    sum = lanes[0];
    return sum;
#endif
}

/* z[row][k] = sum over i of x[row][i] a[k][i] for some rows and BLOCK directions. */
INLINE void dots(const uint8_t *const *x, int rows, const uint8_t *a, int64_t n, int kind, float *z, int64_t stride) {
    const int64_t line = n * size_of(kind);
    vector sums[BLOCK][BLOCK] = {0};
    int64_t at = 0;
#if defined(__AVX512BF16__)
    if (kind == BFLOAT16) {
        for (; at + 32 <= n; at += 32) {
            __m512bh left[BLOCK];
            for (int row = 0; row < rows; row++) left[row] = (__m512bh)_mm512_loadu_si512(x[row] + 2 * at);
            for (int k = 0; k < BLOCK; k++) {
                const __m512bh right = (__m512bh)_mm512_loadu_si512(a + k * line + 2 * at);
                for (int row = 0; row < rows; row++)
                    sums[row][k] = (vector)_mm512_dpbf16_ps((__m512)sums[row][k], left[row], right);
            }
        }
    }
#endif
    for (; at + LANES <= n; at += LANES) {
        vector left[BLOCK];
        for (int row = 0; row < rows; row++) left[row] = load(x[row], kind, at);
        for (int k = 0; k < BLOCK; k++) {
            const vector right = load(a + k * line, kind, at);
            for (int row = 0; row < rows; row++) sums[row][k] += left[row] * right;
        }
    }
    for (int row = 0; row < rows; row++) {
        for (int k = 0; k < BLOCK; k++) {
            float sum = sum_of(sums[row][k]);
            for (int64_t rest = at; rest < n; rest++) sum += number(x[row], kind, rest) * number(a + k * line, kind, rest);
            z[row * stride + k] = sum;
        }
    }
}

/* y[row] += sum over k of z[row][k] u[k], `count` registers of columns. */
INLINE void outer(uint8_t *const *y, int rows, const float *z, int64_t stride, const uint8_t *u, int64_t n, int64_t rank,
                  int kind, int64_t at, int count) {
    vector sums[BLOCK][4];
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < count; part++) sums[row][part] = load(y[row], kind, at + part * LANES);
    for (int64_t k = 0; k < rank; k++) {
        vector columns[4];
        for (int part = 0; part < count; part++) columns[part] = load(u, kind, k * n + at + part * LANES);
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < count; part++) sums[row][part] += z[row * stride + k] * columns[part];
    }
    for (int row = 0; row < rows; row++)
        for (int part = 0; part < count; part++) store(y[row], kind, at + part * LANES, sums[row][part]);
}

INLINE void outer_rest(uint8_t *y, const float *z, const uint8_t *u, int64_t n, int64_t rank, int kind, int64_t at) {
    /* by way of a register, so that rounding is written once */
    uint8_t last[4 * LANES] = {0};
    vector sums = {0};
    for (int64_t i = at; i < n; i++) {
        float sum = number(y, kind, i);
        for (int64_t k = 0; k < rank; k++) sum += z[k] * number(u, kind, k * n + i);
        sums[i - at] = sum;
    }
    store(last, kind, 0, sums);
    memcpy(y + at * size_of(kind), last, (size_t)((n - at) * size_of(kind)));
}

/* z of some rows; `from` are the rows that A x is read off. */
INLINE void inner_product(const uint8_t *const *from, int64_t rows, const uint8_t *a, int64_t n, int64_t rank, int kind,
                          float *z, int64_t stride) {
    const int64_t line = n * size_of(kind);
    for (int64_t row = 0; row < rows; row += BLOCK) {
        for (int64_t k = 0; k < rank; k += BLOCK) {
            float *to = z + row * stride + k;
            if (rows - row >= BLOCK) dots(from + row, BLOCK, a + k * line, n, kind, to, stride);
            else for (int64_t one = row; one < rows; one++, to += stride) dots(from + one, 1, a + k * line, n, kind, to, stride);
        }
    }
}

INLINE void outer_product(uint8_t *const *y, int64_t rows, const float *z, int64_t stride, const uint8_t *u, int64_t n,
                          int64_t rank, int kind) {
    int64_t at = 0;
    for (; at + 4 * LANES <= n; at += 4 * LANES) {
        int64_t row = 0;
        for (; row + BLOCK <= rows; row += BLOCK)
            outer(y + row, BLOCK, z + row * stride, stride, u, n, rank, kind, at, 4);
        for (; row < rows; row++) outer(y + row, 1, z + row * stride, stride, u, n, rank, kind, at, 4);
    }
    for (; at + LANES <= n; at += LANES)
        for (int64_t row = 0; row < rows; row++) outer(y + row, 1, z + row * stride, stride, u, n, rank, kind, at, 1);
    if (at < n)
        for (int64_t row = 0; row < rows; row++) outer_rest(y[row], z + row * stride, u, n, rank, kind, at);
}

/* t = core z, one row; the core is kept transposed, its columns padded. */
INLINE void through_core(const float *z, const uint8_t *core, int64_t rank, int kind, float *t) {
    const int64_t columns = padded(rank, CORE_LANES);
    for (int64_t at = 0; at < columns; at += LANES) {
        vector even = {0}, odd = {0};
        int64_t k = 0;
        for (; k + 2 <= rank; k += 2) {
            even += z[k] * load(core, kind, k * columns + at);
            odd += z[k + 1] * load(core, kind, (k + 1) * columns + at);
        }
        if (k < rank) even += z[k] * load(core, kind, k * columns + at);
        *(loose *)(t + at) = even + odd;
    }
}

INLINE void with_cores(const step *all, const directions *shared, const int64_t *rows, const uint8_t *const *data,
                       int64_t count, int64_t offset, int64_t rank, const int64_t *shape, const uint8_t *x, uint8_t *y,
                       int kind) {
    const int64_t out = shape[0], in = shape[1], stride = padded(rank, CORE_LANES), size = size_of(kind);
    const int64_t most = smaller(MOST_ROWS, SCRATCH / stride), bytes = rank * stride * size;
    float z[SCRATCH], t[SCRATCH];
    const uint8_t *from[MOST_ROWS];
    uint8_t *to[MOST_ROWS];
    (void)all;
    for (int64_t first = 0; first < count; first += most) {
        const int64_t some = smaller(most, count - first);
        for (int64_t row = 0; row < some; row++) {
            const uint8_t *core = data[first + row] + offset * size;
            /* each row's core lies elsewhere: the processor cannot foresee it */
            for (int64_t line = 0; line < bytes; line += LINE) __builtin_prefetch(core + line, 0, 3);
            to[row] = y + rows[first + row] * out * size;
            from[row] = shared->a ? x + rows[first + row] * in * size : to[row];
        }
        inner_product(from, some, shared->a ? shared->a : shared->ut, shared->a ? in : out, rank, kind, z, stride);
        for (int64_t row = 0; row < some; row++) {
            float *mine = z + row * stride;
            if (shared->shift)
                for (int64_t k = 0; k < rank; k++) mine[k] -= shared->shift[k];
            through_core(mine, data[first + row] + offset * size, rank, kind, t + row * stride);
        }
        outer_product(to, some, t, stride, shared->ut, out, rank, kind);
    }
}

INLINE void with_factors(const int64_t *rows, const uint8_t *const *data, int64_t count, int64_t offset, int64_t rank,
                         const int64_t *shape, const uint8_t *x, uint8_t *y, int kind) {
    const int64_t out = shape[0], in = shape[1], stride = padded(rank, CORE_LANES), size = size_of(kind);
    const int64_t most = smaller(MOST_ROWS, SCRATCH / stride);
    float z[SCRATCH];
    const uint8_t *from[MOST_ROWS];
    uint8_t *to[MOST_ROWS];
    for (int64_t first = 0; first < count;) {
        const uint8_t *a = data[first] + offset * size, *b = a + padded(rank, BLOCK) * in * size;
        int64_t some = 0;
        /* tokens under one adapter follow each other */
        for (; some < most && first + some < count && data[first + some] == data[first]; some++) {
            from[some] = x + rows[first + some] * in * size;
            to[some] = y + rows[first + some] * out * size;
        }
        inner_product(from, some, a, in, rank, kind, z, stride);
        outer_product(to, some, z, stride, b, out, rank, kind);
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
            with_cores(all, all->known + one->directions[layer], all->rows + first, all->data + first, count, offset, rank,
                       shape, x, y, kind);
        else with_factors(all->rows + first, all->data + first, count, offset, rank, shape, x, y, kind);
    }
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
    const int64_t which = thread_number(), parts = thread_count(), blocks = padded(mine->all->tokens, BLOCK) / BLOCK;
    some_tokens(mine, blocks * which / parts * BLOCK, smaller(blocks * (which + 1) / parts * BLOCK, mine->all->tokens));
}

/* Adds to y (…, out) what the adapters of the step make of x (…, in) in one layer. */
void modicum_adapt(const step *all, int64_t layer, const uint8_t *x, uint8_t *y) {
    share mine = {all, layer, x, y};
    const int64_t work = all->tokens * 16 * (all->shapes[2 * layer] + all->shapes[2 * layer + 1]);
    if (all->threads > 1 && run_parallel && all->tokens > BLOCK && work >= WORTH_THREADS)
        run_parallel(one_share, &mine, (unsigned)all->threads, 0);
    else some_tokens(&mine, 0, all->tokens);
}
