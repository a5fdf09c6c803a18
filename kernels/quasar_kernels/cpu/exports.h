// The C interface. Each source is compiled with the flags of one level of processor features; `simd.h` follows them.
#pragma once

#include "interface.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

#define FUNCTION(name, ...) EXPORTED void quasar_##name(__VA_ARGS__);
#include "functions.h"
#undef FUNCTION

#define MATMUL(name) void quasar_##name(MATMUL_ARGUMENTS)
