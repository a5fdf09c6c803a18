#include "dense_matmul.h"
#include "exports.h"

MATMUL(linear_bf16) {
    const Request request{x, token_scales, out, bias, rows, flags, threads};
#ifdef __AVX512BF16__
    if (request.bfloat16()) return multiply<DenseMatmul<DenseKind::BFLOAT16_PAIRS>>(*weight, request);
#endif
    multiply<DenseMatmul<DenseKind::BFLOAT16_WEIGHTS>>(*weight, request);
}

MATMUL(linear_f32) {
    multiply<DenseMatmul<DenseKind::FLOAT32_WEIGHTS>>(*weight, {x, token_scales, out, bias, rows, flags, threads});
}
