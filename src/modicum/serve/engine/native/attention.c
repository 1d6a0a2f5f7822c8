/* Attention of single query tokens over keys and values where they lie in the cache; see ../attention.py.

   out = sum over t of softmax(scale q k_t) v_t, for every query head over the keys of its group's head. Sums are
   float32 whatever the numbers are. Keys, then values, are read once, in the order in which they lie, for all heads
   together; each query by itself, so that one request's broken numbers reach no other. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 8
#define BLOCK 8 /* tokens whose values are summed up before the sums leave the registers */
#define WORTH_THREADS (1 << 16)

enum { FLOAT32, BFLOAT16 };

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* All fields are 64 bits wide, so that a NumPy array of integers is this. */
typedef struct {
    const uint8_t *q, *k, *v;
    uint8_t *out;
    const int64_t *rows;    /* where each key and value lies */
    const int64_t *queries; /* (count, 3): the query's token, its first place in rows, how many it looks at */
    int64_t count, longest, heads, groups, size, q_token, q_head, row, kind, threads, total;
    double scale;
} job;

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
    float lanes[LANES];
    memcpy(lanes, &value, sizeof lanes);
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

/* e^x for x <= 0 to about one unit in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, e^r by its series. */
INLINE vector exponential(vector x) {
    const vector lowest = (vector){} - 87.0f;
    const integers small = x < lowest;
    x = (vector)(((words)lowest & (words)small) | ((words)x & ~(words)small));
    const integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, integers);
    const vector whole = __builtin_convertvector(n, vector);
    const vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vector sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = (sum * r + 1.0f) * r + 1.0f;
    return sum * (vector)((n + 127) << 23);
}

#if defined(__AVX512F__) && defined(__AVX512BF16__)
/* The same in bfloat16 for heads of a multiple of 32: products of pairs in one instruction, q as it is. */
INLINE void scored_pairs(
    const job *work, const uint8_t *q, const int64_t *rows, int64_t keys, float *scores, int64_t stride) {
    const int64_t size = work->size, each = work->heads / work->groups;
    for (int64_t t = 0; t < keys; t++) {
        const uint8_t *key = work->k + 2 * work->row * rows[t];
        for (int64_t head = 0; head < work->heads; head++) {
            const uint8_t *left = q + 2 * head * work->q_head, *right = key + 2 * (head / each) * size;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t at = 0; at < 2 * size; at += 64)
                sum = _mm512_dpbf16_ps(
                    sum, (__m512bh)_mm512_loadu_si512(left + at), (__m512bh)_mm512_loadu_si512(right + at));
            scores[head * stride + t] = _mm512_reduce_add_ps(sum) * (float)work->scale;
        }
    }
}
#endif

/* scores[head][t] for all heads and keys; a head's scores are `stride` apart. */
INLINE void scored(
    const job *work, const float *q, const int64_t *rows, int64_t keys, float *scores, int64_t stride, int kind) {
    const int64_t size = work->size, each = work->heads / work->groups;
    const int64_t bytes = kind == FLOAT32 ? 4 : 2;
    for (int64_t t = 0; t < keys; t++) {
        const uint8_t *key = work->k + bytes * work->row * rows[t];
        for (int64_t group = 0; group < work->groups; group++)
            for (int64_t head = group * each; head < (group + 1) * each; head++) {
                vector sum = {0};
                for (int64_t at = 0; at < size; at += LANES)
                    sum += *(const loose *)(q + head * size + at) * load(key, kind, group * size + at);
                scores[head * stride + t] = sum_of(sum);
            }
    }
}

/* A head's scores become their exponentials, in place; 1 / their sum. */
INLINE float weighed(float *scores, int64_t keys) {
    const int64_t whole = (keys + LANES - 1) / LANES * LANES;
    for (int64_t t = keys; t < whole; t++) scores[t] = -__builtin_inff();
    vector highest = *(const loose *)scores;
    for (int64_t t = LANES; t < whole; t += LANES) {
        const vector next = *(const loose *)(scores + t);
        const words above = (words)(next > highest);
        highest = (vector)(((words)next & above) | ((words)highest & ~above));
    }
    float most = highest[0];
    for (int lane = 1; lane < LANES; lane++) most = highest[lane] > most ? highest[lane] : most;
    vector sum = {0};
    for (int64_t t = 0; t < whole; t += LANES) {
        const vector share = exponential(*(const loose *)(scores + t) - most);
        *(loose *)(scores + t) = share;
        sum += share;
    }
    /* a share behind the keys is not 0, but as small as a float can be */
    return 1.0f / sum_of(sum);
}

#if defined(__AVX512F__)
#define WIDE 16
#else
#define WIDE LANES
#endif
typedef float wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint32_t wide_words __attribute__((vector_size(4 * WIDE)));
typedef uint16_t wide_halves __attribute__((vector_size(2 * WIDE), aligned(2), may_alias));

INLINE wide load_wide(const uint8_t *from, int kind, int64_t at) {
    if (kind == FLOAT32) return *(const wide *)(from + 4 * at);
    return (wide)(__builtin_convertvector(*(const wide_halves *)(from + 2 * at), wide_words) << 16);
}

/* sums[head] += the sum over t of shares[head][t] v_t; few values at a time, for all heads, while they are near. */
INLINE void summed(
    const job *work, const float *shares, int64_t stride, const int64_t *rows, int64_t keys, float *sums, int kind) {
    const int64_t size = work->size, each = work->heads / work->groups;
    const int64_t bytes = kind == FLOAT32 ? 4 : 2;
    for (int64_t first = 0; first < keys; first += BLOCK) {
        const int64_t count = keys - first < BLOCK ? keys - first : BLOCK;
        const uint8_t *value[BLOCK];
        for (int64_t t = 0; t < count; t++) value[t] = work->v + bytes * work->row * rows[first + t];
        for (int64_t head = 0; head < work->heads; head++) {
            const float *share = shares + head * stride + first;
            const int64_t from = head / each * size;
            float *to = sums + head * size;
            int64_t at = 0;
            for (; at + WIDE <= size; at += WIDE) {
                wide sum = *(const wide *)(to + at);
                for (int64_t t = 0; t < count; t++) sum += share[t] * load_wide(value[t], kind, from + at);
                *(wide *)(to + at) = sum;
            }
            for (; at < size; at += LANES) {
                vector sum = *(const loose *)(to + at);
                for (int64_t t = 0; t < count; t++) sum += share[t] * load(value[t], kind, from + at);
                *(loose *)(to + at) = sum;
            }
        }
    }
}

INLINE void attend(const job *work, int64_t which, float *scratch, int64_t stride, int kind) {
    const int64_t token = work->queries[3 * which], keys = work->queries[3 * which + 2];
    const int64_t *rows = work->rows + work->queries[3 * which + 1], size = work->size, width = work->heads * size;
    const int64_t bytes = kind == FLOAT32 ? 4 : 2;
    float *q = scratch, *sums = scratch + width, *scores = scratch + 2 * width;
    for (int64_t head = 0; head < work->heads; head++) {
        const uint8_t *from = work->q + bytes * (token * work->q_token + head * work->q_head);
        for (int64_t at = 0; at < size; at += LANES)
            *(loose *)(q + head * size + at) = load(from, kind, at) * (float)work->scale;
    }
    memset(sums, 0, sizeof(float) * (size_t)width);
#if defined(__AVX512F__) && defined(__AVX512BF16__)
    if (kind == BFLOAT16 && size % 32 == 0)
        scored_pairs(work, work->q + bytes * token * work->q_token, rows, keys, scores, stride);
    else
#endif
        scored(work, q, rows, keys, scores, stride, kind);
    for (int64_t head = 0; head < work->heads; head++) {
        const float inverse = weighed(scores + head * stride, keys);
        for (int64_t t = 0; t < keys; t++) scores[head * stride + t] *= inverse;
    }
    summed(work, scores, stride, rows, keys, sums, kind);
    uint8_t *to = work->out + bytes * token * width;
    for (int64_t at = 0; at < width; at += LANES) store(to, kind, at, *(const loose *)(sums + at));
}

static int some(const job *work, int64_t first, int64_t last) {
    const int64_t stride = (work->longest + LANES - 1) / LANES * LANES, width = work->heads * work->size;
    float *scratch = malloc(sizeof(float) * (size_t)(2 * width + work->heads * stride));
    if (!scratch) return 1;
    for (int64_t which = first; which < last; which++) {
        if (work->kind == FLOAT32) attend(work, which, scratch, stride, FLOAT32);
        else attend(work, which, scratch, stride, BFLOAT16);
    }
    free(scratch);
    return 0;
}

/* ---- threads of a runtime that the caller has, see build.py ---- */

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
    const job *work;
    int failed;
} share;

static void one_share(void *argument) {
    share *all = argument;
    const int64_t which = thread_number(), parts = thread_count(), count = all->work->count;
    if (some(all->work, count * which / parts, count * (which + 1) / parts)) all->failed = 1;
}

/* All queries; 0, or 1 without memory. */
int modicum_attend(const job *work) {
    share all = {work, 0};
    if (work->threads > 1 && run_parallel && work->total * work->row >= WORTH_THREADS)
        run_parallel(one_share, &all, (unsigned)work->threads, 0);
    else
        all.failed = some(work, 0, work->count);
    return all.failed;
}
