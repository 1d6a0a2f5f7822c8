/* Weights w = s (c - 2^(bits-1)) + o of packed codes c, one scale s and offset o per block,
   and sums and copies of neighbours; see __init__.py. */

#include "segments.h"

#define SMALLEST 32 /* columns of the smallest group in that layout */

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

/* ---- what bfloat16 offsets lack, for few rows of inputs ---- */

#define MOST_GROUPS 1024
#define LANES 16 /* sums side by side, which compilers may not introduce themselves */

INLINE float added(const float *lanes) {
    float eight[8], four[4];
    for (int lane = 0; lane < 8; lane++) eight[lane] = lanes[lane] + lanes[lane + 8];
    for (int lane = 0; lane < 4; lane++) four[lane] = eight[lane] + eight[lane + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

/* Adds (sums of the inputs of each group) x (remainders, row by row) to some columns of the bfloat16 result. */
static void remainder_columns(const job *work, int64_t start, int64_t stop) {
    const int64_t groups = work->columns / work->group;
    const float *rest = (const float *)work->offsets;
    float sums[MOST_GROUPS];
    for (int64_t row = 0; row < work->repeat; row++) {
        const uint16_t *x = (const uint16_t *)work->codes + row * work->columns;
        uint16_t *y = (uint16_t *)work->out + row * work->rows;
        for (int64_t group = 0; group < groups; group++) {
            float lanes[LANES] = {0};
            for (int64_t at = group * work->group; at < (group + 1) * work->group; at += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += as_float((uint32_t)x[at + lane] << 16);
            sums[group] = added(lanes);
        }
        for (int64_t column = start; column < stop; column++) {
            const float *mine = rest + column * groups;
            float lanes[LANES] = {0};
            int64_t group = 0;
            for (; group + LANES <= groups; group += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += sums[group + lane] * mine[group + lane];
            for (int lane = 0; group + lane < groups; lane++) lanes[lane] += sums[group + lane] * mine[group + lane];
            y[column] = narrowed_brain(as_float((uint32_t)y[column] << 16) + added(lanes));
        }
    }
}

/* ---- sums and copies of neighbours, as adapters on blocks need them ---- */

#define MOST_NEIGHBOURS 256
#define BATCH 1024 /* numbers that are widened at a time, so that all loops run over rows of float32 */

INLINE void widened(const void *restrict x, int kind, int64_t at, int64_t count, float *restrict to) {
    for (int64_t i = 0; i < count; i++) to[i] = number(x, kind, at + i);
}

INLINE void pooled(const job *work, int kind, int64_t size, int64_t start, int64_t stop) {
    const float factor = *(const float *)work->offsets;
    const int64_t most = BATCH / size;
    void *restrict out = work->out;
    float x[BATCH], sums[BATCH];
    for (int64_t at = start; at < stop; at += most) {
        const int64_t count = smaller(most, stop - at);
        widened(work->codes, kind, at * size, count * size, x);
        for (int64_t i = 0; i < count; i++) {
            float lanes[LANES] = {0}, sum = 0;
            int64_t place = 0;
            for (; place + LANES <= size; place += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i * size + place + lane];
            if (size >= LANES) sum = added(lanes);
            for (; place < size; place++) sum += x[i * size + place];
            sums[i] = sum * factor;
        }
        for (int64_t i = 0; i < count; i++) put(out, kind, at + i, sums[i]);
    }
}

INLINE void repeated(const job *work, int kind, int64_t size, int64_t start, int64_t stop) {
    const float factor = *(const float *)work->offsets;
    const int64_t most = BATCH / size;
    void *restrict out = work->out;
    float x[BATCH], terms[BATCH], base[BATCH];
    for (int64_t at = start; at < stop; at += most) {
        const int64_t count = smaller(most, stop - at), first = at * size;
        widened(work->codes, kind, at, count, x);
        for (int64_t i = 0; i < count; i++)
            for (int64_t place = 0; place < size; place++) terms[i * size + place] = x[i] * factor;
        if (work->scales) {
            widened(work->scales, kind, first, count * size, base);
            for (int64_t i = 0; i < count * size; i++) put(out, kind, first + i, base[i] + terms[i]);
        } else {
            for (int64_t i = 0; i < count * size; i++) put(out, kind, first + i, terms[i]);
        }
    }
}

/* Two neighbours are the common case, and with the number known the loops run in registers. */
#define NEIGHBOURS(name, kind)                                                                     \
    static void name##_##kind(const job *work, int64_t start, int64_t stop) {                      \
        if (work->repeat == 2) name(work, kind, 2, start, stop);                                   \
        else if (work->repeat == 4) name(work, kind, 4, start, stop);                              \
        else name(work, kind, work->repeat, start, stop);                                          \
    }
NEIGHBOURS(pooled, FLOAT32)
NEIGHBOURS(pooled, BFLOAT16)
NEIGHBOURS(repeated, FLOAT32)
NEIGHBOURS(repeated, BFLOAT16)

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

/* `codes` holds `repeat` rows of bfloat16 inputs, `out` the result (repeat, rows), `offsets` the remainders. */
int modicum_remainder(const job *work) {
    if (work->group % LANES || work->columns / work->group > MOST_GROUPS) return 1;
    shared_out(work, remainder_columns, work->rows);
    return 0;
}

/* Runs of 64 rows in the layout of the packed int4 kernel, see modicum.quant.int4pack. */
int modicum_runs(const job *work) {
    static body *const table[3] = {runs_FLOAT32, runs_BFLOAT16, runs_FLOAT16};
    if (work->out_kind < FLOAT32 || work->out_kind > FLOAT16) return 1;
    if (work->rows % RUN || work->start % RUN || work->group < SMALLEST) return 1;
    shared_out(work, table[work->out_kind], work->rows / RUN);
    return 0;
}

/* Plain arguments: the caller is Python, and to fill a `job` there takes as long as the work on small inputs. */
typedef int neighbours(const void *, const void *, void *, int64_t, int32_t, float, int32_t, int32_t);

static int of_neighbours(body *const table[2], const void *x, const void *base, void *out, int64_t count, int32_t size,
                         float factor, int32_t kind, int32_t threads) {
    const job work = {.codes = x, .scales = base, .offsets = &factor, .out = out, .rows = count, .repeat = size,
                      .out_kind = kind, .threads = threads};
    if (kind > BFLOAT16 || size > MOST_NEIGHBOURS) return 1;
    shared_out(&work, table[kind], count);
    return 0;
}

/* `out` (count) is `factor` times the sums of `size` neighbours in `x`; there is no `base`. */
neighbours modicum_pool;
int modicum_pool(const void *x, const void *base, void *out, int64_t count, int32_t size, float factor, int32_t kind,
                 int32_t threads) {
    static body *const table[2] = {pooled_FLOAT32, pooled_BFLOAT16};
    return of_neighbours(table, x, base, out, count, size, factor, kind, threads);
}

/* `out` is each of the `count` numbers in `x` times `factor`, `size` times; plus `base` if there is one. */
neighbours modicum_repeat;
int modicum_repeat(const void *x, const void *base, void *out, int64_t count, int32_t size, float factor, int32_t kind,
                   int32_t threads) {
    static body *const table[2] = {repeated_FLOAT32, repeated_BFLOAT16};
    return of_neighbours(table, x, base, out, count, size, factor, kind, threads);
}
