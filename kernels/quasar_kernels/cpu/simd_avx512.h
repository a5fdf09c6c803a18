// Sixteen-lane vectors for processors with AVX512-VNNI, and AVX512-BF16 where the compiler flags allow it.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

// Sixteen accumulators leave half of the 32 registers to weights, scales and constants.
constexpr int MAX_TILE_ROWS = 16;

// dpbusd multiplies unsigned weights by signed activations. Stored bytes are w + 128, and accumulators start at
// -128 * (sum of the activations), so the result is exact.
constexpr int32_t BYTE_OFFSET = 128;

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;

inline Ints load_ints(const void* source) { return _mm512_loadu_si512(source); }
inline void store_ints(void* target, Ints values) { _mm512_storeu_si512(target, values); }
inline Ints broadcast_int(int32_t value) { return _mm512_set1_epi32(value); }
inline Floats to_floats(Ints values) { return _mm512_cvtepi32_ps(values); }

inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats subtract_product(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats larger_magnitude(Floats largest, Floats x) { return _mm512_max_ps(_mm512_abs_ps(x), largest); }
inline float largest_lane(Floats values) { return _mm512_reduce_max_ps(values); }
inline float sum_floats(Floats values) { return _mm512_reduce_add_ps(values); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats round_to_integers(Floats values) {  // ties to even
    return _mm512_roundscale_ps(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Returns the values where x >= least, and 0 elsewhere.
inline Floats keep_from(Floats values, Floats x, float least) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_GE_OQ), values);
}
// Returns the values where the byte is not 0, and -infinity elsewhere.
inline Floats mask_invisible(Floats values, const uint8_t* visible) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(visible));
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), _mm_test_epi8_mask(bytes, bytes), values);
}
// Returns one bit per lane, which is set if both are equal.
inline uint32_t equal_lanes(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// Returns 2^n for integers n in [-126, 127].
inline Floats power_of_two(Floats n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}

inline Floats load_float32(const void* source) { return _mm512_loadu_ps(source); }
inline Floats load_float16(const void* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(source)));
}
inline Floats load_bfloat16(const void* source) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(source)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_float32(void* target, Floats values) { _mm512_storeu_ps(target, values); }
inline void store_bfloat16(void* target, Floats values) {
    // Rounds to the nearest bfloat16, ties to even, as PyTorch does; NaN stays NaN.
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(static_cast<__m256i*>(target), _mm512_cvtepi32_epi16(rounded));
}
inline Ints round_to_ints(Floats values) { return _mm512_cvtps_epi32(values); }  // ties to even
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline int32_t sum_lanes(Ints values) { return _mm512_reduce_add_epi32(values); }
inline Ints load_int8(const void* source) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(source)));
}
inline void store_int8(int8_t* target, Ints values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_cvtsepi32_epi8(values));
}
// Loads sixteen 4-bit integers from eight bytes; the even lanes are in the low halves.
inline Floats load_nibbles(const void* source) {
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(source));
    const __m128i mask = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(bytes, mask);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)));
}

inline Bytes prepare_bytes(Ints stored) { return stored; }
inline Ints dot_bytes(Ints sum, Bytes weights, int32_t activations) {
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(activations));
}
inline Ints low_nibbles(Ints packed) { return _mm512_and_si512(packed, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints packed) {
    return _mm512_and_si512(_mm512_srli_epi16(packed, 4), _mm512_set1_epi8(15));
}
inline Ints dot_nibbles(Ints sum, Ints weights, int32_t activations) {
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(activations));
}

// Returns nibble SHIFT / 4 of every lane minus 8. The permutation uses only the low four bits of an index.
template <int SHIFT>
inline Floats centered_nibbles(Ints packed) {
    const Floats table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(SHIFT == 0 ? packed : _mm512_srli_epi32(packed, SHIFT), table);
}

// Returns byte SHIFT / 8 of every lane minus 128.
template <int SHIFT>
inline Floats signed_bytes(Ints packed) {
    const Ints bytes = _mm512_and_si512(_mm512_srli_epi32(packed, SHIFT), _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(bytes, _mm512_set1_epi32(128)));
}

inline Floats even_bfloat16(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline Floats odd_bfloat16(Ints pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
}

// Transposes sixteen rows of sixteen 32-bit units to [unit][16].
inline void transpose(const int32_t* const (&rows)[16], int64_t first, int32_t* target) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i] + first);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    // a[4 q + u]: unit u of every 128-bit quarter, of rows 4 q to 4 q + 3
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // For every u the quarters are a 4 x 4 matrix, which is transposed in two steps.
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
        const __m512i low = _mm512_shuffle_i32x4(a[u], a[4 + u], 0x44), low2 = _mm512_shuffle_i32x4(a[8 + u], a[12 + u], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(a[u], a[4 + u], 0xEE), high2 = _mm512_shuffle_i32x4(a[8 + u], a[12 + u], 0xEE);
        _mm512_storeu_si512(target + 16 * u, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(target + 16 * (4 + u), _mm512_shuffle_i32x4(low, low2, 0xDD));
        _mm512_storeu_si512(target + 16 * (8 + u), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(target + 16 * (12 + u), _mm512_shuffle_i32x4(high, high2, 0xDD));
    }
}

#ifdef __AVX512BF16__
inline Floats dot_bfloat16(Floats sum, Ints weights, int32_t activations) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(activations));
}

// Rounds to bfloat16, stores the result, and returns it as float32.
inline Floats store_rounded(void* target, Floats values) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(values);
    _mm256_storeu_si256(static_cast<__m256i*>(target), rounded);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}

// Forms pairs of the elements of two rows of 32 bfloat16. Of every eight pairs the first four go to `low`.
inline void pair_rows(const void* first, const void* second, Ints& low, Ints& high) {
    const Ints a = load_ints(first), b = load_ints(second);
    low = _mm512_unpacklo_epi16(a, b);
    high = _mm512_unpackhi_epi16(a, b);
}
// Stores 32 sums that were computed from pairs of `pair_rows`, in the order of the elements.
inline void store_paired(float* target, Floats low, Floats high) {
    const Floats front = _mm512_shuffle_f32x4(low, high, 0x44), back = _mm512_shuffle_f32x4(low, high, 0xEE);
    store_float32(target, _mm512_shuffle_f32x4(front, front, 0xD8));
    store_float32(target + 16, _mm512_shuffle_f32x4(back, back, 0xD8));
}

// Stores sixteen bfloat16 in the order in which `centered_bfloat16_nibbles` returns weights: of every eight elements,
// the pairs (0, 2), (1, 3), (4, 6), (5, 7).
inline void store_bfloat16_pairs(void* target, const void* source) {
    const __m256i natural = _mm256_loadu_si256(static_cast<const __m256i*>(source));
    const __m256i low = _mm256_shufflelo_epi16(natural, 0b11011000);
    _mm256_storeu_si256(static_cast<__m256i*>(target), _mm256_shufflehi_epi16(low, 0b11011000));
}

// Returns nibbles SHIFT / 4 and SHIFT / 4 + 4 of every lane minus 8, as a pair of bfloat16. The table repeats because
// the permutation uses five bits of an index, and the fifth bit belongs to the next nibble.
template <int SHIFT>
inline Ints centered_bfloat16_nibbles(Ints packed) {
    alignas(64) static constexpr uint16_t TABLE[32] = {
        0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000,
        0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040,
        0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};
    const Ints indices = SHIFT == 0 ? packed : _mm512_srli_epi16(packed, SHIFT);
    return _mm512_permutexvar_epi16(indices, _mm512_load_si512(TABLE));
}
#endif

}  // namespace
