// int8 weights × int8 activations.
#pragma once

#include "linear.h"

namespace {

#ifdef HAS_TILES
// From here on sixteen vectors of weights take dot products longer (half a cycle for each vector and row) than a
// product of tiles, which each have to wait for the sums of the last (52 cycles).
constexpr int64_t LEAST_ROWS_FOR_TILES = 8;

struct Int8Registers {
    using Registers = JobTiles;
    static bool uses_tiles(const Request& request) { return request.rows >= LEAST_ROWS_FOR_TILES; }
};
#else
using Int8Registers = VectorsOnly;
#endif

struct Int8Product : Int8Registers {
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
#ifdef HAS_TILES
        if (uses_tiles(job.request)) return multiply_in_tiles<ROWS>(job, tile, block, results);
#endif
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

#ifdef HAS_TILES
   private:
    template <int ROWS>
    static void multiply_in_tiles(const Job& job, Tile tile, int64_t block, float* results) {
        alignas(64) int32_t sums[ROWS * LANES];
        FOR_EACH_ROW store_ints(sums + row * LANES, broadcast_int(job.activations.offsets[tile.first_row + row]));
        add_block_product<TileKind::SIGNED_BY_UNSIGNED_BYTES>(job, tile, block, sums);
        FOR_EACH_ROW store_float32(results + row * LANES, to_floats(load_ints(sums + row * LANES)));
    }
#endif
};

}  // namespace
