/* Products with the model's matrices, for processors with 512-bit registers.

   A matrix is kept in panels of COLUMNS outputs: of each pair of inputs (bfloat16) or each input (float32) what it gives
   to all of them lies together, so that one read of the matrix from its beginning to its end serves all rows. An output
   is one sum in ascending order of the inputs: a row's result doesn't depend on the rows that come along.

   In bfloat16 that is also how a unit for whole matrices (AMX) wants them: rows of a tile are the pairs of a panel. */

#include "kernels.h"

#include <string.h>
#ifdef BFLOAT16
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* ROWS · COLUMNS sums are as many registers as there are beside two of the matrix and one of a row. */
enum { COLUMNS = 32, ROWS = 12, VECTORS = COLUMNS / LANES };
/* Rows whose inputs stay in the second cache while the matrix passes; inputs of a panel that stay there meanwhile. */
enum { BLOCK = 240, DEPTH = 2048 };
/* Bytes that the matrix is fetched ahead; the hardware stops at every 4096. */
enum { AHEAD = 2048 };

#if defined(__AVX512F__) && (!defined(BFLOAT16) || defined(__AVX512BF16__))
#define SUPPORTED 1
#else
#define SUPPORTED 0
#endif
#if SUPPORTED && defined(BFLOAT16) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES 1
#else
#define TILES 0
#endif

/* Whether there are products for this processor. Linux gives a process its tiles when it asks for them. */
int supports_products(void) {
#if TILES
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA)) return 0;
#endif
    return SUPPORTED;
}

long columns(void) { return COLUMNS; }

/* matrix [out, in] -> panels [ceil(out / COLUMNS), in / PAIR, COLUMNS, PAIR], zeros past the last output. */
#ifdef BFLOAT16
enum { PAIR = 2 };
#else
enum { PAIR = 1 };
#endif

void pack(const element *matrix, element *panels, long in, long out) {
    long count = (out + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for if (in * out >= PARALLEL_FROM)
    for (long p = 0; p < count; p++)
        for (long c = 0; c < COLUMNS; c++) {
            element *target = panels + p * COLUMNS * in + c * PAIR;
            const element *source = matrix + (p * COLUMNS + c) * in;
            int there = p * COLUMNS + c < out;
            for (long k = 0; k < in; k++) target[k / PAIR * COLUMNS * PAIR + k % PAIR] = there ? source[k] : 0;
        }
}

#if SUPPORTED

/* Adds to sums [R, COLUMNS] what inputs x [R, n] (rows `step` apart) give through n inputs of a panel. */
static inline __attribute__((always_inline)) void accumulate(const int R, const element *x, long step,
                                                             const element *panel, long n, vec sums[][VECTORS]) {
    vec sum[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sum[r][0] = sums[r][0], sum[r][1] = sums[r][1];
    for (long k = 0; k < n; k += PAIR) {
        __builtin_prefetch((const char *)panel + AHEAD);
        __builtin_prefetch((const char *)panel + AHEAD + 64);
#ifdef BFLOAT16
        __m512bh low = (__m512bh)_mm512_loadu_si512(panel), high = (__m512bh)_mm512_loadu_si512(panel + COLUMNS);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, x + r * step + k, sizeof(pair));
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sum[r][0] = (vec)_mm512_dpbf16_ps((__m512)sum[r][0], both, low);
            sum[r][1] = (vec)_mm512_dpbf16_ps((__m512)sum[r][1], both, high);
        }
#else
        vec low = *(const vec *)panel, high = *(const vec *)(panel + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            sum[r][0] += x[r * step + k] * low;
            sum[r][1] += x[r * step + k] * high;
        }
#endif
        panel += COLUMNS * PAIR;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sums[r][0] = sum[r][0], sums[r][1] = sum[r][1];
}

static void accumulate_rows(long R, const element *x, long step, const element *panel, long n, vec sums[][VECTORS]) {
    switch (R) {
#define CASE(count) \
    case count: accumulate(count, x, step, panel, n, sums); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

static inline void store(vec sums[VECTORS], const float *bias, void *y, long at, long count, int wide) {
    float full[COLUMNS];
    if (bias)
        for (long c = 0; c < count; c++) sums[c / LANES][c % LANES] += bias[c];
    memcpy(full, sums, sizeof(full));
    if (wide)
        memcpy((float *)y + at, full, sizeof(float) * (size_t)count);
    else if (count == COLUMNS)
        for (long c = 0; c < COLUMNS; c++) ((element *)y)[at + c] = narrow(full[c]);
    else
        for (long c = 0; c < count; c++) ((element *)y)[at + c] = narrow(full[c]);
}

#if TILES
/* Inputs and rows of a tile; elements that the matrix is fetched ahead. */
enum { TILE = 32, TILE_ROWS = 16, TILE_AHEAD = 4096 };

/* Tiles 0 to 3 are sums of two tiles of rows (4, 5) and two of the matrix (6, 7): `rows` rows each. */
static inline void configure(int rows) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {1};
    for (int t = 0; t < 8; t++) tiles.bytes[t] = 64, tiles.rows[t] = (uint8_t)(t < 6 ? rows : 16);
    /* The compiler believes that the instruction reads eight bytes. */
    __asm__ volatile("" ::"r"(&tiles) : "memory");
    _tile_loadconfig(&tiles);
}

/* sums [rows, COLUMNS] of the inputs x [rows, in] of a panel, by tiles of R rows: the last begins R before the end. */
static void sum_tiles(const element *x, long rows, int R, const element *panel, long in, vec sums[][VECTORS]) {
    const long row = in * (long)sizeof(element), line = COLUMNS * PAIR * (long)sizeof(element), sum = COLUMNS * 4;
    for (long r = 0; r < rows;) {
        long left = rows - r, a = left < R ? rows - R : r, b = left < 2 * R ? rows - R : r + R;
        const element *matrix = panel;
        if (left > R) {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            for (long k = 0; k < in; k += TILE, matrix += TILE * COLUMNS) {
                _tile_loadd(6, matrix, line); _tile_loadd(7, matrix + COLUMNS, line);
                _tile_loadd(4, x + a * in + k, row); _tile_loadd(5, x + b * in + k, row);
                if (!r)
                    for (long at = 0; at < TILE * COLUMNS; at += 32) __builtin_prefetch(matrix + TILE_AHEAD + at);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(2, sums[b], sum); _tile_stored(3, sums[b] + 1, sum);
        } else {
            _tile_zero(0); _tile_zero(1);
            for (long k = 0; k < in; k += TILE, matrix += TILE * COLUMNS) {
                _tile_loadd(6, matrix, line); _tile_loadd(7, matrix + COLUMNS, line);
                _tile_loadd(4, x + a * in + k, row);
                if (!r)
                    for (long at = 0; at < TILE * COLUMNS; at += 32) __builtin_prefetch(matrix + TILE_AHEAD + at);
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
            }
        }
        _tile_stored(0, sums[a], sum); _tile_stored(1, sums[a] + 1, sum);
        r += 2 * R;
    }
}
#endif

/* x [A, in] -> y [A, out] = x W^T + b, of elements or, if `wide`, of floats. */
void multiply(const product *p, const element *x, void *y, long A, int wide) {
    long panels = (p->out + COLUMNS - 1) / COLUMNS, blocks = (A + BLOCK - 1) / BLOCK;
#if TILES
    int tiles = p->in % TILE == 0;
#endif
#pragma omp parallel if (A * p->in * p->out >= 16 * PARALLEL_FROM)
    {
#if TILES
        int configured = 0;
#endif
#pragma omp for collapse(2)
        for (long b = 0; b < blocks; b++)
            for (long i = 0; i < panels; i++) {
                long first = b * BLOCK, rows = A - first < BLOCK ? A - first : BLOCK;
                long from = i * COLUMNS, count = p->out - from < COLUMNS ? p->out - from : COLUMNS;
                const element *panel = p->panels + from * p->in;
                vec sums[BLOCK][VECTORS];
#if TILES
                if (tiles) {
                    int R = rows < TILE_ROWS ? (int)rows : TILE_ROWS;
                    if (R != configured) configure(configured = R);
                    sum_tiles(x + first * p->in, rows, R, panel, p->in, sums);
                } else
#endif
                {
                    memset(sums, 0, sizeof(vec) * VECTORS * (size_t)rows);
                    for (long k = 0; k < p->in; k += DEPTH) {
                        long n = p->in - k < DEPTH ? p->in - k : DEPTH;
                        for (long r = 0; r < rows; r += ROWS)
                            accumulate_rows(rows - r < ROWS ? rows - r : ROWS, x + (first + r) * p->in + k, p->in,
                                            panel + k * COLUMNS, n, sums + r);
                    }
                }
                for (long r = 0; r < rows; r++)
                    store(sums[r], p->bias ? p->bias + from : NULL, y, (first + r) * p->out + from, count, wide);
            }
#if TILES
        if (configured) _tile_release();
#endif
    }
}

/* Layers of the decoder, one position per row: hidden [A, D] is what it is behind them when this returns, and the rows'
   keys and values are in their pages. scratch: A · (D + (H + 2 KVH) hd + 3 I + max(H hd, D)) elements. */
void run_layers(const layer *layers, element *const *pages, long count, element *hidden, element *scratch,
                const int64_t *where, long stride, const float *cos, const float *sin, long A, const shape *s) {
    long D = s->hidden, q = s->heads * s->head_dim, I = s->intermediate;
    element *normed = scratch, *fused = normed + A * D, *gate_up = fused + A * (q + 2 * s->kv_heads * s->head_dim);
    element *inner = gate_up + A * 2 * I, *delta = inner + A * I;
    add_norm(hidden, NULL, layers[0].attention_norm, normed, A, D, s->eps);
    for (long l = 0; l < count; l++) {
        const layer *now = layers + l;
        multiply(&now->qkv, normed, fused, A, 0);
        attend(fused, delta, where, stride, cos, sin, pages[l], now->q_norm, now->k_norm, s->eps, now->rotates, A,
               s->heads, s->kv_heads, s->head_dim);
        multiply(&now->out, delta, normed, A, 0);
        /* `normed` is what is added and, row by row, what comes of it. */
        add_norm(hidden, normed, now->mlp_norm, normed, A, D, s->eps);
        multiply(&now->gate_up, normed, gate_up, A, 0);
        silu_mul(gate_up, inner, A, I);
        multiply(&now->down, inner, delta, A, 0);
        if (l + 1 < count)
            add_norm(hidden, delta, now[1].attention_norm, normed, A, D, s->eps);
        else
            for (long i = 0; i < A * D; i++) hidden[i] = narrow(widen(hidden[i]) + widen(delta[i]));
    }
}

/* A gate's logits [A] on streams hidden [A, D]: fc2 · relu(fc1(x) + b1) + b2, x the stream, divided by its root mean
   square if `normalise`. scratch: A · D elements; units: A · w floats. */
void gate(const product *fc1, const float *fc2, float fc2_bias, const element *hidden, int normalise, float eps,
          element *scratch, float *units, float *logit, long A) {
    long D = fc1->in, width = fc1->out;
    if (normalise)
        for (long a = 0; a < A; a++) {
            const element *h = hidden + a * D;
            float squares = 0;
            for (long i = 0; i < D; i++) squares += widen(h[i]) * widen(h[i]);
            float scale = 1.0f / __builtin_sqrtf(squares / (float)D + eps);
            for (long i = 0; i < D; i++) scratch[a * D + i] = narrow(widen(h[i]) * scale);
        }
    multiply(fc1, normalise ? scratch : hidden, units, A, 1);
    for (long a = 0; a < A; a++) {
        float sum = 0;
        for (long i = 0; i < width; i++) sum += fc2[i] * (units[a * width + i] > 0 ? units[a * width + i] : 0);
        logit[a] = sum + fc2_bias;
    }
}

#endif
