// Tile registers (AMX). A register has sixteen rows of 64 bytes; an instruction multiplies two registers and adds the
// product to a third one.
//
// A block of packed weights is a sequence of tiles in memory: sixteen units of sixteen outputs. Activations are read
// row by row and need no interleaving. `EMULATED_TILES` computes the same without these instructions, for tests on
// processors that lack them.
#pragma once

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) || defined(EMULATED_TILES)
#define HAS_TILES
#endif

#ifdef HAS_TILES
#include <cstdint>
#include <cstring>

#include "activations.h"

namespace {

// The operand of the instruction that configures the registers.
struct TileShapes {
    uint8_t palette = 1;
    uint8_t first_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

enum class TileKind { SIGNED_BY_UNSIGNED_BYTES, BFLOAT16_PAIRS };

#ifdef EMULATED_TILES

struct TileRegister {
    uint8_t data[16][64];
};
thread_local TileShapes tile_shapes;
thread_local TileRegister tile_registers[8];

inline void configure_tiles(const TileShapes& shapes) { tile_shapes = shapes; }
inline void release_tiles() { tile_shapes = TileShapes(); }

template <int TILE>
inline void load_tile(const void* source, int64_t stride) {
    std::memset(tile_registers[TILE].data, 0, sizeof(TileRegister));
    for (int row = 0; row < tile_shapes.rows[TILE]; ++row)
        std::memcpy(tile_registers[TILE].data[row], static_cast<const uint8_t*>(source) + row * stride,
                    tile_shapes.row_bytes[TILE]);
}

template <int TILE>
inline void store_tile(void* target, int64_t stride) {
    for (int row = 0; row < tile_shapes.rows[TILE]; ++row)
        std::memcpy(static_cast<uint8_t*>(target) + row * stride, tile_registers[TILE].data[row],
                    tile_shapes.row_bytes[TILE]);
}

template <class Element>
inline Element tile_element(int tile, int row, int64_t index) {
    Element element;
    std::memcpy(&element, tile_registers[tile].data[row] + index * sizeof(Element), sizeof(Element));
    return element;
}

inline float tile_bfloat16(int tile, int row, int64_t index) {
    const uint32_t bits = static_cast<uint32_t>(tile_element<uint16_t>(tile, row, index)) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

template <TileKind KIND, int SUMS, int LEFT, int RIGHT>
inline void multiply_tiles() {
    const int units = tile_shapes.row_bytes[LEFT] / 4;
    for (int row = 0; row < tile_shapes.rows[SUMS]; ++row) {
        for (int output = 0; output < 16; ++output) {
            uint8_t* place = tile_registers[SUMS].data[row] + 4 * output;
            if constexpr (KIND == TileKind::SIGNED_BY_UNSIGNED_BYTES) {
                int32_t sum = tile_element<int32_t>(SUMS, row, output);
                for (int k = 0; k < 4 * units; ++k)
                    sum += static_cast<int32_t>(tile_element<int8_t>(LEFT, row, k)) *
                           tile_element<uint8_t>(RIGHT, k / 4, 4 * output + k % 4);
                std::memcpy(place, &sum, sizeof(sum));
            } else {
                // Even and odd inputs are summed separately, and the two sums are then added to the register.
                float even = 0, odd = 0;
                for (int k = 0; k < units; ++k) {
                    even = std::fma(tile_bfloat16(LEFT, row, 2 * k), tile_bfloat16(RIGHT, k, 2 * output), even);
                    odd = std::fma(tile_bfloat16(LEFT, row, 2 * k + 1), tile_bfloat16(RIGHT, k, 2 * output + 1), odd);
                }
                const float sum = tile_element<float>(SUMS, row, output) + (even + odd);
                std::memcpy(place, &sum, sizeof(sum));
            }
        }
    }
}

#else

// The compiler's intrinsics are not used: they take only literal register numbers, and those of GCC do not declare
// which memory they read.
inline void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int TILE>
inline void load_tile(const void* source, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
inline void store_tile(void* target, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(TILE) : "memory");
}

template <TileKind KIND, int SUMS, int LEFT, int RIGHT>
inline void multiply_tiles() {
    if constexpr (KIND == TileKind::SIGNED_BY_UNSIGNED_BYTES)
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
    else
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

#endif

constexpr int64_t UNITS_PER_TILE = 16;
constexpr int64_t TILE_ROW_BYTES = 64;
constexpr int64_t TILE_BYTES = 1024;

// The registers of sums, of activations, and of the activations of the last units, for tiles of two heights; then those
// of the weights.
constexpr int LOW_TILE = 0, HIGH_TILE = 3, WEIGHTS = 6, LAST_WEIGHTS = 7;

inline int64_t low_tile_rows(int64_t rows) { return rows / count_tiles(rows); }

// During its lifetime, the registers of the calling thread have the shapes that a matmul of these rows needs.
class TileRegisters {
   public:
    // rows: number of rows of activations; units: number of 32-bit units of one row
    TileRegisters(int64_t rows, int64_t units) {
        TileShapes shapes;
        const int64_t last_units = units % UNITS_PER_TILE, low_rows = low_tile_rows(rows);
        const auto shape = [&shapes](int tile, int64_t tile_rows, int64_t tile_units) {
            // An unused register has neither rows nor bytes.
            if (tile_rows == 0 || tile_units == 0) return;
            shapes.rows[tile] = static_cast<uint8_t>(tile_rows);
            shapes.row_bytes[tile] = static_cast<uint16_t>(4 * tile_units);
        };
        for (const int height : {LOW_TILE, HIGH_TILE}) {
            const int64_t tile_rows = height == LOW_TILE ? low_rows : rows % count_tiles(rows) ? low_rows + 1 : 0;
            shape(height, tile_rows, LANES);
            shape(height + 1, tile_rows, UNITS_PER_TILE);
            shape(height + 2, tile_rows, last_units);
        }
        shape(WEIGHTS, UNITS_PER_TILE, LANES);
        shape(LAST_WEIGHTS, last_units, LANES);
        configure_tiles(shapes);
    }
    ~TileRegisters() { release_tiles(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// Multiplies the rows of a tile by a block of weights and adds to sums [rows][16], which have 32 bits each. It calls
// fetch for every 64 bytes of weights.
template <TileKind KIND, int HEIGHT, class Fetch>
inline void multiply_tile_rows(const int32_t* rows, int64_t units, const uint8_t* values, Fetch fetch, void* sums) {
    constexpr int ROWS = HEIGHT + 1, LAST_ROWS = HEIGHT + 2;
    load_tile<HEIGHT>(sums, TILE_ROW_BYTES);
    int64_t unit = 0;
    for (; unit + UNITS_PER_TILE <= units; unit += UNITS_PER_TILE, values += TILE_BYTES) {
#pragma GCC unroll 16
        for (int64_t line = 0; line < UNITS_PER_TILE; ++line) fetch(values + line * TILE_ROW_BYTES);
        load_tile<ROWS>(rows + unit, 4 * units);
        load_tile<WEIGHTS>(values, TILE_ROW_BYTES);
        multiply_tiles<KIND, HEIGHT, ROWS, WEIGHTS>();
    }
    if (unit < units) {
        load_tile<LAST_ROWS>(rows + unit, 4 * units);
        load_tile<LAST_WEIGHTS>(values, TILE_ROW_BYTES);
        multiply_tiles<KIND, HEIGHT, LAST_ROWS, LAST_WEIGHTS>();
    }
    store_tile<HEIGHT>(sums, TILE_ROW_BYTES);
}

}  // namespace

#endif
