// How the slots of a KV cache hold keys and values: as bfloat16, or as 8-bit or 4-bit codes with scales. The formats
// are those of `reference.quantize_slots`, and the results equal its results bit for bit.
#pragma once

#include <cmath>
#include <cstring>

#include "simd.h"

namespace {

constexpr int64_t SLOT_LANES = 16;
constexpr int64_t SLOT_GROUP = 32;  // elements that share a scale and a minimum in 4 bits
constexpr int64_t MAX_HEAD_DIM = 512;

// The keys or the values of a layer. Slot s of head h is row h * capacity + s.
struct Slots {
    uint8_t* codes;   // [kv_heads][capacity][head_dim], of 16 (bfloat16), 8 or 4 bits
    uint8_t* scales;  // float32 [kv_heads][capacity], or float16 [kv_heads][capacity][groups][2]: scale and minimum
    int64_t bits, head_dim, capacity;

    int64_t row(int64_t head, int64_t slot) const { return head * capacity + slot; }
    int64_t groups() const { return head_dim / SLOT_GROUP; }
    uint8_t* codes_of(int64_t row) const { return codes + row * head_dim * bits / 8; }
    uint8_t* scales_of(int64_t row) const { return scales + row * (bits == 8 ? 4 : 4 * groups()); }
};

inline bool has_nan(Floats values) { return equal_lanes(values, values) != 0xFFFF; }

// Rounds a scale or a minimum to float16, stores it, and returns it as float32.
inline float store_float16(uint8_t* target, float value) {
    const uint16_t half = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(target, &half, sizeof half);
    return _cvtsh_ss(half);
}

inline float read_float16(const uint8_t* source) {
    uint16_t half;
    std::memcpy(&half, source, sizeof half);
    return _cvtsh_ss(half);
}

inline void quantize_8_bit(const float* x, int64_t size, int8_t* codes, uint8_t* scales) {
    Floats largest = zero_floats();
    bool nan = false;
    for (int64_t k = 0; k < size; k += SLOT_LANES) {
        const Floats values = load_float32(x + k);
        largest = larger_magnitude(largest, values);
        nan |= has_nan(values);
    }
    float scale = largest_lane(largest) / 127.0f;
    if (nan) scale = NAN;
    if (scale == 0) scale = 1;
    std::memcpy(scales, &scale, sizeof scale);
    for (int64_t k = 0; k < size; k += SLOT_LANES)
        store_int8(codes + k, round_to_ints(divide(load_float32(x + k), broadcast(scale))));
}

// Quantizes one group of SLOT_GROUP elements. Byte j holds the codes of elements 2 j, in its low half, and 2 j + 1.
inline void quantize_4_bit(const float* x, uint8_t* codes, uint8_t* scales) {
    const Floats first = load_float32(x), second = load_float32(x + SLOT_LANES);
    const Floats zero = zero_floats();
    float largest = largest_lane(larger(first, second));
    const float least = -largest_lane(larger(subtract(zero, first), subtract(zero, second)));
    if (has_nan(first) || has_nan(second)) largest = NAN;
    float scale = store_float16(scales, (largest - least) / 15.0f);
    const float minimum = store_float16(scales + 2, largest != largest ? NAN : least);
    if (scale == 0) scale = store_float16(scales, 1);
    int8_t wide[SLOT_GROUP];
    for (int64_t k = 0; k < SLOT_GROUP; k += SLOT_LANES) {
        const Floats steps = divide(subtract(load_float32(x + k), broadcast(minimum)), broadcast(scale));
        // Rounding the scale and the minimum may move an element a little out of the range of the codes.
        const Floats bounded = subtract(zero, larger(subtract(zero, larger(steps, zero)), broadcast(-15.0f)));
        store_int8(wide + k, round_to_ints(bounded));
    }
    for (int64_t pair = 0; pair < SLOT_GROUP / 2; ++pair)
        codes[pair] = static_cast<uint8_t>(wide[2 * pair] | wide[2 * pair + 1] << 4);
}

// Quantizes a row of head_dim elements.
inline void write_row(const Slots& slots, int64_t row, const float* x) {
    uint8_t *codes = slots.codes_of(row), *scales = slots.scales_of(row);
    if (slots.bits == 8) {
        quantize_8_bit(x, slots.head_dim, reinterpret_cast<int8_t*>(codes), scales);
        return;
    }
    for (int64_t group = 0; group < slots.groups(); ++group)
        quantize_4_bit(x + group * SLOT_GROUP, codes + group * SLOT_GROUP / 2, scales + 4 * group);
}

inline void store_row_lanes(uint16_t* out, Floats values) {
#ifdef __AVX512BF16__
    store_rounded(out, values);
#else
    store_bfloat16(out, values);
#endif
}

// Writes a row to `out`, rounded to bfloat16.
inline void read_row(const Slots& slots, int64_t row, uint16_t* out) {
    const uint8_t *codes = slots.codes_of(row), *scales = slots.scales_of(row);
    if (slots.bits == 16) {
        std::memcpy(out, codes, slots.head_dim * sizeof *out);
    } else if (slots.bits == 8) {
        float scale;
        std::memcpy(&scale, scales, sizeof scale);
        for (int64_t k = 0; k < slots.head_dim; k += SLOT_LANES)
            store_row_lanes(out + k, multiply(to_floats(load_int8(codes + k)), broadcast(scale)));
    } else {
        for (int64_t k = 0; k < slots.head_dim; k += SLOT_LANES) {
            const uint8_t* own = scales + 4 * (k / SLOT_GROUP);
            const Floats steps = multiply(load_nibbles(codes + k / 2), broadcast(read_float16(own)));
            store_row_lanes(out + k, add(steps, broadcast(read_float16(own + 2))));
        }
    }
}

// Computes `reference.hadamard_transform` in place, with the same order of operations.
inline void hadamard_transform(float* x, int64_t size) {
    const int64_t order = size & -size;
    for (int64_t distance = 1; distance < order; distance *= 2)
        for (int64_t first = 0; first < size; first += 2 * distance) {
            float *low = x + first, *high = low + distance;
            if (distance < SLOT_LANES) {
                for (int64_t k = 0; k < distance; ++k) {
                    const float a = low[k], b = high[k];
                    low[k] = a + b, high[k] = a - b;
                }
                continue;
            }
            for (int64_t k = 0; k < distance; k += SLOT_LANES) {
                const Floats a = load_float32(low + k), b = load_float32(high + k);
                store_float32(low + k, add(a, b));
                store_float32(high + k, subtract(a, b));
            }
        }
    const Floats factor = broadcast(static_cast<float>(1 / std::sqrt(static_cast<double>(order))));
    for (int64_t k = 0; k < size; k += SLOT_LANES) store_float32(x + k, multiply(load_float32(x + k), factor));
}

}  // namespace
