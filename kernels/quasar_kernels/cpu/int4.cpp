#include "exports.h"
#include "int4_matmul.h"

MATMUL(linear_w4a8) { multiply<Int4Int8Matmul>(*weight, {x, token_scales, out, bias, rows, flags, threads}); }

MATMUL(linear_w4a16) {
    const Request request{x, token_scales, out, bias, rows, flags, threads};
#ifdef __AVX512BF16__
    if (request.bfloat16()) return multiply<Int4FloatMatmul<true>>(*weight, request);
#endif
    multiply<Int4FloatMatmul<false>>(*weight, request);
}
