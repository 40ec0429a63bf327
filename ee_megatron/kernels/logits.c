/* What is made of rows of float32 logits [A, V]: choices and divergences, each row read as few times as it takes. */

#include "kernels.h"

#include <stdlib.h>

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

/* Two distributions beside each other, of logits a [A, V] and b [A, V] row by row: found [A, 4] has
   KL(softmax(a) || softmax(b)), both normalisers log sum exp and the entropy of softmax(a), in nats. */
void compare(const float *a, const float *b, float *found, long A, long V) {
#pragma omp parallel for
    for (long row = 0; row < A; row++) {
        const float *x = a + row * V, *y = b + row * V;
        float top_x = largest(x, V), top_y = largest(y, V);
        double total_x = 0, total_y = 0, gap = 0, below = 0;
        for (long first = 0; first < V; first += BLOCK) {
            long stop = first + BLOCK < V ? first + BLOCK : V;
            float sum_x = 0, sum_y = 0, sum_gap = 0, sum_below = 0;
            for (long i = first; i < stop; i++) {
                float u = x[i] - top_x, w = y[i] - top_y, weight = weight_of(u);
                sum_x += weight;
                sum_y += weight_of(w);
                /* What has no weight counts nothing, however far apart the two are. */
                sum_gap += weight == 0.0f ? 0.0f : weight * (u - w);
                sum_below += weight == 0.0f ? 0.0f : weight * u;
            }
            total_x += sum_x, total_y += sum_y, gap += sum_gap, below += sum_below;
        }
        double log_x = log(total_x), log_y = log(total_y), kl = gap / total_x - log_x + log_y;
        found[4 * row] = kl > 0 ? (float)kl : 0.0f;
        found[4 * row + 1] = top_x + (float)log_x;
        found[4 * row + 2] = top_y + (float)log_y;
        found[4 * row + 3] = (float)(log_x - below / total_x);
    }
}
#endif
