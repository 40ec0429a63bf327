/* Decoding kernels for CPUs: one query position per row, the cache read where it lies. kernels.py compiles and calls them.

   Arithmetic is float32 throughout; results are rounded to the element type where the PyTorch form in ops.py rounds
   too. A rows, D hidden, H query heads, KVH key/value heads, hd head size (a multiple of 16).

   A layer's cache is pages [P, 2, PAGE, KVH, hd] of keys and values. `where` [A, stride] says of each row its position
   and the pages of its positions, in their order (cache.py). */

#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* exp for x <= 88: 2^n times a polynomial on [-ln2/2, ln2/2]; relative error about 1e-7 (Cephes' coefficients). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693147180559945f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } scale = {((int32_t)n + 127) << 23};
    return p * scale.value;
}

static inline float largest(const float *x, long n) {
    float top = x[0];
    long i = 0;
    if (n >= LANES) {
        vec most = *(const vec *)x;
        for (i = LANES; i + LANES <= n; i += LANES) most = greater(most, *(const vec *)(x + i));
        for (int l = 0; l < LANES; l++) top = most[l] > top ? most[l] : top;
    }
    for (; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

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

/* One head [hd]: RMSNorm with gain if there is one, RoPE with the tables' rows cos, sin [hd / 2], times `scale`. */
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
    for (long i = 0; i < half; i++) {
        out[i] = scale * (wide[i] * cos[i] - wide[i + half] * sin[i]);
        out[i + half] = scale * (wide[i + half] * cos[i] + wide[i] * sin[i]);
    }
}

/* fused [A, (H + 2 KVH) hd], queries and keys in place: normed where there are gains, rotated by rows position [A] of the
   tables. */
void turn_heads(element *fused, const int64_t *position, const float *cos, const float *sin, const element *q_gain,
                const element *k_gain, float eps, long A, long H, long KVH, long hd) {
#pragma omp parallel for if (A * H * hd >= PARALLEL_FROM)
    for (long a = 0; a < A; a++) {
        const float *c = cos + position[a] * (hd / 2), *s = sin + position[a] * (hd / 2);
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

/* fused [A, (H + 2 KVH) hd] -> out [A, H hd]; writes each row's key and value at its position first. pages: this
   layer's; cos, sin [positions, hd / 2]. */
void attend(const element *fused, element *out, const int64_t *where, long stride, const float *cos, const float *sin,
            element *pages, const element *q_gain, const element *k_gain, float eps, long A, long H, long KVH,
            long hd) {
    long G = H / KVH, step = KVH * hd;
    float scale = 1.0f / sqrtf((float)hd);
#pragma omp parallel for schedule(dynamic, 1)
    for (long task = 0; task < A * KVH; task++) {
        long a = task / KVH, g = task % KVH;
        const int64_t *here = where + a * stride;
        long at = here[POSITION], length = at + 1;
        const float *c = cos + at * (hd / 2), *s = sin + at * (hd / 2);
        const element *row = fused + a * (H + 2 * KVH) * hd;
        element *own = pages + g * hd, *k = place(own, here, at, step);
        put_key_value(row + (H + g) * hd, row + (H + KVH + g) * hd, k_gain, c, s, eps, hd, k, k + PAGE * step);
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

/* fused [A, layers, 2, KVH, hd]: keys (normed and rotated here) and values of layers whose pages are `pages` [layers].
   k_gain [layers, hd] or NULL. */
void write_kv(const element *fused, const int64_t *where, long stride, const float *cos, const float *sin,
              element *const *pages, const element *k_gain, float eps, long A, long layers, long KVH, long hd) {
    long step = KVH * hd;
#pragma omp parallel for if (A * layers * step >= PARALLEL_FROM)
    for (long task = 0; task < A * layers; task++) {
        long a = task / layers, l = task % layers, at = where[a * stride + POSITION];
        const element *k = fused + task * 2 * step, *v = k + step, *gain = k_gain ? k_gain + l * hd : NULL;
        element *keys = place(pages[l], where + a * stride, at, step), *values = keys + PAGE * step;
        for (long g = 0; g < KVH; g++)
            put_key_value(k + g * hd, v + g * hd, gain, cos + at * (hd / 2), sin + at * (hd / 2), eps, hd,
                          keys + g * hd, values + g * hd);
    }
}

#ifndef BFLOAT16
/* Logits are weighed in blocks: within one in float32, their sums in float64. */
enum { BLOCK = 512 };

static inline float weight_of(float below) { return below < -86.0f ? 0.0f : exponential(below); }

/* The sum of exp(x - top) over x [V]; mass [ceil(V / BLOCK)], unless NULL: that of each block. */
static double weigh(const float *x, long V, float top, double *mass) {
    double total = 0;
    for (long b = 0; b * BLOCK < V; b++) {
        long stop = (b + 1) * BLOCK < V ? (b + 1) * BLOCK : V;
        float sum = 0;
        for (long i = b * BLOCK; i < stop; i++) sum += weight_of(x[i] - top);
        if (mass) mass[b] = sum;
        total += sum;
    }
    return total;
}

/* Greedy choice: logits [A, V] -> the first of the greatest, token [A], and its log-probability [A]. */
void best(const float *logits, int64_t *token, float *logprob, long A, long V) {
#pragma omp parallel for
    for (long a = 0; a < A; a++) {
        const float *x = logits + a * V;
        float top = largest(x, V);
        long at = 0;
        while (at < V - 1 && x[at] != top) at++;
        token[a] = at;
        logprob[a] = -(float)log(weigh(x, V, top, NULL));
    }
}

/* Inverse-CDF sampling: logits [A, V] (already divided by the temperature), uniform [A] in [0, 1) -> token [A] and its
   log-probability [A]. -inf logits have no weight and are never drawn. */
void sample(const float *logits, const double *uniform, int64_t *token, float *logprob, long A, long V) {
    long blocks = (V + BLOCK - 1) / BLOCK;
#pragma omp parallel for
    for (long a = 0; a < A; a++) {
        const float *x = logits + a * V;
        double *mass = malloc(sizeof(double) * (size_t)blocks);
        float top = largest(x, V);
        double total = weigh(x, V, top, mass), left = uniform[a] * total;
        long b = 0;
        while (b < blocks - 1 && left >= mass[b]) left -= mass[b++];
        long stop = (b + 1) * BLOCK < V ? (b + 1) * BLOCK : V, chosen = -1;
        for (long i = b * BLOCK; i < stop; i++) {
            float weight = weight_of(x[i] - top);
            if (weight == 0.0f) continue;
            chosen = i;
            left -= weight;
            if (left < 0) break;
        }
        /* Rounding may leave an empty last block: then the last token with any weight is meant. */
        for (long i = b * BLOCK - 1; chosen < 0 && i >= 0; i--)
            if (x[i] - top >= -86.0f) chosen = i;
        token[a] = chosen;
        logprob[a] = x[chosen] - (top + (float)log(total));
        free(mass);
    }
}
#endif
