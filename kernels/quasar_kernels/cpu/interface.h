// The types of the C interface. `packing.py` declares the same structure for ctypes.
#pragma once

#include <cstdint>

enum NumberKind : int32_t { FLOAT32_NUMBERS = 0, FLOAT16_NUMBERS = 1 };
// ZERO_MIDDLE: the zero point is the middle of the range, 8 for 4 bits and 0 for int8. ZERO_MINIMUM: there is no zero
// point, but a minimum, and a weight is `q * scale - minimum`.
enum ZeroKind : int32_t { ZERO_MIDDLE = 0, ZERO_NIBBLE = 1, ZERO_FLOAT32 = 2, ZERO_MINIMUM = 3 };
enum RequestFlags : int32_t {
    ACTIVATIONS_BFLOAT16 = 1,  // dtype of activations and output; float32 if not set
    BIAS_BFLOAT16 = 2,
    // The activations are already quantized, with token_scales [rows][groups]. ACTIVATIONS_BFLOAT16 is then the dtype
    // of the output.
    ACTIVATIONS_INT8 = 4,
};

// One number for every output and group: values [outputs / 16][groups >> shift][16], each of which 2^shift groups
// share, times factors [outputs / 16][groups][16], or null if there are none.
struct GroupNumbers {
    const uint8_t* values;
    const int8_t* factors;
    int32_t kind;
    int32_t shift;
};

// A packed weight. Sixteen outputs form a block. Within a block the 32-bit units of the outputs are interleaved, so
// that one 64-byte vector contains the same unit of sixteen outputs: values [outputs / 16][units][16]. A unit is four
// int8 (stored as w + 128), two bfloat16, one float32, or eight 4-bit integers: k = 0..3 in the low halves of its
// bytes, k = 4..7 in the high halves. Scales, zero points and minimums are in the same blocks, [outputs / 16][groups]
// [16]. Int8 weights without `scaled_in_groups` have one float32 scale per output; their groups are those of the int8
// activations, and 0 means one per token.
struct Weight {
    int64_t outputs;
    int64_t inputs;
    int64_t group_size;
    const uint8_t* values;
    const uint8_t* zeros;
    GroupNumbers scales;
    GroupNumbers minimums;
    float scale_unit;  // a power of two that all 16-bit scales are multiplied by
    int32_t zero_kind;
    int32_t scaled_in_groups;
};

struct Request {
    const uint8_t* x;
    const float* token_scales;
    uint8_t* out;
    const uint8_t* bias;
    int64_t rows;
    int32_t flags;
    int32_t threads;

    bool bfloat16() const { return flags & ACTIVATIONS_BFLOAT16; }
    bool quantized() const { return flags & ACTIVATIONS_INT8; }
    bool bias_bfloat16() const { return flags & BIAS_BFLOAT16; }
};
