#include "exports.h"
#include "int8_product.h"

MATMUL(linear_w8a8) { multiply<Int8Product>(*weight, {x, token_scales, out, bias, rows, flags, threads}); }

MATMUL(linear_w8a16) {
    multiply<Int8WideProduct>(*weight, {x, token_scales, out, bias, rows, flags, threads});
}
