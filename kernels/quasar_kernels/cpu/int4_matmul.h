// Matmuls of 4-bit weights in groups with int8 activations, or with activations that are not quantized.
#pragma once

#include "groups.h"

namespace {

constexpr int64_t INPUTS_PER_VECTOR = 8;  // inputs of each of sixteen outputs in 64 bytes of 4-bit integers

struct Int4Int8Matmul : VectorsOnly {
    static constexpr int64_t INPUTS_PER_UNIT = 4;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = INPUTS_PER_VECTOR;

    static bool reads_activations(const Request& request) { return request.quantized(); }

    static void prepare_row(const Job& job, int64_t row) {
        int32_t* offsets = prepare_quantized_row(job, row);
        float* sums = job.activations.sums + row * job.groups;
        for (int64_t group = 0; group < job.groups; ++group) {
            sums[group] = static_cast<float>(offsets[group]);
            offsets[group] *= job.weight.zero_kind == ZERO_MIDDLE ? -8 : 0;
        }
    }

    // Within a group the sum of token * (q - zero) is exact, or it is rounded once if the zero points are not integers.
    // The groups are then scaled and added in ascending order. Every product and every sum is rounded, as in the
    // reference.
    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
        const Weight& weight = job.weight;
        const int32_t* units = tile_units(job, tile);
        const int32_t* offsets = job.activations.offsets + tile.first_row * job.groups;
        const float* group_sums = job.activations.sums + tile.first_row * job.groups;
        const float* token_scales = job.activations.scales + tile.first_row * job.groups;
        const uint8_t* values = job.block_values(block);
        const int64_t vectors = weight.group_size / INPUTS_PER_VECTOR;
        Floats totals[ROWS];
        FOR_EACH_ROW totals[row] = zero_floats();
        for (int64_t group = 0; group < job.groups; ++group) {
            Ints sums[ROWS];
            FOR_EACH_ROW sums[row] = broadcast_int(offsets[row * job.groups]);
#pragma GCC unroll 2
            for (int64_t vector = 0; vector < vectors; ++vector) {
                prefetch(values);
                const Ints packed = load_ints(values);
                const Ints low = low_nibbles(packed), high = high_nibbles(packed);
                FOR_EACH_ROW sums[row] = dot_nibbles(sums[row], low, units[row]);
                FOR_EACH_ROW sums[row] = dot_nibbles(sums[row], high, units[ROWS + row]);
                values += 64;
                units += 2 * ROWS;
            }
            const Floats scales = group_numbers(weight.scales, block, group, job.groups);
            const auto add_scaled = [&](int row, Floats dot) {
                const Floats both = multiply(scales, broadcast(token_scales[row * job.groups]));
                totals[row] = add(totals[row], multiply(dot, both));
            };
            if (weight.zero_kind == ZERO_MIDDLE) {
                FOR_EACH_ROW add_scaled(row, to_floats(sums[row]));
            } else if (weight.zero_kind == ZERO_MINIMUM) {
                const Floats minimums = group_numbers(weight.minimums, block, group, job.groups);
                FOR_EACH_ROW {
                    const Floats product = multiply(to_floats(sums[row]), scales);
                    const Floats rest = subtract_product(product, broadcast(group_sums[row * job.groups]), minimums);
                    totals[row] = multiply_add(rest, broadcast(token_scales[row * job.groups]), totals[row]);
                }
            } else {
                const Floats zeros = group_zeros(weight, block, group, job.groups);
                FOR_EACH_ROW add_scaled(
                    row, subtract_product(to_floats(sums[row]), broadcast(group_sums[row * job.groups]), zeros));
            }
            ++offsets;
            ++group_sums;
            ++token_scales;
        }
        FOR_EACH_ROW store_float32(results + row * LANES, totals[row]);
    }

    static Floats scale(const Job& job, int64_t, int64_t, Floats totals) {
        return multiply(totals, broadcast(job.weight.scale_unit));
    }
};

// Activations stay floating point. The 4-bit integers are converted exactly to q - 8 in registers, and the sum of each
// group is scaled. With BFLOAT16 activations are multiplied in pairs; otherwise they are widened to float32.
template <bool BFLOAT16>
struct Int4FloatMatmul : VectorsOnly {
    static constexpr int64_t INPUTS_PER_UNIT = BFLOAT16 ? 2 : 1;
    static constexpr int64_t INPUTS_PER_WEIGHT_UNIT = INPUTS_PER_VECTOR;
    static constexpr int64_t UNITS_PER_VECTOR = INPUTS_PER_VECTOR / INPUTS_PER_UNIT;

    static bool reads_activations(const Request& request) { return !BFLOAT16 && !request.bfloat16(); }

    static void prepare_row(const Job& job, int64_t row) {
        const Weight& weight = job.weight;
        const int64_t first = row * weight.inputs;
        if (!reads_activations(job.request)) {
            int32_t* units = job.activations.scratch + row * job.units;
            for (int64_t k = 0; k < weight.inputs; k += LANES) {
#ifdef __AVX512BF16__
                if (BFLOAT16) {
                    store_bfloat16_pairs(units + k / 2, job.request.x + 2 * (first + k));
                    continue;
                }
#endif
                store_float32(units + k, load_activations(job.request, first + k));
            }
        }
        if (weight.zero_kind != ZERO_MIDDLE) sum_groups(job, row);
    }

    template <int ROWS>
    static void multiply_tile(const Job& job, Tile tile, int64_t block, float* results) {
        const Weight& weight = job.weight;
        const int32_t* units = tile_units(job, tile);
        const float* group_sums = job.activations.sums + tile.first_row * job.groups;
        const uint8_t* values = job.block_values(block);
        const int64_t vectors = weight.group_size / INPUTS_PER_VECTOR;
        Floats totals[ROWS];
        FOR_EACH_ROW totals[row] = zero_floats();
        for (int64_t group = 0; group < job.groups; ++group) {
            Floats sums[ROWS];
            FOR_EACH_ROW sums[row] = zero_floats();
            for (int64_t vector = 0; vector < vectors; ++vector) {
                prefetch(values);
                add_vector<ROWS>(sums, load_ints(values), units);
                values += 64;
                units += UNITS_PER_VECTOR * ROWS;
            }
            add_group<8>(job, block, group, sums, group_sums, totals);
        }
        FOR_EACH_ROW store_float32(results + row * LANES, totals[row]);
    }

    static Floats scale(const Job& job, int64_t, int64_t, Floats totals) {
        return multiply(totals, broadcast(job.weight.scale_unit));
    }

   private:
    template <int ROWS>
    static inline void add_vector(Floats (&sums)[ROWS], Ints packed, const int32_t* units) {
        if constexpr (BFLOAT16) {
#ifdef __AVX512BF16__
            add_pairs_of<ROWS, 0>(sums, packed, units);
            add_pairs_of<ROWS, 8>(sums, packed, units + ROWS);
            add_pairs_of<ROWS, 4>(sums, packed, units + 2 * ROWS);
            add_pairs_of<ROWS, 12>(sums, packed, units + 3 * ROWS);
#endif
        } else {
            const float* x = reinterpret_cast<const float*>(units);
            add_lanes_of<ROWS, 0>(sums, packed, x);
            add_lanes_of<ROWS, 8>(sums, packed, x + ROWS);
            add_lanes_of<ROWS, 16>(sums, packed, x + 2 * ROWS);
            add_lanes_of<ROWS, 24>(sums, packed, x + 3 * ROWS);
            add_lanes_of<ROWS, 4>(sums, packed, x + 4 * ROWS);
            add_lanes_of<ROWS, 12>(sums, packed, x + 5 * ROWS);
            add_lanes_of<ROWS, 20>(sums, packed, x + 6 * ROWS);
            add_lanes_of<ROWS, 28>(sums, packed, x + 7 * ROWS);
        }
    }

#ifdef __AVX512BF16__
    template <int ROWS, int SHIFT>
    static inline void add_pairs_of(Floats (&sums)[ROWS], Ints packed, const int32_t* units) {
        const Ints weights = centered_bfloat16_nibbles<SHIFT>(packed);
        FOR_EACH_ROW sums[row] = dot_bfloat16(sums[row], weights, units[row]);
    }
#endif

    template <int ROWS, int SHIFT>
    static inline void add_lanes_of(Floats (&sums)[ROWS], Ints packed, const float* x) {
        const Floats weights = centered_nibbles<SHIFT>(packed);
        FOR_EACH_ROW sums[row] = multiply_add(broadcast(x[row]), weights, sums[row]);
    }
};

}  // namespace
