// Matmuls with bfloat16 or float32 weights, which are the baseline of the low-bit matmuls.
#pragma once

#include "linear.h"

namespace {

enum class DenseKind {
    BFLOAT16_PAIRS,    // bfloat16 weights and activations, multiplied in pairs
    BFLOAT16_WEIGHTS,  // bfloat16 weights; weights and activations are widened to float32
    FLOAT32_WEIGHTS,
};

template <DenseKind KIND>
struct DenseRegisters : VectorsOnly {};

#ifdef HAS_TILES
// Tiles are used for any number of rows. The sums of a row must not depend on this number, and tiles add in another
// order than vectors.
template <>
struct DenseRegisters<DenseKind::BFLOAT16_PAIRS> : SingleTerm {
    using Registers = JobTiles;
    static constexpr bool uses_tiles(const Request&) { return true; }
};
#endif

template <DenseKind KIND>
struct DenseMatmul : DenseRegisters<KIND> {
    static constexpr int64_t INPUTS_PER_UNIT = KIND == DenseKind::BFLOAT16_PAIRS ? 2 : 1;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = KIND == DenseKind::FLOAT32_WEIGHTS ? 1 : 2;
    static constexpr int64_t UNITS_PER_VECTOR = INPUTS_PER_WEIGHT_UNIT / INPUTS_PER_UNIT;

    static bool reads_activations(const Request& request) {
        return KIND == DenseKind::BFLOAT16_PAIRS || !request.bfloat16();
    }

    static void prepare_row(const Job& job, int64_t row) {
        if (reads_activations(job.request)) return;
        const int64_t inputs = job.weight.inputs;
        int32_t* units = job.activations.scratch + row * job.units;
        for (int64_t k = 0; k < inputs; k += LANES)
            store_float32(units + k, load_activations(job.request, row * inputs + k));
    }

    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
#ifdef HAS_TILES
        if constexpr (KIND == DenseKind::BFLOAT16_PAIRS) {
            FOR_EACH_ROW store_float32(results + row * LANES, zero_floats());
            return multiply_block<TileKind::BFLOAT16_PAIRS>(job, tile, block, results);
        }
#endif
        const int32_t* units = tile_units(job, tile);
        const uint8_t* values = job.block_values(block);
        Floats sums[ROWS];
        FOR_EACH_ROW sums[row] = zero_floats();
#pragma GCC unroll 4
        for (int64_t vector = 0; vector < job.weight_units; ++vector) {
            prefetch(values);
            add_vector<ROWS>(sums, values, units);
            values += 64;
            units += UNITS_PER_VECTOR * ROWS;
        }
        FOR_EACH_ROW store_float32(results + row * LANES, sums[row]);
    }

    static Floats scale(const Job&, int64_t, int64_t, Floats sums) { return sums; }

   private:
    template <int ROWS>
    static inline void add_vector(Floats (&sums)[ROWS], const uint8_t* values, const int32_t* units) {
        const float* x = reinterpret_cast<const float*>(units);
        if constexpr (KIND == DenseKind::FLOAT32_WEIGHTS) {
            add_lanes<ROWS>(sums, load_float32(values), x);
        } else if constexpr (KIND == DenseKind::BFLOAT16_WEIGHTS) {
            const Ints pairs = load_ints(values);
            add_lanes<ROWS>(sums, even_bfloat16(pairs), x);
            add_lanes<ROWS>(sums, odd_bfloat16(pairs), x + ROWS);
        } else {
#ifdef __AVX512BF16__
            const Ints pairs = load_ints(values);
            FOR_EACH_ROW sums[row] = dot_bfloat16(sums[row], pairs, units[row]);
#endif
        }
    }

    template <int ROWS>
    static inline void add_lanes(Floats (&sums)[ROWS], Floats weights, const float* x) {
        FOR_EACH_ROW sums[row] = multiply_add(broadcast(x[row]), weights, sums[row]);
    }
};

}  // namespace
