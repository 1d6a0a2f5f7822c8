/* Weights w = s (c - 2^(bits-1)) + o of packed codes c, one scale s and offset o per block; see __init__.py.

   Arithmetic is float32, the product rounded before the sum (build without contraction), and the sum rounded
   once, to nearest even, to the type of the result. With AVX-512 the up to 16 values of a block are one
   register that codes index; codes of 8 bits, and other processors, compute each weight. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WIDE 1
#include <immintrin.h>
#else
#define WIDE 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define RUN 64 /* rows that share bytes in the layout of the packed int4 kernel */
#define SPAN 2048 /* columns of a run that are transposed at a time */
#define SLICE 16 /* bytes of a column, for twice as many rows, that are transposed at a time */
#define SMALLEST 32 /* columns of the smallest group in that layout */
#define STRIDE (SPAN + 64) /* a power of two would put a column's bytes into few lines of a cache */

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* ---- number types ---- */

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float widened_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return as_float(sign | 0x7f800000u | (rest << 13));
    /* shifted into place, the exponent is 112 too small; subnormals become right too */
    return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000u)));
}

INLINE uint16_t narrowed_half(float value) {
#if defined(__FLT16_MANT_DIG__) && (defined(__F16C__) || defined(__aarch64__))
    const _Float16 half = (_Float16)value;
    uint16_t result;
    memcpy(&result, &half, 2);
    return result;
#else
    const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    /* below 2^-14 the sum with 1/2 puts the unit of a subnormal into the last bit, and rounds */
    if (size < 0x38800000u) return (uint16_t)(sign | (as_bits(as_float(size) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((size - 0x38000000u + 0xfff + ((size >> 13) & 1)) >> 13));
#endif
}

INLINE uint16_t narrowed_brain(float value) {
    const uint32_t bits = as_bits(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000u ? 0x7fc0 : rounded);
}

INLINE float number(const void *values, int kind, int64_t index) {
    if (kind == FLOAT32) return ((const float *)values)[index];
    const uint16_t bits = ((const uint16_t *)values)[index];
    return kind == BFLOAT16 ? as_float((uint32_t)bits << 16) : widened_half(bits);
}

INLINE void put(void *out, int kind, int64_t index, float value) {
    if (kind == FLOAT32) ((float *)out)[index] = value;
    if (kind == BFLOAT16) ((uint16_t *)out)[index] = narrowed_brain(value);
    if (kind == FLOAT16) ((uint16_t *)out)[index] = narrowed_half(value);
}

/* ---- weights that share a scale and an offset ---- */

/* Where codes of consecutive columns lie: in the bits from `shift` of consecutive bytes, a third bit elsewhere. */
typedef struct {
    const uint8_t *low, *high;
    int shift, high_shift;
} source;

#if WIDE

INLINE __m256i narrowed(__m512 value, int kind) {
    if (kind == FLOAT16) return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* the instruction for this would flush subnormals */
    const __m512i bits = _mm512_castps_si512(value), odd = _mm512_set1_epi32(1);
    __m512i sum = _mm512_add_epi32(bits, _mm512_and_si512(_mm512_srli_epi32(bits, 16), odd));
    sum = _mm512_srli_epi32(_mm512_add_epi32(sum, _mm512_set1_epi32(0x7fff)), 16);
    const __mmask16 broken = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(sum, broken, _mm512_set1_epi32(0x7fc0)));
}

INLINE __m512 values(__m512i codes, int bits, float scale, float offset) {
    const __m512i centred = _mm512_sub_epi32(codes, _mm512_set1_epi32(1 << (bits - 1)));
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(centred), _mm512_set1_ps(scale));
    return _mm512_add_ps(product, _mm512_set1_ps(offset));
}

/* Every value that codes below 2^bits take, repeated until the register is full. */
INLINE __m512 table_of(int bits, float scale, float offset) {
    const __m512i all = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return values(_mm512_and_si512(all, _mm512_set1_epi32((1 << bits) - 1)), bits, scale, offset);
}

/* 32 indices into a repeated table; bits above those of a code select among its copies. */
INLINE __m512i indices(source from, __m256i bytes, __m256i high, int bits) {
    const __m512i low = _mm512_srl_epi16(_mm512_cvtepu8_epi16(bytes), _mm_cvtsi32_si128(from.shift));
    if (bits != 3) return low;
    const __m512i bit = _mm512_srl_epi16(_mm512_cvtepu8_epi16(high), _mm_cvtsi32_si128(from.high_shift));
    return _mm512_ternarylogic_epi64(_mm512_set1_epi16(3), low, _mm512_slli_epi16(bit, 2), 0xca);
}

INLINE void segment_of_table(source from, int64_t count, int bits, float scale, float offset, int kind, void *out) {
    const __m512 table = table_of(bits, scale, offset);
    const __m512i narrow = _mm512_broadcast_i64x4(narrowed(table, kind == FLOAT16 ? FLOAT16 : BFLOAT16));
    int64_t at = 0;
    /* whole registers apart from the rest: stores with a mask are slow on some processors */
    for (; at + 32 <= count; at += 32) {
        __m256i bytes = _mm256_loadu_si256((const void *)(from.low + at)), high = bytes;
        if (bits == 3) high = _mm256_loadu_si256((const void *)(from.high + at));
        const __m512i index = indices(from, bytes, high, bits);
        if (kind == FLOAT32) {
            const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(index));
            const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(index, 1));
            _mm512_storeu_ps((float *)out + at, _mm512_permutexvar_ps(first, table));
            _mm512_storeu_ps((float *)out + at + 16, _mm512_permutexvar_ps(second, table));
        } else {
            _mm512_storeu_si512((uint16_t *)out + at, _mm512_permutexvar_epi16(index, narrow));
        }
    }
    if (at == count) return;
    const __mmask32 mask = ((__mmask32)1 << (count - at)) - 1;
    __m256i bytes = _mm256_maskz_loadu_epi8(mask, from.low + at), high = bytes;
    if (bits == 3) high = _mm256_maskz_loadu_epi8(mask, from.high + at);
    const __m512i index = indices(from, bytes, high, bits);
    if (kind == FLOAT32) {
        const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(index));
        const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(index, 1));
        _mm512_mask_storeu_ps((float *)out + at, (__mmask16)mask, _mm512_permutexvar_ps(first, table));
        if (mask >> 16) {
            __m512 last = _mm512_permutexvar_ps(second, table);
            _mm512_mask_storeu_ps((float *)out + at + 16, (__mmask16)(mask >> 16), last);
        }
    } else {
        _mm512_mask_storeu_epi16((uint16_t *)out + at, mask, _mm512_permutexvar_epi16(index, narrow));
    }
}

INLINE void segment_of_bytes(source from, int64_t count, float scale, float offset, int kind, void *out) {
    int64_t at = 0;
    for (; at + 16 <= count; at += 16) {
        const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(from.low + at)));
        const __m512 value = values(codes, 8, scale, offset);
        if (kind == FLOAT32) {
            _mm512_storeu_ps((float *)out + at, value);
        } else {
            _mm256_storeu_si256((void *)((uint16_t *)out + at), narrowed(value, kind));
        }
    }
    if (at == count) return;
    const __mmask16 mask = (__mmask16)((1 << (count - at)) - 1);
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from.low + at));
    const __m512 value = values(codes, 8, scale, offset);
    if (kind == FLOAT32) {
        _mm512_mask_storeu_ps((float *)out + at, mask, value);
    } else {
        _mm256_mask_storeu_epi16((uint16_t *)out + at, mask, narrowed(value, kind));
    }
}

INLINE void segment(source from, int64_t count, int bits, float scale, float offset, int kind, void *out) {
    if (bits == 8) {
        segment_of_bytes(from, count, scale, offset, kind, out);
    } else {
        segment_of_table(from, count, bits, scale, offset, kind, out);
    }
}

/* 16 bytes of each of 64 columns, which lie 32 bytes apart, as 16 rows; of 32 columns, repeated. */
INLINE void transpose(const uint8_t *from, int64_t columns, uint8_t *to) {
    __m512i a[16], b[16];
    const uint8_t *second = from + (columns < 64 ? 0 : 32 * 32);
    for (int i = 0; i < 16; i++) {
        __m512i column = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(from + 32 * i)));
        column = _mm512_inserti32x4(column, _mm_loadu_si128((const void *)(from + 32 * (i + 16))), 1);
        column = _mm512_inserti32x4(column, _mm_loadu_si128((const void *)(second + 32 * i)), 2);
        a[i] = _mm512_inserti32x4(column, _mm_loadu_si128((const void *)(second + 32 * (i + 16))), 3);
    }
    /* four times the riffle of i and i + 8 is a transposition of 16 x 16 bytes, in each quarter */
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi8(b[i], b[i + 8]);
        a[2 * i + 1] = _mm512_unpackhi_epi8(b[i], b[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(to + 2 * i * STRIDE, _mm512_unpacklo_epi8(b[i], b[i + 8]));
        _mm512_storeu_si512(to + (2 * i + 1) * STRIDE, _mm512_unpackhi_epi8(b[i], b[i + 8]));
    }
}

#else

INLINE void segment(source from, int64_t count, int bits, float scale, float offset, int kind, void *out) {
    const int mask = bits == 3 ? 3 : (1 << bits) - 1;
    for (int64_t at = 0; at < count; at++) {
        int code = (from.low[at] >> from.shift) & mask;
        if (bits == 3) code |= ((from.high[at] >> from.high_shift) & 1) << 2;
        const float product = (float)(code - (1 << (bits - 1))) * scale;
        put(out, kind, at, product + offset);
    }
}

INLINE void transpose(const uint8_t *from, int64_t columns, uint8_t *to) {
    for (int64_t column = 0; column < columns; column++) {
        for (int row = 0; row < SLICE; row++) to[row * STRIDE + column] = from[column * (RUN / 2) + row];
    }
}

#endif

/* ---- rows ---- */

typedef struct {
    const uint8_t *codes;
    const void *scales, *offsets; /* offsets may be absent */
    uint8_t *out;
    int64_t start, rows, columns, group; /* the first row of `out`, for runs; else 0 */
    int64_t repeat; /* rows that share scales; for runs, all rows there are */
    int32_t bits, scale_kind, offset_kind, out_kind, threads;
} job;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Added where there is no offset: it leaves every number as it is, -0 too. */
#define NOTHING (-0.0f)

INLINE void plane_row(const job *work, int64_t row, int bits, int kind) {
    const int64_t unit = (work->columns + 7) / 8, groups = work->columns / work->group;
    const int64_t run = bits == 3 ? unit : unit * bits, first = row / work->repeat * groups;
    const uint8_t *codes = work->codes + row * unit * bits;
    uint8_t *out = work->out + row * work->columns * (kind == FLOAT32 ? 4 : 2);
    int64_t at = 0, group = 0;
    for (int part = 0; at < work->columns; part++) {
        const int64_t start = part * run, stop = smaller(start + run, work->columns);
        while (at < stop) {
            const int64_t end = smaller((group + 1) * work->group, stop);
            const float scale = number(work->scales, work->scale_kind, first + group);
            const float offset = work->offsets ? number(work->offsets, work->offset_kind, first + group) : NOTHING;
            source from = {codes + at - start, NULL, part * bits, 0};
            if (bits == 3) {
                from.high = codes + 2 * unit + at - start;
                from.low += (part & 1) * unit;
                from.shift = part / 2 * 2;
                from.high_shift = part;
            }
            segment(from, end - at, bits, scale, offset, kind, out + at * (kind == FLOAT32 ? 4 : 2));
            at = end;
            group += at == (group + 1) * work->group;
        }
    }
}

/* Scales and offsets of some rows and the groups of some columns. */
typedef struct {
    float scale[2 * SLICE][SPAN / SMALLEST + 2], offset[2 * SLICE][SPAN / SMALLEST + 2];
} grid;

INLINE int64_t row_of(int64_t run, int first, int row) {
    return run * RUN + first + row % SLICE + row / SLICE * (RUN / 2);
}

/* They lie side by side, group by group; what bfloat16 offsets lack is in an array of its own, row by row. */
INLINE void gather(const job *work, int64_t run, int first, int64_t start, int64_t stop, grid *to) {
    const int64_t groups = work->columns / work->group, least = start / work->group;
    for (int64_t group = least; group * work->group < stop; group++) {
        const uint16_t *pairs = (const uint16_t *)work->scales + 2 * group * work->repeat;
        /* a run reads a few lines of each group, too far apart for a processor to foresee the next ones */
        for (int line = 0; first == 0 && line < 4; line++) {
            __builtin_prefetch(pairs + 2 * ((run + 1) * RUN + line * 16), 0, 3);
        }
        for (int row = 0; row < 2 * SLICE; row++) {
            const int64_t index = row_of(run, first, row);
            to->scale[row][group - least] = number(pairs, BFLOAT16, 2 * index);
            to->offset[row][group - least] = number(pairs, BFLOAT16, 2 * index + 1);
        }
    }
    for (int row = 0; work->offsets && row < 2 * SLICE; row++) {
        const float *rest = (const float *)work->offsets + row_of(run, first, row) * groups;
        for (int64_t group = least; group * work->group < stop; group++) {
            to->offset[row][group - least] += rest[group];
        }
    }
}

/* The weights of one row in the columns from `start` to `stop`; `from` has the codes of the first of them. */
INLINE void int4_row(
    const job *work, int64_t row, int64_t start, int64_t stop, source from, const grid *values, int which,
    int kind) {
    const int size = kind == FLOAT32 ? 4 : 2;
    uint8_t *out = work->out + (row * work->columns + start) * size;
    int64_t left = work->group - start % work->group;
    for (int group = 0; start < stop; group++) {
        left = smaller(left, stop - start);
        segment(from, left, 4, values->scale[which][group], values->offset[which][group], kind, out);
        out += left * size;
        from.low += left;
        start += left;
        left = work->group;
    }
}

INLINE void int4_run(const job *work, int64_t run, int kind) {
    uint8_t bytes[SLICE * STRIDE] __attribute__((aligned(64)));
    grid values;
    for (int64_t start = 0; start < work->columns; start += SPAN) {
        const int64_t stop = smaller(start + SPAN, work->columns);
        /* one slice of the bytes of all columns after the other: it stays in the nearest cache */
        for (int first = 0; first < RUN / 2; first += SLICE) {
            gather(work, run, first, start, stop, &values);
            for (int64_t at = start; at < stop; at += 64) {
                const uint8_t *from = work->codes + (run * work->columns + at) * (RUN / 2) + first;
                transpose(from, smaller(stop - at, 64), bytes + at - start);
            }
            for (int row = 0; row < 2 * SLICE; row++) {
                const source from = {bytes + row % SLICE * STRIDE, NULL, row / SLICE * 4, 0};
                int4_row(work, row_of(run, first, row) - work->start, start, stop, from, &values, row, kind);
            }
        }
    }
}

typedef void body(const job *, int64_t, int64_t);

#define ROWS(bits, kind)                                                                    \
    static void rows_##bits##_##kind(const job *work, int64_t start, int64_t stop) {        \
        for (int64_t row = start; row < stop; row++) plane_row(work, row, bits, kind);      \
    }
#define RUNS(kind)                                                                          \
    static void runs_##kind(const job *work, int64_t start, int64_t stop) {                 \
        const int64_t first = work->start / RUN;                                            \
        for (int64_t run = start; run < stop; run++) int4_run(work, first + run, kind);     \
    }
#define KINDS(bits) ROWS(bits, FLOAT32) ROWS(bits, BFLOAT16) ROWS(bits, FLOAT16)

KINDS(2)
KINDS(3)
KINDS(4)
KINDS(8)
RUNS(FLOAT32)
RUNS(BFLOAT16)
RUNS(FLOAT16)

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
    const job *work;
    body *function;
    int64_t count;
} share;

static void one_share(void *argument) {
    const share *all = (const share *)argument;
    const int64_t which = thread_number(), parts = thread_count();
    all->function(all->work, all->count * which / parts, all->count * (which + 1) / parts);
}

static void shared_out(const job *work, body *function, int64_t count) {
    share all = {work, function, count};
    if (work->threads > 1 && run_parallel) {
        run_parallel(one_share, &all, (unsigned)work->threads, 0);
    } else {
        function(work, 0, count);
    }
}

/* Rows of codes in bit planes, see modicum.ops.affine.pack; 0, or 1 for arguments that are not known. */
int modicum_rows(const job *work) {
    static body *const table[4][3] = {
        {rows_2_FLOAT32, rows_2_BFLOAT16, rows_2_FLOAT16},
        {rows_3_FLOAT32, rows_3_BFLOAT16, rows_3_FLOAT16},
        {rows_4_FLOAT32, rows_4_BFLOAT16, rows_4_FLOAT16},
        {rows_8_FLOAT32, rows_8_BFLOAT16, rows_8_FLOAT16},
    };
    const int which = work->bits == 8 ? 3 : work->bits - 2;
    if (which < 0 || which > 3 || work->out_kind < FLOAT32 || work->out_kind > FLOAT16) return 1;
    shared_out(work, table[which][work->out_kind], work->rows);
    return 0;
}

/* Runs of 64 rows in the layout of the packed int4 kernel, see modicum.quant.int4pack. */
int modicum_runs(const job *work) {
    static body *const table[3] = {runs_FLOAT32, runs_BFLOAT16, runs_FLOAT16};
    if (work->out_kind < FLOAT32 || work->out_kind > FLOAT16 || work->rows % RUN || work->group < SMALLEST) return 1;
    shared_out(work, table[work->out_kind], work->rows / RUN);
    return 0;
}
