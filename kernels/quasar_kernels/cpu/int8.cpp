#include "exports.h"
#include "int8_matmul.h"

MATMUL(linear_w8a8) {
    const Request request{x, token_scales, out, bias, rows, flags, threads};
    if (weight->group_size != 0) return multiply<Int8GroupsMatmul>(*weight, request);
    multiply<Int8Matmul>(*weight, request);
}

MATMUL(linear_w8a16) {
    const Request request{x, token_scales, out, bias, rows, flags, threads};
    if (!weight->scaled_in_groups) return multiply<Int8WideMatmul>(*weight, request);
    if (request.bfloat16()) return multiply<Int8GroupsWideMatmul>(*weight, request);
    multiply<Int8GroupsFloatMatmul>(*weight, request);
}
