// Every function of the library and its arguments. This is the only list: `exports.h` declares from it, `replay.cpp`
// makes recorded calls from it, and `functions.py` parses it for ctypes. A file that includes it first defines
// FUNCTION(name, arguments...), so it has no include guard.

// All matmuls take the same arguments: x [rows][inputs], out [rows][outputs], bias [outputs] or null, and token_scales
// [rows][groups] if x is int8, else null.
#define MATMUL_ARGUMENTS                                                                                          \
    const Weight *weight, const uint8_t *x, const float *token_scales, uint8_t *out, const uint8_t *bias,         \
        int64_t rows, int32_t flags, int32_t threads
FUNCTION(linear_w8a8, MATMUL_ARGUMENTS)
FUNCTION(linear_w8a16, MATMUL_ARGUMENTS)
FUNCTION(linear_w4a8, MATMUL_ARGUMENTS)
FUNCTION(linear_w4a16, MATMUL_ARGUMENTS)
FUNCTION(linear_bf16, MATMUL_ARGUMENTS)
FUNCTION(linear_f32, MATMUL_ARGUMENTS)

// The ops between the matmuls take bfloat16. They write bfloat16 to `out`, or int8 to `quantized` [rows][size] and
// scales to `scales` [rows][size / group].

// Normalizes the rows of x [rows][size]. If there is a residual, it normalizes x + residual and writes that sum to
// `total`. If one_plus is not 0, the factor is 1 + weight, and the product with it is rounded once.
FUNCTION(rms_norm, const uint8_t *x, const uint8_t *residual, const uint8_t *weight, uint8_t *total, uint8_t *out,
         int8_t *quantized, float *scales, int64_t rows, int64_t size, int64_t group, float eps, int32_t one_plus,
         int32_t threads)

// Computes silu(gate) * up, or gelu(gate) * up with the approximation of GELU by tanh, from gate_up [rows][2][size]. The
// first factor is rounded to bfloat16.
FUNCTION(silu_mul, const uint8_t *gate_up, uint8_t *out, int8_t *quantized, float *scales, int64_t rows, int64_t size,
         int64_t group, int32_t threads)
FUNCTION(gelu_mul, const uint8_t *gate_up, uint8_t *out, int8_t *quantized, float *scales, int64_t rows, int64_t size,
         int64_t group, int32_t threads)

// Computes x + factor * update [rows][size]. The product is rounded to bfloat16.
FUNCTION(add_scaled, const uint8_t *x, const uint8_t *update, uint8_t *out, int64_t rows, int64_t size, float factor,
         int32_t threads)

// Writes the argmax of each row of x [rows][size], the first one if several values are largest. No value is NaN.
FUNCTION(first_maxima, const uint8_t *x, int64_t *indices, int64_t rows, int64_t size, int32_t threads)

// Writes element order[k] of a row of x [rows][size] to element k of the row of out. order: a permutation of the inputs.
FUNCTION(select_inputs, const uint16_t *x, const int64_t *order, uint16_t *out, int64_t rows, int64_t size,
         int32_t threads)

// Takes qkv [rows][heads + 2 * kv_heads][head_dim] and cosines, sines [rows][head_dim]. Rotated queries go to q
// [rows][heads][head_dim]; rotated keys and values go to the slots from `*start` on. q_weight, k_weight: weights of the
// norms, or null: [head_dim] of every head, or, if whole_norm is not 0, [heads][head_dim] of all heads together. For
// one_plus, see rms_norm.
//
// keys, values [kv_heads][capacity][head_dim] are bfloat16 if bits is 16. If it is 8 or 4, they are codes, and their
// scales are float32 [kv_heads][capacity], or float16 [kv_heads][capacity][head_dim / 32][2] with a minimum after each
// scale; queries and keys are then rotated by a Hadamard matrix too.
FUNCTION(rotary_write, const uint8_t *qkv, const float *cosines, const float *sines, const uint8_t *q_weight,
         const uint8_t *k_weight, uint8_t *q, uint8_t *keys, uint8_t *values, uint8_t *key_scales,
         uint8_t *value_scales, const int64_t *start, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim,
         int64_t capacity, int64_t bits, float eps, int32_t one_plus, int32_t whole_norm, int32_t threads)

// q and out [rows][heads][head_dim]; keys and values as above; head_dim is a multiple of 32, at most 512. Every row
// attends to all slots below `*start`, and to row j of the block, in slot `*start + j`, if its element j of mask
// [rows][rows] is nonzero. If window is not 0, a row attends only to the last `window` positions up to its own. If
// softcap is not 0, a score s becomes softcap * tanh(s / softcap). If scale is 0, it is 1 / sqrt(head_dim).
FUNCTION(attention, const uint16_t *q, uint8_t *keys, uint8_t *values, uint8_t *key_scales, uint8_t *value_scales,
         const uint8_t *mask, uint16_t *out, const int64_t *start, int64_t rows, int64_t heads, int64_t kv_heads,
         int64_t head_dim, int64_t capacity, int64_t bits, int64_t window, float softcap, float scale, int32_t threads)

// Requests huge pages for a buffer that has not been written yet.
FUNCTION(advise_huge_pages, uint8_t *memory, int64_t bytes)
