#include "exports.h"
#include "int8_matmul.h"

MATMUL(linear_w8a8) {
    const Request request{x, token_scales, out, bias, rows, flags, threads};
    if (weight->group_size != 0) return multiply<Int8GroupsMatmul>(*weight, request);
    multiply<Int8Matmul>(*weight, request);
}

MATMUL(linear_w8a16) {
    multiply<Int8WideMatmul>(*weight, {x, token_scales, out, bias, rows, flags, threads});
}
