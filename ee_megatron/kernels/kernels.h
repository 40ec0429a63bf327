/* What the kernels share. Compiled once per element type: float, or bfloat16 with -DBFLOAT16. */

#include <math.h>
#include <stdint.h>

#ifdef BFLOAT16
typedef uint16_t element;
static inline float widen(element x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}
static inline element narrow(float x) {
    union { float value; uint32_t bits; } u = {x};
    return (element)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}
#else
typedef float element;
static inline float widen(element x) { return x; }
static inline element narrow(float x) { return x; }
#endif

/* Sixteen floats; the compiler splits them where the processor has narrower registers. */
enum { LANES = 16 };
typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t mask_vec __attribute__((vector_size(64)));

static inline vec greater(vec a, vec b) {
    mask_vec first = a > b;
    return (vec)((first & (mask_vec)a) | (~first & (mask_vec)b));
}

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

/* Below this many elements a second thread costs more than it saves. */
enum { PARALLEL_FROM = 16384 };

/* A matrix [out, in] in panels (product.c), and a bias [out] or NULL. */
typedef struct {
    const element *panels;
    const float *bias;
    long in, out;
} product;

/* What a decoder's layers have in common. */
typedef struct {
    long hidden, heads, kv_heads, head_dim, intermediate;
    float eps;
} shape;

/* One layer; q_norm and k_norm [hd] or NULL; whether queries and keys are rotated. */
typedef struct {
    product qkv, out, gate_up, down;
    const element *attention_norm, *mlp_norm, *q_norm, *k_norm;
    int rotates;
} layer;

void add_norm(element *hidden, const element *delta, const element *gain, element *out, long A, long D, float eps);
void silu_mul(const element *gate_up, element *out, long A, long I);
void attend(const element *fused, element *out, const int64_t *where, long stride, const float *cos, const float *sin,
            element *pages, const element *q_gain, const element *k_gain, float eps, int rotates, long A, long H,
            long KVH, long hd);
void multiply(const product *p, const element *x, void *y, long A, int wide);
