/* What the kernels share. Compiled once per element type: float, or bfloat16 with -DBFLOAT16. */

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

/* One layer; q_norm and k_norm [hd] or NULL. */
typedef struct {
    product qkv, out, gate_up, down;
    const element *attention_norm, *mlp_norm, *q_norm, *k_norm;
} layer;

void add_norm(element *hidden, const element *delta, const element *gain, element *out, long A, long D, float eps);
void silu_mul(const element *gate_up, element *out, long A, long I);
void attend(const element *fused, element *out, const int64_t *where, long stride, const float *cos, const float *sin,
            element *pages, const element *q_gain, const element *k_gain, float eps, long A, long H, long KVH, long hd);
void multiply(const product *p, const element *x, void *y, long A, int wide);
