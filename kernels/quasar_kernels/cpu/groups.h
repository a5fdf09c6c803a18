// The scales, zero points and minimums of groups of weights, and the sums and scales of groups of activations.
#pragma once

#include "linear.h"

namespace {

// Returns the numbers of sixteen outputs and one group.
inline Floats group_numbers(const GroupNumbers& numbers, int64_t block, int64_t group, int64_t groups) {
    const int64_t shared = block * (groups >> numbers.shift) + (group >> numbers.shift);
    const Floats values = numbers.kind == FLOAT16_NUMBERS ? load_float16(numbers.values + 2 * LANES * shared)
                                                          : load_float32(numbers.values + 4 * LANES * shared);
    if (numbers.factors == nullptr) return values;
    return multiply(values, to_floats(load_int8(numbers.factors + LANES * (block * groups + group))));
}

// Returns the zero points of sixteen outputs and one group, which are neither the middle of the range nor a minimum.
inline Floats group_zeros(const Weight& weight, int64_t block, int64_t group, int64_t groups) {
    const int64_t index = block * groups + group;
    return weight.zero_kind == ZERO_NIBBLE ? load_nibbles(weight.zeros + LANES / 2 * index)
                                           : load_float32(weight.zeros + 4 * LANES * index);
}

// Adds a group to the totals. sums: of x * (q - MIDDLE); x_sums: of x, [rows][groups], not read for ZERO_MIDDLE.
template <int MIDDLE, int ROWS>
inline void add_group(const Job& job, int64_t block, int64_t group, Floats (&sums)[ROWS], const float* x_sums,
                      Floats (&totals)[ROWS]) {
    const Weight& weight = job.weight;
    const Floats scales = group_numbers(weight.scales, block, group, job.groups);
    if (weight.zero_kind == ZERO_MINIMUM) {
        // q * scale - minimum = (q - MIDDLE) * scale + (MIDDLE * scale - minimum)
        const Floats minimums = group_numbers(weight.minimums, block, group, job.groups);
        const Floats rest = subtract(multiply(scales, broadcast(MIDDLE)), minimums);
        FOR_EACH_ROW totals[row] = multiply_add(rest, broadcast(x_sums[row * job.groups + group]), totals[row]);
    } else if (weight.zero_kind != ZERO_MIDDLE) {
        const Floats zeros = add(group_zeros(weight, block, group, job.groups), broadcast(-MIDDLE));
        FOR_EACH_ROW sums[row] = subtract_product(sums[row], broadcast(x_sums[row * job.groups + group]), zeros);
    }
    FOR_EACH_ROW totals[row] = multiply_add(sums[row], scales, totals[row]);
}

// Quantizes a row of activations in groups, unless it is quantized already, and sets its scales. Returns the sums of the
// quantized values of every group, which are in the place of the row's offsets.
inline int32_t* prepare_quantized_row(const Job& job, int64_t row) {
    const int64_t inputs = job.weight.inputs, size = inputs / job.groups;
    int32_t* sums = job.activations.offsets + row * job.groups;
    float* scales = job.activations.scales + row * job.groups;
    int8_t* values = reinterpret_cast<int8_t*>(job.activations.scratch + row * job.units);
    if (job.request.quantized())
        sum_quantized_row(job.request, row, job.groups, size, sums, scales);
    else
        quantize_row(job.request, row * inputs, job.groups, size, values, sums, scales);
    return sums;
}

// Sums the activations of every group of a row.
inline void sum_groups(const Job& job, int64_t row) {
    const int64_t size = job.weight.group_size, first = row * job.weight.inputs;
    for (int64_t group = 0; group < job.groups; ++group) {
        Floats sum = zero_floats();
        for (int64_t k = group * size; k < (group + 1) * size; k += LANES)
            sum = add(sum, load_activations(job.request, first + k));
        alignas(64) float lanes[LANES];
        store_float32(lanes, sum);
        float total = 0;
        for (const float lane : lanes) total += lane;
        job.activations.sums[row * job.groups + group] = total;
    }
}

}  // namespace
