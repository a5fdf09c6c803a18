// The exponential function and the hyperbolic tangent.
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

// Returns tanh(x) = 2 / (1 + e^-2x) - 1, with an error of about 1e-7.
inline Floats hyperbolic_tangent(Floats x) {
    // For x below -44, e^-2x would overflow; tanh is -1 in float32 there.
    const Floats bounded = larger(x, broadcast(-44.0f));
    const Floats denominator = add(broadcast(1.0f), exponential(multiply(bounded, broadcast(-2.0f))));
    return subtract(divide(broadcast(2.0f), denominator), broadcast(1.0f));
}

}  // namespace
