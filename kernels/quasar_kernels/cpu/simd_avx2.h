// Sixteen-lane vectors for processors with AVX2, FMA and F16C. Every vector is a pair of registers.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

// Four accumulators of two registers each leave half of the 16 registers to weights and temporaries.
constexpr int MAX_TILE_ROWS = 4;

// Stored bytes are w + 128. They are converted back to signed weights here, so accumulators start at zero.
constexpr int32_t BYTE_OFFSET = 0;

struct Floats {
    __m256 low, high;
};
struct Ints {
    __m256i low, high;
};
// maddubs adds two products in 16 bits and saturates. Its unsigned operand is |w| <= 128, and the sign of the weight is
// moved to the activation, whose magnitude is at most 127. The sum is at most 2 * 128 * 127 = 32512, so it is exact.
struct Bytes {
    Ints magnitudes, signs;
};

inline Ints load_ints(const void* source) {
    const __m256i* halves = static_cast<const __m256i*>(source);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline Ints broadcast_int(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Floats to_floats(Ints values) { return {_mm256_cvtepi32_ps(values.low), _mm256_cvtepi32_ps(values.high)}; }

inline Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats divide(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats subtract_product(Floats c, Floats a, Floats b) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats larger_magnitude(Floats largest, Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_max_ps(_mm256_andnot_ps(sign, x.low), largest.low),
            _mm256_max_ps(_mm256_andnot_ps(sign, x.high), largest.high)};
}
inline float largest_lane(Floats values) {
    const __m256 eight = _mm256_max_ps(values.low, values.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float sum_floats(Floats values) {
    const __m256 eight = _mm256_add_ps(values.low, values.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats round_to_integers(Floats values) {  // ties to even
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(values.low, mode), _mm256_round_ps(values.high, mode)};
}
// Returns the values where x >= least, and 0 elsewhere.
inline Floats keep_from(Floats values, Floats x, float least) {
    const __m256 bound = _mm256_set1_ps(least);
    return {_mm256_and_ps(values.low, _mm256_cmp_ps(x.low, bound, _CMP_GE_OQ)),
            _mm256_and_ps(values.high, _mm256_cmp_ps(x.high, bound, _CMP_GE_OQ))};
}
// Returns the values where the byte is not 0, and -infinity elsewhere.
inline __m256 mask_eight(__m256 values, const uint8_t* visible) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(visible)));
    const __m256 hidden = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bytes, _mm256_setzero_si256()));
    return _mm256_blendv_ps(values, _mm256_set1_ps(-INFINITY), hidden);
}
inline Floats mask_invisible(Floats values, const uint8_t* visible) {
    return {mask_eight(values.low, visible), mask_eight(values.high, visible + 8)};
}
// Returns one bit per lane, which is set if both are equal.
inline uint32_t equal_lanes(Floats a, Floats b) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ));
    return static_cast<uint32_t>(low | high << 8);
}
// Returns 2^n for integers n in [-126, 127].
inline __m256 eight_powers_of_two(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Floats power_of_two(Floats n) { return {eight_powers_of_two(n.low), eight_powers_of_two(n.high)}; }

// Transposes sixteen rows of sixteen 32-bit units to [unit][16].
inline void transpose(const int32_t* const (&rows)[16], int64_t first, int32_t* target) {
    for (int row = 0; row < 16; ++row)
        for (int unit = 0; unit < 16; ++unit) target[16 * unit + row] = rows[row][first + unit];
}

inline Floats load_float32(const void* source) {
    const float* lanes = static_cast<const float*>(source);
    return {_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)};
}
inline Floats load_float16(const void* source) {
    const __m128i* halves = static_cast<const __m128i*>(source);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline __m256 widen_bfloat16(__m128i values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}
inline Floats load_bfloat16(const void* source) {
    const __m128i* halves = static_cast<const __m128i*>(source);
    return {widen_bfloat16(_mm_loadu_si128(halves)), widen_bfloat16(_mm_loadu_si128(halves + 1))};
}
inline void store_float32(void* target, Floats values) {
    float* lanes = static_cast<float*>(target);
    _mm256_storeu_ps(lanes, values.low);
    _mm256_storeu_ps(lanes + 8, values.high);
}
// Rounds to the nearest bfloat16, ties to even, as PyTorch does; NaN stays NaN. The result is in the low half of each
// lane.
inline __m256i round_to_bfloat16(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
}
inline void store_bfloat16(void* target, Floats values) {
    const __m256i packed = _mm256_packus_epi32(round_to_bfloat16(values.low), round_to_bfloat16(values.high));
    // The instruction packs within 128-bit halves, so the quarters are put back in order.
    _mm256_storeu_si256(static_cast<__m256i*>(target), _mm256_permute4x64_epi64(packed, 0b11011000));
}
inline Ints round_to_ints(Floats values) {  // ties to even
    return {_mm256_cvtps_epi32(values.low), _mm256_cvtps_epi32(values.high)};
}
inline Ints add_ints(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline int32_t sum_lanes(Ints values) {
    const __m256i eight = _mm256_add_epi32(values.low, values.high);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 1)));
}
inline Ints load_int8(const void* source) {
    const __m128i lanes = _mm_loadu_si128(static_cast<const __m128i*>(source));
    return {_mm256_cvtepi8_epi32(lanes), _mm256_cvtepi8_epi32(_mm_srli_si128(lanes, 8))};
}
inline void store_int8(int8_t* target, Ints values) {
    // The instructions pack within 128-bit halves, so the quarters are put back in order.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(values.low, values.high), 0b11011000);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
}
// Loads sixteen 4-bit integers from eight bytes; the even lanes are in the low halves.
inline Floats load_nibbles(const void* source) {
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(source));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(bytes, mask);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    const __m128i lanes = _mm_unpacklo_epi8(even, odd);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(lanes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(lanes, 8)))};
}

inline Bytes prepare_bytes(Ints stored) {
    const __m256i offset = _mm256_set1_epi8(-128);
    const Ints weights = {_mm256_xor_si256(stored.low, offset), _mm256_xor_si256(stored.high, offset)};
    return {{_mm256_abs_epi8(weights.low), _mm256_abs_epi8(weights.high)}, weights};
}
inline __m256i add_pairs(__m256i sum, __m256i words) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
inline Ints dot_bytes(Ints sum, Bytes weights, int32_t activations) {
    const __m256i x = _mm256_set1_epi32(activations);
    return {add_pairs(sum.low, _mm256_maddubs_epi16(weights.magnitudes.low, _mm256_sign_epi8(x, weights.signs.low))),
            add_pairs(sum.high, _mm256_maddubs_epi16(weights.magnitudes.high, _mm256_sign_epi8(x, weights.signs.high)))};
}
inline Ints low_nibbles(Ints packed) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(packed.low, mask), _mm256_and_si256(packed.high, mask)};
}
inline Ints high_nibbles(Ints packed) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(packed.low, 4), mask),
            _mm256_and_si256(_mm256_srli_epi16(packed.high, 4), mask)};
}
inline Ints dot_nibbles(Ints sum, Ints weights, int32_t activations) {
    const __m256i x = _mm256_set1_epi32(activations);
    return {add_pairs(sum.low, _mm256_maddubs_epi16(weights.low, x)),
            add_pairs(sum.high, _mm256_maddubs_epi16(weights.high, x))};
}

// Returns the BITS bits of every lane that begin at bit SHIFT, minus the middle of their range.
template <int SHIFT, int BITS>
inline Floats centered_bits(Ints packed) {
    const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1), middle = _mm256_set1_epi32(1 << (BITS - 1));
    const __m256i low = _mm256_and_si256(_mm256_srli_epi32(packed.low, SHIFT), mask);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi32(packed.high, SHIFT), mask);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(low, middle)), _mm256_cvtepi32_ps(_mm256_sub_epi32(high, middle))};
}

// Returns nibble SHIFT / 4 of every lane minus 8.
template <int SHIFT>
inline Floats centered_nibbles(Ints packed) {
    return centered_bits<SHIFT, 4>(packed);
}

// Returns byte SHIFT / 8 of every lane minus 128.
template <int SHIFT>
inline Floats signed_bytes(Ints packed) {
    return centered_bits<SHIFT, 8>(packed);
}

inline Floats even_bfloat16(Ints pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs.low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(pairs.high, 16))};
}
inline Floats odd_bfloat16(Ints pairs) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(pairs.low, mask)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs.high, mask))};
}

}  // namespace
