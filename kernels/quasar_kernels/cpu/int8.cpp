#include "exports.h"
#include "int8_matmul.h"

MATMUL(linear_w8a8) { multiply<Int8Matmul>(*weight, {x, token_scales, out, bias, rows, flags, threads}); }

MATMUL(linear_w8a16) {
    multiply<Int8WideMatmul>(*weight, {x, token_scales, out, bias, rows, flags, threads});
}
