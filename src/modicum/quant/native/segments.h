/* Weights that share a scale and an offset, for each kind of processor.

   Arithmetic is float32, the product rounded before the sum (build without contraction), and the sum rounded
   once, to nearest even, to the type of the result. The up to 16 values of a block are a table, with AVX-512
   and AVX2 in registers that codes index; codes of 8 bits compute each weight. */

#ifndef MODICUM_SEGMENTS
#define MODICUM_SEGMENTS

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WIDE 1
#else
#define WIDE 0
#endif
#if WIDE || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define RUN 64 /* rows that share bytes in the layout of the packed int4 kernel */
#define SPAN 2048 /* columns of a run that are transposed at a time */
#define SLICE 16 /* bytes of a column, for twice as many rows, that are transposed at a time */
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

/* 32 weights by index into a repeated table; bits above those of a code select among its copies. */
INLINE void look_up(
    source from, __m256i bytes, __m256i high, int bits, __m512 table, __m512i narrow, int kind, void *to) {
    __m512i index = _mm512_srl_epi16(_mm512_cvtepu8_epi16(bytes), _mm_cvtsi32_si128(from.shift));
    if (bits == 3) {
        const __m512i bit = _mm512_srl_epi16(_mm512_cvtepu8_epi16(high), _mm_cvtsi32_si128(from.high_shift));
        index = _mm512_ternarylogic_epi64(_mm512_set1_epi16(3), index, _mm512_slli_epi16(bit, 2), 0xca);
    }
    if (kind == FLOAT32) {
        const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(index));
        const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(index, 1));
        _mm512_storeu_ps(to, _mm512_permutexvar_ps(first, table));
        _mm512_storeu_ps((float *)to + 16, _mm512_permutexvar_ps(second, table));
    } else {
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, narrow));
    }
}

/* What is left over after whole registers goes by way of memory: stores with a mask are slow on some processors. */
INLINE void segment_of_table(
    source from, int64_t count, int bits, float scale, float offset, int kind, void *out) {
    const __m512 table = table_of(bits, scale, offset);
    const __m512i narrow = _mm512_broadcast_i64x4(narrowed(table, kind == FLOAT16 ? FLOAT16 : BFLOAT16));
    const int size = kind == FLOAT32 ? 4 : 2;
    int64_t at = 0;
    for (; at + 32 <= count; at += 32) {
        const __m256i bytes = _mm256_loadu_si256((const void *)(from.low + at));
        const __m256i high = bits == 3 ? _mm256_loadu_si256((const void *)(from.high + at)) : bytes;
        look_up(from, bytes, high, bits, table, narrow, kind, (uint8_t *)out + at * size);
    }
    if (at == count) return;
    uint8_t rest[128];
    const __mmask32 mask = ((__mmask32)1 << (count - at)) - 1;
    const __m256i bytes = _mm256_maskz_loadu_epi8(mask, from.low + at);
    const __m256i high = bits == 3 ? _mm256_maskz_loadu_epi8(mask, from.high + at) : bytes;
    look_up(from, bytes, high, bits, table, narrow, kind, rest);
    memcpy((uint8_t *)out + at * size, rest, (size_t)((count - at) * size));
}

INLINE void compute(__m128i bytes, float scale, float offset, int kind, void *to) {
    const __m512 value = values(_mm512_cvtepu8_epi32(bytes), 8, scale, offset);
    if (kind == FLOAT32) {
        _mm512_storeu_ps(to, value);
    } else {
        _mm256_storeu_si256(to, narrowed(value, kind));
    }
}

INLINE void segment_of_bytes(source from, int64_t count, float scale, float offset, int kind, void *out) {
    const int size = kind == FLOAT32 ? 4 : 2;
    int64_t at = 0;
    for (; at + 16 <= count; at += 16) {
        const __m128i bytes = _mm_loadu_si128((const void *)(from.low + at));
        compute(bytes, scale, offset, kind, (uint8_t *)out + at * size);
    }
    if (at == count) return;
    uint8_t rest[64];
    const __mmask16 mask = (__mmask16)((1 << (count - at)) - 1);
    compute(_mm_maskz_loadu_epi8(mask, from.low + at), scale, offset, kind, rest);
    memcpy((uint8_t *)out + at * size, rest, (size_t)((count - at) * size));
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

INLINE int code_at(source from, int64_t at, int bits) {
    const int code = (from.low[at] >> from.shift) & (bits == 3 ? 3 : (1 << bits) - 1);
    return bits == 3 ? code | ((from.high[at] >> from.high_shift) & 1) << 2 : code;
}

#if defined(__AVX2__)

/* Results of 16 bits, as many as fill registers; how many they were. */
INLINE int64_t shuffled(source from, int64_t count, int bits, const uint16_t *table, uint16_t *out) {
    /* bytes are what can be looked up, so each half of a number by itself */
    const __m128i a8 = _mm_loadu_si128((const void *)table), b8 = _mm_loadu_si128((const void *)(table + 8));
    const __m128i byte = _mm_set1_epi16(255);
    const __m128i lows = _mm_packus_epi16(_mm_and_si128(a8, byte), _mm_and_si128(b8, byte));
    const __m128i highs = _mm_packus_epi16(_mm_srli_epi16(a8, 8), _mm_srli_epi16(b8, 8));
    const __m256i low = _mm256_broadcastsi128_si256(lows), high = _mm256_broadcastsi128_si256(highs);
    const __m256i mask = _mm256_set1_epi8(bits == 3 ? 3 : (1 << bits) - 1);
    int64_t at = 0;
    for (; at + 32 <= count; at += 32) {
        __m256i index = _mm256_loadu_si256((const void *)(from.low + at));
        index = _mm256_and_si256(_mm256_srl_epi16(index, _mm_cvtsi32_si128(from.shift)), mask);
        if (bits == 3) {
            __m256i bit = _mm256_loadu_si256((const void *)(from.high + at));
            bit = _mm256_and_si256(_mm256_srl_epi16(bit, _mm_cvtsi32_si128(from.high_shift)), _mm256_set1_epi8(1));
            index = _mm256_or_si256(index, _mm256_slli_epi16(bit, 2));
        }
        const __m256i below = _mm256_shuffle_epi8(low, index), above = _mm256_shuffle_epi8(high, index);
        const __m256i a = _mm256_unpacklo_epi8(below, above), b = _mm256_unpackhi_epi8(below, above);
        _mm256_storeu_si256((void *)(out + at), _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256((void *)(out + at + 16), _mm256_permute2x128_si256(a, b, 0x31));
    }
    return at;
}

#else

INLINE int64_t shuffled(source from, int64_t count, int bits, const uint16_t *table, uint16_t *out) {
    (void)from, (void)count, (void)bits, (void)table, (void)out;
    return 0;
}

#endif

INLINE void segment(source from, int64_t count, int bits, float scale, float offset, int kind, void *out) {
    int64_t at = 0;
    if (bits < 8 && kind != FLOAT32 && count >= 32) {
        uint16_t table[16];
        for (int code = 0; code < 16; code++) {
            const float product = (float)((code & ((1 << bits) - 1)) - (1 << (bits - 1))) * scale;
            put(table, kind, code, product + offset);
        }
        at = shuffled(from, count, bits, table, (uint16_t *)out);
        for (; kind == FLOAT16 && at < count; at++) ((uint16_t *)out)[at] = table[code_at(from, at, bits)];
    }
    for (; at < count; at++) {
        const float product = (float)(code_at(from, at, bits) - (1 << (bits - 1))) * scale;
        put(out, kind, at, product + offset);
    }
}

INLINE void transpose(const uint8_t *from, int64_t columns, uint8_t *to) {
    for (int64_t column = 0; column < columns; column++) {
        for (int row = 0; row < SLICE; row++) to[row * STRIDE + column] = from[column * (RUN / 2) + row];
    }
}

#endif

#endif
