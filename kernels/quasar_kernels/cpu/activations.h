// Puts activations into the order in which the matmuls read them.
//
// The rows of a tile are interleaved unit by unit: units [K units][rows of the tile]. A matmul then advances only one
// pointer, for any number of rows, and every unit is a broadcast operand.
#pragma once

#include "buffer.h"
#include "interface.h"
#include "simd.h"

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t CHUNK_ROWS = 64;  // number of rows in one pass over the weights

struct Tile {
    int64_t first_row;  // within the chunk
    int64_t rows;
};

// Returns the smallest number of tiles that the registers allow. The tiles have nearly equal heights, and the `terms`
// rows of one token are in the same tile.
inline int64_t count_tiles(int64_t rows, int64_t terms = 1) {
    const int64_t most = MAX_TILE_ROWS / terms;
    return (rows / terms + most - 1) / most;
}

inline Tile tile_at(int64_t rows, int64_t index, int64_t terms = 1) {
    const int64_t tokens = rows / terms, tiles = count_tiles(rows, terms), height = tokens / tiles, taller = tokens % tiles;
    return {terms * (index * height + (index < taller ? index : taller)), terms * (height + (index < taller))};
}

// The prepared activations of a chunk. They are in one buffer, which the calling thread keeps between calls.
struct Activations {
    const int32_t* rows;  // [rows][units]: the scratch below, or the activations themselves
    int32_t* scratch;     // [rows][units]
    int32_t* units;       // [tile][units][rows of the tile]
    int32_t* offsets;     // where integer accumulators start: [rows][groups]
    float* sums;          // sum of each group, for zero points: [rows][groups]
    float* scales;        // [rows][groups]

    static Activations of(int64_t rows, int64_t units, int64_t groups) {
        thread_local Buffer buffer;
        Activations result;
        result.scratch = static_cast<int32_t*>(buffer.reserve(4 * rows * (2 * units + 3 * groups)));
        result.rows = result.scratch;
        result.units = result.scratch + rows * units;
        result.offsets = result.units + rows * units;
        result.sums = reinterpret_cast<float*>(result.offsets + rows * groups);
        result.scales = result.sums + rows * groups;
        return result;
    }
};

inline Floats load_activations(const Request& request, int64_t element) {
    return request.bfloat16() ? load_bfloat16(request.x + 2 * element) : load_float32(request.x + 4 * element);
}

// Sums the values of each group of a row that is already quantized, and copies its scales.
inline void sum_quantized_row(const Request& request, int64_t row, int64_t groups, int64_t group_size, int32_t* sums,
                              float* scales) {
    const uint8_t* values = request.x + row * groups * group_size;
    for (int64_t group = 0; group < groups; ++group) {
        Ints sum = broadcast_int(0);
        for (int64_t k = 0; k < group_size; k += LANES) sum = add_ints(sum, load_int8(values + group * group_size + k));
        sums[group] = sum_lanes(sum);
        scales[group] = request.token_scales[row * groups + group];
    }
}

// Computes `reference.quantize_tokens` for the groups of one row, from element `first` on. Values and scales equal its
// results bit for bit. sums: sums of the values of each group.
inline void quantize_row(const Request& request, int64_t first, int64_t groups, int64_t group_size, int8_t* values,
                         int32_t* sums, float* scales) {
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t begin = group * group_size, end = begin + group_size;
        Floats largest = zero_floats();
        for (int64_t k = begin; k < end; k += LANES)
            largest = larger_magnitude(largest, load_activations(request, first + k));
        const float magnitude = largest_lane(largest) / 127.0f;
        scales[group] = magnitude > 0 ? magnitude : 1.0f;
        const Floats divisor = broadcast(scales[group]);
        Ints sum = broadcast_int(0);
        for (int64_t k = begin; k < end; k += LANES) {
            const Ints rounded = round_to_ints(divide(load_activations(request, first + k), divisor));
            store_int8(values + k, rounded);
            sum = add_ints(sum, rounded);
        }
        sums[group] = sum_lanes(sum);
    }
}

constexpr int64_t UNITS_PER_STEP = 8;  // every row has a multiple of eight units

// Interleaves the units [first, first + UNITS_PER_STEP) of a tile. Threads work on ranges of units, not of rows, so
// that no two threads write to the same cache line. The ranges are short, so that rows whose distance is a large power
// of two do not evict each other before they are used.
inline void interleave(const Activations& activations, Tile tile, int64_t units, int64_t first) {
    const int32_t* rows = activations.rows + tile.first_row * units + first;
    int32_t* target = activations.units + tile.first_row * units + first * tile.rows;
    for (int64_t row = 0; row < tile.rows; ++row) {
        int32_t* place = target + row;
#pragma GCC unroll 8
        for (int64_t unit = 0; unit < UNITS_PER_STEP; ++unit, place += tile.rows) *place = rows[row * units + unit];
    }
}

}  // namespace
