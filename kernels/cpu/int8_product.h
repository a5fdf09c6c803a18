// int8 weights × int8 activations.
#pragma once

#include "linear.h"

namespace {

struct Int8Product {
    static constexpr int64_t INPUTS_PER_UNIT = 4;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = 4;

    static bool reads_activations(const Request& request) { return request.quantized(); }

    static void prepare_row(const Job& job, int64_t row) {
        const int64_t inputs = job.weight.inputs;
        int8_t* values = reinterpret_cast<int8_t*>(job.activations.scratch + row * job.units);
        int32_t& offset = job.activations.offsets[row];
        job.activations.scales[row] =
            job.request.quantized() ? sum_quantized_row(job.request, row, 1, inputs, &offset)
                                    : quantize_row(job.request, row * inputs, 1, inputs, values, &offset);
        offset *= -BYTE_OFFSET;
    }

    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
        const int32_t* units = tile_units(job, tile);
        const uint8_t* values = job.block_values(block);
        Ints sums[ROWS];
        FOR_EACH_ROW sums[row] = broadcast_int(job.activations.offsets[tile.first_row + row]);
#pragma GCC unroll 4
        for (int64_t unit = 0; unit < job.units; ++unit) {
            prefetch(values);
            const Bytes weights = prepare_bytes(load_ints(values));
            FOR_EACH_ROW sums[row] = dot_bytes(sums[row], weights, units[row]);
            values += 64;
            units += ROWS;
        }
        FOR_EACH_ROW store_float32(results + row * LANES, to_floats(sums[row]));
    }

    static Floats scale(const Job& job, int64_t row, int64_t block, Floats sums) {
        const Floats scales = load_float32(job.weight.scales + 4 * block * LANES);
        return multiply(sums, multiply(broadcast(job.activations.scales[row]), scales));
    }
};

}  // namespace
