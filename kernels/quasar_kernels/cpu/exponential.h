// The exponential function.
#pragma once

#include "simd.h"

namespace {

constexpr float SMALLEST_EXPONENT = -87.0f;  // e^x is taken as 0 below it; the smallest normal float is near e^-87.3

// Returns e^x for x <= 88, to about one unit in the last place. e^x = 2^n e^r with |r| <= ln(2) / 2, and e^r is
// computed by its Taylor series up to r^6.
inline Floats exponential(Floats x) {
    const Floats bounded = larger(x, broadcast(SMALLEST_EXPONENT));
    const Floats n = round_to_integers(multiply(bounded, broadcast(1.44269504f)));
    // ln(2) is split into two parts. The product of n and the first part is exact.
    const Floats r = subtract_product(subtract_product(bounded, n, broadcast(0.693359375f)), n, broadcast(-2.12194440e-4f));
    Floats sum = broadcast(1.0f / 720);
    sum = multiply_add(sum, r, broadcast(1.0f / 120));
    sum = multiply_add(sum, r, broadcast(1.0f / 24));
    sum = multiply_add(sum, r, broadcast(1.0f / 6));
    sum = multiply_add(sum, r, broadcast(0.5f));
    sum = multiply_add(sum, r, broadcast(1.0f));
    sum = multiply_add(sum, r, broadcast(1.0f));
    return keep_from(multiply(sum, power_of_two(n)), x, SMALLEST_EXPONENT);
}

}  // namespace
