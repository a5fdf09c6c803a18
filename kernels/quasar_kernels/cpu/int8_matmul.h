// Matmuls of int8 weights with int8 activations, or with activations of 15 bits.
#pragma once

#include "groups.h"

namespace {

#ifdef HAS_TILES
// From this number of rows on, dot products with sixteen vectors of weights (half a cycle for each vector and row) take
// longer than one multiplication of tiles, each of which waits for the sums of the one before (52 cycles).
constexpr int64_t LEAST_ROWS_FOR_TILES = 8;

struct Int8Registers : SingleTerm {
    using Registers = JobTiles;
    static bool uses_tiles(const Request& request) { return request.rows >= LEAST_ROWS_FOR_TILES; }
};
#else
using Int8Registers = VectorsOnly;
#endif

#define FOR_EACH_TOKEN _Pragma("GCC unroll 16") for (int token = 0; token < ROWS / TERMS; ++token)

// Adds dot products of `count` units to sums, one per row of activations, and advances both pointers.
template <int ROWS>
inline void add_byte_products(int64_t count, const int32_t*& units, const uint8_t*& values, Ints (&sums)[ROWS]) {
#pragma GCC unroll 4
    for (int64_t unit = 0; unit < count; ++unit) {
        prefetch(values);
        const Bytes weights = prepare_bytes(load_ints(values));
        FOR_EACH_ROW sums[row] = dot_bytes(sums[row], weights, units[row]);
        values += 64;
        units += ROWS;
    }
}

// Computes the dot products of a tile's bytes, one per row of activations.
template <int ROWS>
inline void multiply_bytes(const Job& job, Tile tile, int64_t block, Ints (&sums)[ROWS]) {
    const int32_t* units = tile_units(job, tile);
    const uint8_t* values = job.block_values(block);
    FOR_EACH_ROW sums[row] = broadcast_int(job.activations.offsets[tile.first_row + row]);
    add_byte_products<ROWS>(job.units, units, values, sums);
}

struct Int8Matmul : Int8Registers {
    static constexpr int64_t INPUTS_PER_UNIT = 4;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = 4;

    static bool reads_activations(const Request& request) { return request.quantized(); }

    static void prepare_row(const Job& job, int64_t row) {
        *prepare_quantized_row(job, row) *= -BYTE_OFFSET;
    }

    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
#ifdef HAS_TILES
        if (uses_tiles(job.request)) return multiply_in_tiles<ROWS>(job, tile, block, results);
#endif
        Ints sums[ROWS];
        multiply_bytes<ROWS>(job, tile, block, sums);
        FOR_EACH_ROW store_float32(results + row * LANES, to_floats(sums[row]));
    }

    static Floats scale(const Job& job, int64_t row, int64_t block, Floats sums) {
        const Floats scales = load_float32(job.weight.scales.values + 4 * block * LANES);
        return multiply(sums, multiply(broadcast(job.activations.scales[row]), scales));
    }

#ifdef HAS_TILES
   private:
    template <int ROWS>
    static void multiply_in_tiles(const Job& job, Tile tile, int64_t block, float* results) {
        alignas(64) int32_t sums[ROWS * LANES];
        FOR_EACH_ROW store_ints(sums + row * LANES, broadcast_int(job.activations.offsets[tile.first_row + row]));
        multiply_block<TileKind::SIGNED_BY_UNSIGNED_BYTES>(job, tile, block, sums);
        FOR_EACH_ROW store_float32(results + row * LANES, to_floats(load_ints(sums + row * LANES)));
    }
#endif
};

// Activations have a scale for each group of inputs, weights one for each output. Within a group the sum is exact. The
// groups are then scaled and added in ascending order. Every product and every sum is rounded, as in the reference.
struct Int8GroupsMatmul : VectorsOnly {
    static constexpr int64_t INPUTS_PER_UNIT = 4;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = 4;

    static bool reads_activations(const Request& request) { return request.quantized(); }

    static void prepare_row(const Job& job, int64_t row) {
        int32_t* offsets = prepare_quantized_row(job, row);
        for (int64_t group = 0; group < job.groups; ++group) offsets[group] *= -BYTE_OFFSET;
    }

    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
        const int32_t* units = tile_units(job, tile);
        const int32_t* offsets = job.activations.offsets + tile.first_row * job.groups;
        const float* token_scales = job.activations.scales + tile.first_row * job.groups;
        const uint8_t* values = job.block_values(block);
        const int64_t group_units = job.weight.group_size / INPUTS_PER_UNIT;
        Floats totals[ROWS];
        FOR_EACH_ROW totals[row] = zero_floats();
        for (int64_t group = 0; group < job.groups; ++group) {
            Ints sums[ROWS];
            FOR_EACH_ROW sums[row] = broadcast_int(offsets[row * job.groups + group]);
            add_byte_products<ROWS>(group_units, units, values, sums);
            FOR_EACH_ROW {
                const Floats scale = broadcast(token_scales[row * job.groups + group]);
                totals[row] = add(totals[row], multiply(to_floats(sums[row]), scale));
            }
        }
        FOR_EACH_ROW store_float32(results + row * LANES, totals[row]);
    }

    static Floats scale(const Job& job, int64_t, int64_t block, Floats totals) {
        return multiply(totals, load_float32(job.weight.scales.values + 4 * block * LANES));
    }
};

constexpr float HIGH_UNIT = 128.0f;

// Activations that are rounded to integers of 15 bits, 128 * high + low, and the sums of both terms.
struct WideActivations {
    float scale;
    int32_t high_sum, low_sum;
};

// Rounds `count` activations from element `first` on, with one scale.
inline WideActivations round_to_wide(const Request& request, int64_t first, int64_t count, int8_t* high, int8_t* low) {
    constexpr float LARGEST = 127 * HIGH_UNIT;  // the high term of this value is the largest int8
    Floats largest = zero_floats();
    for (int64_t k = 0; k < count; k += LANES)
        largest = larger_magnitude(largest, load_activations(request, first + k));
    const float magnitude = largest_lane(largest) / LARGEST, scale = magnitude > 0 ? magnitude : 1.0f;
    Ints high_sum = broadcast_int(0), low_sum = broadcast_int(0);
    for (int64_t k = 0; k < count; k += LANES) {
        const Floats values = round_to_integers(divide(load_activations(request, first + k), broadcast(scale)));
        const Floats multiples = round_to_integers(multiply(values, broadcast(1 / HIGH_UNIT)));
        const Ints highs = round_to_ints(multiples);
        const Ints lows = round_to_ints(subtract_product(values, multiples, broadcast(HIGH_UNIT)));
        store_int8(high + k, highs);
        store_int8(low + k, lows);
        high_sum = add_ints(high_sum, highs);
        low_sum = add_ints(low_sum, lows);
    }
    return {scale, sum_lanes(high_sum), sum_lanes(low_sum)};
}

// Activations are rounded to integers of 15 bits, and each of the two terms is a separate row. The int8 dot products
// are exact, and the weights need not be widened to 16 bits.
struct Int8WideMatmul : VectorsOnly {
    static constexpr int64_t TERMS = 2;
    static constexpr int64_t INPUTS_PER_UNIT = 4;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = 4;

    static bool reads_activations(const Request&) { return false; }

    static void prepare_row(const Job& job, int64_t token) {
        const int64_t inputs = job.weight.inputs;
        int8_t* high = reinterpret_cast<int8_t*>(job.activations.scratch + TERMS * token * job.units);
        const WideActivations wide = round_to_wide(job.request, token * inputs, inputs, high, high + inputs);
        job.activations.offsets[TERMS * token] = -BYTE_OFFSET * wide.high_sum;
        job.activations.offsets[TERMS * token + 1] = -BYTE_OFFSET * wide.low_sum;
        job.activations.scales[token] = wide.scale;
    }

    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
        if constexpr (ROWS % TERMS == 0) {
            Ints sums[ROWS];
            multiply_bytes<ROWS>(job, tile, block, sums);
            for (int row = 0; row < ROWS; row += TERMS, results += LANES)
                store_float32(results, multiply_add(to_floats(sums[row]), broadcast(HIGH_UNIT), to_floats(sums[row + 1])));
        }
    }

    static Floats scale(const Job& job, int64_t token, int64_t block, Floats sums) {
        return Int8Matmul::scale(job, token, block, sums);
    }
};

// Weights have a scale for each group of inputs, and so have the activations, which are rounded to integers of 15 bits.
struct Int8GroupsWideMatmul : VectorsOnly {
    static constexpr int64_t TERMS = 2;
    static constexpr int64_t INPUTS_PER_UNIT = 4;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = 4;

    static bool reads_activations(const Request&) { return false; }

    static void prepare_row(const Job& job, int64_t token) {
        const int64_t inputs = job.weight.inputs, size = job.weight.group_size, groups = job.groups;
        int8_t* high = reinterpret_cast<int8_t*>(job.activations.scratch + TERMS * token * job.units);
        int8_t* low = high + inputs;
        int32_t* offsets = job.activations.offsets + TERMS * token * groups;
        for (int64_t group = 0; group < groups; ++group, high += size, low += size) {
            const WideActivations wide = round_to_wide(job.request, token * inputs + group * size, size, high, low);
            offsets[group] = -BYTE_OFFSET * wide.high_sum;
            offsets[groups + group] = -BYTE_OFFSET * wide.low_sum;
            job.activations.scales[token * groups + group] = wide.scale;
            job.activations.sums[token * groups + group] =
                HIGH_UNIT * static_cast<float>(wide.high_sum) + static_cast<float>(wide.low_sum);
        }
    }

    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
        if constexpr (ROWS % TERMS == 0) {
            const Weight& weight = job.weight;
            const int64_t groups = job.groups, group_units = weight.group_size / INPUTS_PER_UNIT;
            const int64_t first_token = tile.first_row / TERMS;
            const int32_t* units = tile_units(job, tile);
            const int32_t* offsets = job.activations.offsets + tile.first_row * groups;
            const float* token_sums = job.activations.sums + first_token * groups;
            const float* token_scales = job.activations.scales + first_token * groups;
            const uint8_t* values = job.block_values(block);
            Floats totals[ROWS / TERMS];
            FOR_EACH_TOKEN totals[token] = zero_floats();
            for (int64_t group = 0; group < groups; ++group) {
                Ints sums[ROWS];
                FOR_EACH_ROW sums[row] = broadcast_int(offsets[row * groups + group]);
                add_byte_products<ROWS>(group_units, units, values, sums);
                const Floats scales = group_numbers(weight.scales, block, group, groups);
                Floats products[ROWS / TERMS];
                FOR_EACH_TOKEN {
                    const Floats high = to_floats(sums[TERMS * token]), low = to_floats(sums[TERMS * token + 1]);
                    products[token] = multiply(multiply_add(high, broadcast(HIGH_UNIT), low), scales);
                }
                if (weight.zero_kind == ZERO_MINIMUM) {
                    const Floats minimums = group_numbers(weight.minimums, block, group, groups);
                    FOR_EACH_TOKEN {
                        const Floats sum = broadcast(token_sums[token * groups + group]);
                        products[token] = subtract_product(products[token], sum, minimums);
                    }
                }
                FOR_EACH_TOKEN {
                    const Floats scale = broadcast(token_scales[token * groups + group]);
                    totals[token] = multiply_add(products[token], scale, totals[token]);
                }
            }
            FOR_EACH_TOKEN store_float32(results + token * LANES, totals[token]);
        }
    }

    static Floats scale(const Job&, int64_t, int64_t, Floats totals) { return totals; }
};

// Weights have a scale for each group of inputs, and activations are float32. Weights are converted in registers.
struct Int8GroupsFloatMatmul : VectorsOnly {
    static constexpr int64_t INPUTS_PER_UNIT = 1;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = 4;

    static bool reads_activations(const Request&) { return true; }

    static void prepare_row(const Job& job, int64_t row) {
        if (job.weight.zero_kind != ZERO_MIDDLE) sum_groups(job, row);
    }

    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
        const float* x = reinterpret_cast<const float*>(tile_units(job, tile));
        const float* group_sums = job.activations.sums + tile.first_row * job.groups;
        const uint8_t* values = job.block_values(block);
        Floats totals[ROWS];
        FOR_EACH_ROW totals[row] = zero_floats();
        for (int64_t group = 0; group < job.groups; ++group) {
            Floats sums[ROWS];
            FOR_EACH_ROW sums[row] = zero_floats();
            for (int64_t k = 0; k < job.weight.group_size; k += INPUTS_PER_WEIGHT_UNIT) {
                prefetch(values);
                const Ints packed = load_ints(values);
                add_bytes_of<ROWS, 0>(sums, packed, x);
                add_bytes_of<ROWS, 8>(sums, packed, x + ROWS);
                add_bytes_of<ROWS, 16>(sums, packed, x + 2 * ROWS);
                add_bytes_of<ROWS, 24>(sums, packed, x + 3 * ROWS);
                values += 64;
                x += INPUTS_PER_WEIGHT_UNIT * ROWS;
            }
            add_group<0>(job, block, group, sums, group_sums, totals);
        }
        FOR_EACH_ROW store_float32(results + row * LANES, totals[row]);
    }

    static Floats scale(const Job&, int64_t, int64_t, Floats totals) { return totals; }

   private:
    template <int ROWS, int SHIFT>
    static inline void add_bytes_of(Floats (&sums)[ROWS], Ints packed, const float* x) {
        const Floats weights = signed_bytes<SHIFT>(packed);
        FOR_EACH_ROW sums[row] = multiply_add(broadcast(x[row]), weights, sums[row]);
    }
};

}  // namespace
