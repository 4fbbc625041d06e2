/* Attention to INT8 keys and values, at the speed at which they are read. */

#include <stdint.h>
#include <string.h>

#define BLOCK 512
#define WIDEST 1024

/* A bf16 number as fp32. */
static float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

/* queries [heads, n, width]; codes [heads, length, width] and bf16 scales [heads, length], whose heads are so many
   elements apart; found [heads, n, length]. */
void int8_products(const float *queries, const int8_t *codes, const uint16_t *scales, float *found, int64_t heads,
                   int64_t n, int64_t length, int64_t width, int64_t codes_apart, int64_t scales_apart) {
    int64_t blocks = (length + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < heads * blocks; part++) {
        int64_t head = part / blocks, start = part % blocks * BLOCK;
        int64_t end = start + BLOCK < length ? start + BLOCK : length;
        const float *query = queries + head * n * width;
        float key[WIDEST];
        for (int64_t token = start; token < end; token++) {
            const int8_t *code = codes + head * codes_apart + token * width;
            float scale = widened(scales[head * scales_apart + token]);
            for (int64_t d = 0; d < width; d++) key[d] = code[d];
            for (int64_t row = 0; row < n; row++) {
                const float *with = query + row * width;
                float sum = 0;
                for (int64_t d = 0; d < width; d++) sum += key[d] * with[d];
                found[(head * n + row) * length + token] = sum * scale;
            }
        }
    }
}

/* Sums of INT8 values by weights [heads, n, length]; found [heads, n, width]. */
void int8_sums(const float *weights, const int8_t *codes, const uint16_t *scales, float *found, int64_t heads,
               int64_t n, int64_t length, int64_t width, int64_t codes_apart, int64_t scales_apart) {
#pragma omp parallel for schedule(static)
    for (int64_t head = 0; head < heads; head++) {
        float *sums = found + head * n * width;
        float value[WIDEST];
        memset(sums, 0, n * width * sizeof *sums);
        for (int64_t token = 0; token < length; token++) {
            const int8_t *code = codes + head * codes_apart + token * width;
            float scale = widened(scales[head * scales_apart + token]);
            for (int64_t d = 0; d < width; d++) value[d] = code[d];
            for (int64_t row = 0; row < n; row++) {
                float weight = weights[(head * n + row) * length + token] * scale;
                float *sum = sums + row * width;
                for (int64_t d = 0; d < width; d++) sum[d] += weight * value[d];
            }
        }
    }
}
