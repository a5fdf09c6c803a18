#pragma once

#ifdef __AVX512VNNI__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif
