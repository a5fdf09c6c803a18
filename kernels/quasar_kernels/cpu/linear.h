// The steps of every matmul: it prepares the activations and then distributes blocks of sixteen outputs to the threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <utility>

#include "activations.h"
#include "tiles.h"

namespace {

// How far ahead of its use a weight is prefetched. Hardware prefetchers stop at page boundaries. Blocks are contiguous,
// so the next block of the same thread is prefetched while the current one is computed. Weights are prefetched only
// into the second-level cache: hardware prefetchers work from there, and in the first-level cache they would evict the
// activations.
constexpr int64_t PREFETCH_BYTES = 4096;
// Threads take several blocks at a time: enough to read long streams, but few enough that the other threads can make up
// for a slow one.
constexpr int64_t SHARE_BYTES = 192 * 1024;
constexpr int64_t SHARES_PER_THREAD = 3;
// With fewer activations than this, it is faster if one thread prepares them than if all threads synchronize twice.
constexpr int64_t SHARED_ACTIVATIONS = 65536;

inline void prefetch(const uint8_t* address) {
    _mm_prefetch(reinterpret_cast<const char*>(address + PREFETCH_BYTES), _MM_HINT_T1);
}

// Accumulators stay in registers only if every loop over the rows of a tile is unrolled.
#define FOR_EACH_ROW _Pragma("GCC unroll 16") for (int row = 0; row < ROWS; ++row)

struct Job {
    Weight weight;
    Request request;  // the request of one chunk
    Activations activations;
    int64_t rows;          // number of prepared rows, `Matmul::TERMS` for every token
    int64_t units;         // number of units of one row of activations
    int64_t weight_units;  // number of units of one output
    int64_t groups;

    const uint8_t* block_values(int64_t block) const { return weight.values + block * weight_units * 64; }
};

inline Floats load_vector(const uint8_t* source, int64_t element, bool bfloat16) {
    return bfloat16 ? load_bfloat16(source + 2 * element) : load_float32(source + 4 * element);
}

// Writes the results of a tile: scales its sums [tokens][16] and rounds them to the dtype of the activations.
template <class Matmul>
void finish_tile(const Job& job, Tile tile, int64_t block, const float* results) {
    const Request& request = job.request;
    const int64_t output = block * LANES, first = tile.first_row / Matmul::TERMS, count = tile.rows / Matmul::TERMS;
    for (int64_t row = first; row < first + count; ++row, results += LANES) {
        Floats values = Matmul::scale(job, row, block, load_float32(results));
        if (request.bias != nullptr) values = add(values, load_vector(request.bias, output, request.bias_bfloat16()));
        const int64_t element = row * job.weight.outputs + output;
        if (request.bfloat16())
            store_bfloat16(request.out + 2 * element, values);
        else
            store_float32(request.out + 4 * element, values);
    }
}

// Base class of matmuls that read every token as one row of activations.
struct SingleTerm {
    static constexpr int64_t TERMS = 1;
};

// Base class of matmuls that use only vector registers.
struct VectorsOnly : SingleTerm {
    static constexpr bool uses_tiles(const Request&) { return false; }
    struct Registers {
        explicit Registers(const Job&) {}
    };
};

#ifdef HAS_TILES
struct JobTiles : TileRegisters {
    explicit JobTiles(const Job& job) : TileRegisters(job.request.rows, job.units) {}
};

// Multiplies a tile of activations, which are not interleaved, by a block of weights, and adds to sums [rows][16].
template <TileKind KIND>
inline void multiply_block(const Job& job, Tile tile, int64_t block, void* sums) {
    const int32_t* rows = job.activations.rows + tile.first_row * job.units;
    if (tile.rows == low_tile_rows(job.request.rows))
        multiply_tile_rows<KIND, LOW_TILE>(rows, job.units, job.block_values(block), prefetch, sums);
    else
        multiply_tile_rows<KIND, HIGH_TILE>(rows, job.units, job.block_values(block), prefetch, sums);
}
#endif

// Returns the interleaved units of a tile. A single row needs no interleaving.
inline const int32_t* tile_units(const Job& job, Tile tile) {
    return (tile.rows == 1 ? job.activations.rows : job.activations.units) + tile.first_row * job.units;
}

// Computes the sums of one tile and one block: results [tokens][16].
using TileFunction = void (*)(const Job&, Tile, int64_t block, float* results);

template <class Matmul, int... ROWS>
TileFunction tile_function(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static constexpr TileFunction functions[] = {&Matmul::template multiply_tile<ROWS + 1>...};
    return functions[rows - 1];
}

template <class Matmul>
void multiply_block(const Job& job, int64_t block) {
    for (int64_t index = 0; index < count_tiles(job.rows, Matmul::TERMS); ++index) {
        const Tile tile = tile_at(job.rows, index, Matmul::TERMS);
        alignas(64) float results[MAX_TILE_ROWS * LANES];
        tile_function<Matmul>(tile.rows, std::make_integer_sequence<int, MAX_TILE_ROWS>())(job, tile, block, results);
        finish_tile<Matmul>(job, tile, block, results);
    }
}

template <class Matmul>
inline void interleave_tiles(const Job& job, int64_t first_unit) {
    if (Matmul::uses_tiles(job.request)) return;
    for (int64_t index = 0; index < count_tiles(job.rows, Matmul::TERMS); ++index) {
        const Tile tile = tile_at(job.rows, index, Matmul::TERMS);
        if (tile.rows > 1) interleave(job.activations, tile, job.units, first_unit);
    }
}

// The threads are those of OpenMP. PyTorch has loaded libgomp before this library, which therefore shares PyTorch's
// pool of threads instead of competing with it. A call with one thread does not use the pool, so that forked
// data-loading processes, which run with one thread, are as safe as with PyTorch's own operations.
template <class Matmul>
void multiply_chunk(const Job& job) {
    const int64_t rows = job.request.rows, blocks = job.weight.outputs / LANES;
    const int64_t even_share = blocks / (job.request.threads * SHARES_PER_THREAD);
    const int64_t share = std::max<int64_t>(1, std::min(even_share, SHARE_BYTES / (job.weight_units * 64)));
    const bool shared = rows * job.weight.inputs >= SHARED_ACTIVATIONS;
    if (!shared) {
        for (int64_t row = 0; row < rows; ++row) Matmul::prepare_row(job, row);
        for (int64_t first = 0; first < job.units; first += UNITS_PER_STEP) interleave_tiles<Matmul>(job, first);
    }
#pragma omp parallel num_threads(job.request.threads) if (job.request.threads > 1)
    {
        if (shared) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; ++row) Matmul::prepare_row(job, row);
#pragma omp for schedule(static)
            for (int64_t first = 0; first < job.units; first += UNITS_PER_STEP) interleave_tiles<Matmul>(job, first);
        }
        const typename Matmul::Registers registers(job);
#pragma omp for schedule(dynamic, share) nowait
        for (int64_t block = 0; block < blocks; ++block) multiply_block<Matmul>(job, block);
    }
}

template <class Matmul>
void multiply(const Weight& weight, Request request) {
    const int64_t out_element = request.bfloat16() ? 2 : 4, element = request.quantized() ? 1 : out_element;
    const int64_t units = weight.inputs / Matmul::INPUTS_PER_UNIT;
    const int64_t weight_units = weight.inputs / Matmul::INPUTS_PER_WEIGHT_UNIT;
    const int64_t groups = weight.group_size ? weight.inputs / weight.group_size : 1;
    int64_t remaining = request.rows;
    while (remaining > 0) {
        request.rows = remaining < CHUNK_ROWS ? remaining : CHUNK_ROWS;
        const int64_t rows = request.rows * Matmul::TERMS;
        Activations activations = Activations::of(rows, units, groups);
        if (Matmul::reads_activations(request)) activations.rows = reinterpret_cast<const int32_t*>(request.x);
        multiply_chunk<Matmul>(Job{weight, request, activations, rows, units, weight_units, groups});
        remaining -= request.rows;
        request.x += request.rows * weight.inputs * element;
        if (request.quantized()) request.token_scales += request.rows * groups;
        request.out += request.rows * weight.outputs * out_element;
    }
}

}  // namespace
