/* Decoding kernels for CPUs: one query position per row, the cache read where it lies. compiled.py compiles them.

   Arithmetic is float32 throughout; results are rounded to the element type where the PyTorch form (layer_backends.py)
   rounds too. A rows, D hidden, H query heads, KVH key/value heads, hd head size (a multiple of 16).

   A layer's cache is pages [P, 2, PAGE, KVH, hd] of keys and values. `where` [A, stride] says of each row its position
   and the pages of its positions, in their order (cache.py). */

#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* hidden [A, D] += delta [A, D] (NULL: nothing); out = RMSNorm(hidden) * gain (NULL: no gain). */
void add_norm(element *hidden, const element *delta, const element *gain, element *out, long A, long D, float eps) {
#pragma omp parallel for if (A * D >= PARALLEL_FROM)
    for (long a = 0; a < A; a++) {
        element *h = hidden + a * D;
        const element *d = delta ? delta + a * D : NULL;
        if (d)
            for (long i = 0; i < D; i++) h[i] = narrow(widen(h[i]) + widen(d[i]));
        float squares = 0;
        for (long i = 0; i < D; i++) squares += widen(h[i]) * widen(h[i]);
        float scale = 1.0f / sqrtf(squares / (float)D + eps);
        element *o = out + a * D;
        if (gain)
            for (long i = 0; i < D; i++) o[i] = narrow(widen(narrow(widen(h[i]) * scale)) * widen(gain[i]));
        else
            for (long i = 0; i < D; i++) o[i] = narrow(widen(h[i]) * scale);
    }
}

/* gate_up [A, 2 I] -> out [A, I] = silu(gate) * up. */
void silu_mul(const element *gate_up, element *out, long A, long I) {
#pragma omp parallel for if (A * I >= PARALLEL_FROM)
    for (long a = 0; a < A; a++) {
        const element *g = gate_up + a * 2 * I, *u = g + I;
        element *o = out + a * I;
        for (long i = 0; i < I; i++) {
            float x = widen(g[i]);
            float bounded = -x > 87.0f ? 87.0f : -x;
            o[i] = narrow(widen(narrow(x / (1.0f + exponential(bounded)))) * widen(u[i]));
        }
    }
}

#ifdef BFLOAT16
typedef uint16_t half_vec __attribute__((vector_size(32), aligned(2)));
typedef uint32_t bits_vec __attribute__((vector_size(64)));
static inline vec load(const element *x) {
    return (vec)(__builtin_convertvector(*(const half_vec *)x, bits_vec) << 16);
}
#else
static inline vec load(const element *x) { return *(const vec *)x; }
#endif

static inline void store(vec x, element *out) {
#ifdef BFLOAT16
    bits_vec bits = (bits_vec)x;
    *(half_vec *)out = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, half_vec);
#else
    *(vec *)out = x;
#endif
}

/* One head [hd]: RMSNorm with gain if there is one, RoPE with the tables' rows cos, sin [hd / 2] unless they are NULL,
   times `scale`. */
static inline void turn(const element *x, const element *gain, const float *restrict cos, const float *restrict sin,
                        float eps, float scale, long hd, float *restrict out) {
    long half = hd / 2;
    float wide[hd];
    for (long i = 0; i < hd; i += LANES) *(vec *)(wide + i) = load(x + i);
    if (gain) {
        float squares = 0;
        for (long i = 0; i < hd; i++) squares += wide[i] * wide[i];
        float norm = 1.0f / sqrtf(squares / (float)hd + eps);
        for (long i = 0; i < hd; i++) wide[i] = widen(narrow(widen(narrow(wide[i] * norm)) * widen(gain[i])));
    }
    if (!cos) {
        for (long i = 0; i < hd; i++) out[i] = scale * wide[i];
        return;
    }
    for (long i = 0; i < half; i++) {
        out[i] = scale * (wide[i] * cos[i] - wide[i + half] * sin[i]);
        out[i + half] = scale * (wide[i + half] * cos[i] + wide[i] * sin[i]);
    }
}

/* fused [A, (H + 2 KVH) hd], queries and keys in place: normed where there are gains and, if `rotates`, rotated by rows
   position [A] of the tables. */
void turn_heads(element *fused, const int64_t *position, const float *cos, const float *sin, const element *q_gain,
                const element *k_gain, float eps, int rotates, long A, long H, long KVH, long hd) {
#pragma omp parallel for if (A * H * hd >= PARALLEL_FROM)
    for (long a = 0; a < A; a++) {
        const float *c = rotates ? cos + position[a] * (hd / 2) : NULL, *s = sin + position[a] * (hd / 2);
        for (long j = 0; j < H + KVH; j++) {
            element *head = fused + (a * (H + 2 * KVH) + j) * hd;
            float turned[hd];
            turn(head, j < H ? q_gain : k_gain, c, s, eps, 1.0f, hd, turned);
            for (long i = 0; i < hd; i += LANES) store(*(const vec *)(turned + i), head + i);
        }
    }
}

static inline void put_key_value(const element *k, const element *v, const element *gain, const float *cos,
                                 const float *sin, float eps, long hd, element *keys, element *values) {
    float turned[hd];
    turn(k, gain, cos, sin, eps, 1.0f, hd, turned);
    for (long i = 0; i < hd; i += LANES) store(*(const vec *)(turned + i), keys + i);
    memcpy(values, v, sizeof(element) * hd);
}

/* A page of the cache is one step of the attention's loops. */
enum { PAGE = LANES };

/* Columns of `where`, as in cache.py; the first and the two between are for the PyTorch form. */
enum { POSITION = 1, TABLE = 4 };

/* Keys of one position in all heads; its values lie PAGE positions behind. step: elements of a position. */
static inline element *place(element *pages, const int64_t *where, long position, long step) {
    return pages + (where[TABLE + position / PAGE] * 2 * PAGE + position % PAGE) * step;
}

#define FOLD(a, b, LOW, HIGH) (__builtin_shufflevector(a, b, LOW) + __builtin_shufflevector(a, b, HIGH))
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

/* The sums of sixteen vectors' lanes, in order: a tree of folds instead of sixteen separate sums. */
static inline vec sums(vec *x) {
    for (int i = 0; i < 8; i++) x[i] = FOLD(x[i], x[i + 8], LOW8, HIGH8);
    for (int i = 0; i < 4; i++) x[i] = FOLD(x[i], x[i + 4], LOW4, HIGH4);
    for (int i = 0; i < 2; i++) x[i] = FOLD(x[i], x[i + 2], LOW2, HIGH2);
    return FOLD(x[0], x[1], LOW1, HIGH1);
}

/* s [n], n a multiple of LANES -> exp(s - its greatest) in place; their sum. */
static inline float softmax(float *s, long n) {
    float top = largest(s, n);
    vec total = {0};
    for (long t = 0; t < n; t += LANES) {
        float *x = s + t;
        for (int l = 0; l < LANES; l++) x[l] = exponential(x[l] - top);
        total += *(const vec *)x;
    }
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += total[l];
    return sum;
}

/* Of a score that doesn't count: its exponential is 0 beside the others'. */
#define NOTHING -1e30f

/* Attention of the G heads q [G, 16 N] that share a key/value head over `length` positions; out [G, 16 N]. Sixteen
   positions at a time, a page, are widened into a buffer that all heads read. pages: this key/value head's part;
   scores: G times `length`, rounded up to whole pages. */
static inline __attribute__((always_inline)) void attend_vectors(const float *q, element *pages, const int64_t *where,
                                                                 long step, long length, long G, const int N,
                                                                 float *scores, element *out) {
    const long hd = N * LANES, width = (length + PAGE - 1) / PAGE * PAGE;
    vec block[PAGE][N];
    for (long t = 0; t < length; t += PAGE) {
        long count = length - t < PAGE ? length - t : PAGE;
        const element *keys = place(pages, where, t, step);
        for (long p = 0; p < PAGE; p++) {
            /* Past the end the last position is read again; its sums are not kept. */
            const element *k = keys + (p < count ? p : count - 1) * step;
            for (int n = 0; n < N; n++) block[p][n] = load(k + n * LANES);
        }
        for (long j = 0; j < G; j++) {
            vec part[PAGE], head[N];
            for (int n = 0; n < N; n++) head[n] = *(const vec *)(q + j * hd + n * LANES);
            for (long p = 0; p < PAGE; p++) {
                vec product = head[0] * block[p][0];
                for (int n = 1; n < N; n++) product += head[n] * block[p][n];
                part[p] = product;
            }
            *(vec *)(scores + j * width + t) = sums(part);
        }
        for (long j = 0; j < G; j++)
            for (long p = count; p < PAGE; p++) scores[j * width + t + p] = NOTHING;
    }
    vec sum[G][N];
    float total[G];
    for (long j = 0; j < G; j++) {
        total[j] = softmax(scores + j * width, width);
        for (int n = 0; n < N; n++) sum[j][n] = (vec){0};
    }
    for (long t = 0; t < length; t += PAGE) {
        long count = length - t < PAGE ? length - t : PAGE;
        const element *values = place(pages, where, t, step) + PAGE * step;
        for (long p = 0; p < count; p++)
            for (int n = 0; n < N; n++) block[p][n] = load(values + p * step + n * LANES);
        for (long j = 0; j < G; j++) {
            const float *s = scores + j * width + t;
            vec even[N], odd[N];
            for (int n = 0; n < N; n++) even[n] = sum[j][n], odd[n] = (vec){0};
            long p = 0;
            for (; p + 1 < count; p += 2)
                for (int n = 0; n < N; n++) {
                    even[n] += s[p] * block[p][n];
                    odd[n] += s[p + 1] * block[p + 1][n];
                }
            if (p < count)
                for (int n = 0; n < N; n++) even[n] += s[p] * block[p][n];
            for (int n = 0; n < N; n++) sum[j][n] = even[n] + odd[n];
        }
    }
    for (long j = 0; j < G; j++)
        for (int n = 0; n < N; n++) store(sum[j][n] / total[j], out + j * hd + n * LANES);
}

/* fused [A, (H + 2 KVH) hd] -> out [A, H hd]; writes all keys and values first, since a row may be a later position of
   another's sequence. pages: this layer's; cos, sin [positions, hd / 2]. */
void attend(const element *fused, element *out, const int64_t *where, long stride, const float *cos, const float *sin,
            element *pages, const element *q_gain, const element *k_gain, float eps, int rotates, long A, long H,
            long KVH, long hd) {
    long G = H / KVH, step = KVH * hd;
    float scale = 1.0f / sqrtf((float)hd);
#pragma omp parallel for if (A * step >= PARALLEL_FROM)
    for (long task = 0; task < A * KVH; task++) {
        long a = task / KVH, g = task % KVH, at = where[a * stride + POSITION];
        const element *row = fused + a * (H + 2 * KVH) * hd;
        element *k = place(pages + g * hd, where + a * stride, at, step);
        put_key_value(row + (H + g) * hd, row + (H + KVH + g) * hd, k_gain, rotates ? cos + at * (hd / 2) : NULL,
                      sin + at * (hd / 2), eps, hd, k, k + PAGE * step);
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (long task = 0; task < A * KVH; task++) {
        long a = task / KVH, g = task % KVH;
        const int64_t *here = where + a * stride;
        long at = here[POSITION], length = at + 1;
        const float *c = rotates ? cos + at * (hd / 2) : NULL, *s = sin + at * (hd / 2);
        const element *row = fused + a * (H + 2 * KVH) * hd;
        element *own = pages + g * hd;
        float *work = malloc(sizeof(float) * (size_t)(G * hd + G * (length + PAGE - 1)));
        for (long j = 0; j < G; j++) turn(row + (g * G + j) * hd, q_gain, c, s, eps, scale, hd, work + j * hd);
        element *o = out + a * H * hd + g * G * hd;
        if (hd == 64)
            attend_vectors(work, own, here, step, length, G, 4, work + G * hd, o);
        else if (hd == 128)
            attend_vectors(work, own, here, step, length, G, 8, work + G * hd, o);
        else if (hd == 16)
            attend_vectors(work, own, here, step, length, G, 1, work + G * hd, o);
        else
            attend_vectors(work, own, here, step, length, G, (int)(hd / LANES), work + G * hd, o);
        free(work);
    }
}

/* Queries that are weighed together against two vectors of positions. */
enum { QUERIES = 4 };

/* A query's logits with the keys of `span` positions, turned: keys [hd, width], width a multiple of 2 LANES. Queries
   q [R, hd] lie G to a position, positions `step` apart; scores [R, width]. */
static inline __attribute__((always_inline)) void weigh_keys(const int R, const element *const *q, float scale,
                                                             const float *keys, long width, long span, long hd,
                                                             float *scores) {
    float wide[QUERIES][hd];
    for (int r = 0; r < R; r++)
        for (long d = 0; d < hd; d += LANES) *(vec *)(wide[r] + d) = scale * load(q[r] + d);
    for (long t = 0; t < span; t += 2 * LANES) {
        vec low[QUERIES], high[QUERIES];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) low[r] = high[r] = (vec){0};
        for (long d = 0; d < hd; d++) {
            vec first = *(const vec *)(keys + d * width + t), second = *(const vec *)(keys + d * width + t + LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                low[r] += wide[r][d] * first;
                high[r] += wide[r][d] * second;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            *(vec *)(scores + r * width + t) = low[r];
            *(vec *)(scores + r * width + t + LANES) = high[r];
        }
    }
}

/* Causal attention of whole sequences, each by itself: queries q [B, T, H, hd] at the last T of P + T positions, whose
   keys and values are k, v [B, P + T, KVH, hd]; `ends` [B] of the T are there -> out [B, T, H, hd], which stays as it was
   behind them. Elements between positions: step_q, step_kv; out is contiguous. */
void attend_causal(const element *q, const element *k, const element *v, element *out, const int64_t *ends, long step_q,
                   long step_kv, long B, long T, long P, long H, long KVH, long hd) {
    long G = H / KVH;
    float scale = 1.0f / sqrtf((float)hd);
#pragma omp parallel for schedule(dynamic, 1)
    for (long task = 0; task < B * KVH; task++) {
        long b = task / KVH, g = task % KVH, n = ends[b], all = P + n;
        long width = (all + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
        float *keys = aligned_alloc(64, sizeof(float) * (size_t)(width * (2 * hd + QUERIES)));
        float *values = keys + width * hd, *scores = values + width * hd;
        const element *own_k = k + b * (P + T) * step_kv + g * hd, *own_v = v + b * (P + T) * step_kv + g * hd;
        for (long t = 0; t < width; t++)
            for (long d = 0; d < hd; d++) keys[d * width + t] = t < all ? widen(own_k[t * step_kv + d]) : 0.0f;
        for (long t = 0; t < all; t++)
            for (long d = 0; d < hd; d += LANES) *(vec *)(values + t * hd + d) = load(own_v + t * step_kv + d);
        for (long first = 0; first < n * G; first += QUERIES) {
            long count = n * G - first < QUERIES ? n * G - first : QUERIES;
            const element *rows[QUERIES];
            for (long r = 0; r < QUERIES; r++) {
                /* Past the end the last query is asked again. */
                long at = first + (r < count ? r : count - 1);
                rows[r] = q + (b * T + at / G) * step_q + (g * G + at % G) * hd;
            }
            weigh_keys(QUERIES, rows, scale, keys, width, P + (first + count - 1) / G + 1, hd, scores);
            for (long r = 0; r < count; r++) {
                long i = (first + r) / G, seen = P + i + 1, whole = (seen + LANES - 1) / LANES * LANES;
                float *s = scores + r * width;
                for (long t = seen; t < whole; t++) s[t] = NOTHING;
                float total = softmax(s, whole);
                element *o = out + ((b * T + i) * H + g * G + (first + r) % G) * hd;
                for (long d = 0; d < hd; d += LANES) {
                    vec even = {0}, odd = {0};
                    long t = 0;
                    for (; t + 1 < seen; t += 2) {
                        even += s[t] * *(const vec *)(values + t * hd + d);
                        odd += s[t + 1] * *(const vec *)(values + (t + 1) * hd + d);
                    }
                    if (t < seen) even += s[t] * *(const vec *)(values + t * hd + d);
                    store((even + odd) / total, o + d);
                }
            }
        }
        free(keys);
    }
}

/* fused [A, layers, 2, KVH, hd]: keys (normed and rotated here) and values of layers whose pages are `pages` [layers].
   k_gain [layers, hd] or NULL; no_rope [layers]: whether a layer's keys are not rotated, or NULL: all are. */
void write_kv(const element *fused, const int64_t *where, long stride, const float *cos, const float *sin,
              element *const *pages, const element *k_gain, const uint8_t *no_rope, float eps, long A, long layers,
              long KVH, long hd) {
    long step = KVH * hd;
#pragma omp parallel for if (A * layers * step >= PARALLEL_FROM)
    for (long task = 0; task < A * layers; task++) {
        long a = task / layers, l = task % layers, at = where[a * stride + POSITION];
        const element *k = fused + task * 2 * step, *v = k + step, *gain = k_gain ? k_gain + l * hd : NULL;
        element *keys = place(pages[l], where + a * stride, at, step), *values = keys + PAGE * step;
        const float *c = no_rope && no_rope[l] ? NULL : cos + at * (hd / 2), *s = sin + at * (hd / 2);
        for (long g = 0; g < KVH; g++)
            put_key_value(k + g * hd, v + g * hd, gain, c, s, eps, hd, keys + g * hd, values + g * hd);
    }
}
