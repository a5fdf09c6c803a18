// The C interface: every product has the same signature. Each source is compiled with the flags of one level of
// processor features; `simd.h` follows them.
#pragma once

#include "interface.h"

#define EXPORT(name)                                                                                        \
    extern "C" __attribute__((visibility("default"))) void name(                                            \
        const Weight* weight, const uint8_t* x, const float* token_scales, uint8_t* out, const uint8_t* bias, \
        int64_t rows, int32_t flags, int32_t threads)
