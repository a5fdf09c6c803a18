// Computes softmax attention of a block of rows over the static KV cache. Inputs and outputs are bfloat16, and the
// computation is in float32.
//
// The query heads of a KV head are packed into rows, so that each key is read once for all of them. The context is
// split at multiples of CHUNK_KEYS positions, and the parts are merged in ascending order. Therefore a row's result does
// not depend on the number of rows, on the number of threads, or on slots that the row does not attend to.
//
// In a chain the position of a token is its slot. In a tree a node of a later branch has a slot after those of the other
// branches. There the keys and values of each row's branch are copied to consecutive places first, so that they are
// added in the same order and groups as in autoregressive decoding, and the result has the same bits.
//
// Keys and values in 8 or 4 bits are dequantized to bfloat16 chunk by chunk, and then attended to as if they had been
// stored so: the result has the bits of attention over the dequantized cache.
//
// A window hides positions in the same way as the mask does: they are left out of a chunk's sums, and a chunk of hidden
// positions is not read.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "buffer.h"
#include "exponential.h"
#include "exports.h"
#include "slots.h"

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t CHUNK_KEYS = 128;
constexpr int64_t BATCH_ROWS = 32;  // query rows that share one buffer of partial results
#ifdef __AVX512F__
constexpr int TILE_ROWS = 24;  // packed rows of one task
constexpr int VALUE_ROWS = 6, VALUE_VECTORS = 4;
#else
constexpr int TILE_ROWS = 4;
constexpr int VALUE_ROWS = 4, VALUE_VECTORS = 1;
#endif

struct Attention {
    const uint16_t* q;  // [rows][heads][head_dim]
    Slots keys, values;
    const uint8_t* mask;  // [rows][rows], for the slots after the prefix; every row attends to the whole prefix
    uint16_t* out;        // [rows][heads][head_dim]
    int64_t rows, heads, kv_heads, head_dim, slots, prefix;
    int64_t window;  // a row attends to this many positions up to its own; 0 for no limit
    float softcap;   // 0 if scores are not capped
    float scale;

    int64_t group() const { return heads / kv_heads; }
    int64_t chunks() const { return (slots + CHUNK_KEYS - 1) / CHUNK_KEYS; }
    int64_t block() const { return slots - prefix; }

    // Returns the first position in the window of a row. The row's own is the last one of its branch.
    int64_t first_visible(int64_t row) const {
        if (window == 0) return 0;
        const uint8_t* own = mask + row * block();
        const int64_t end = prefix + std::count_if(own, own + block(), [](uint8_t visible) { return visible != 0; });
        return std::max<int64_t>(0, end - window);
    }
};

// What a row attends to: the positions from `first` on that its mask allows.
struct View {
    const uint8_t* mask;
    int64_t first;
};

// At most CHUNK_KEYS consecutive positions of the context.
struct Chunk {
    // Keys and values of its first position, those of the others follow; null until they are dequantized.
    const uint16_t *keys, *values;
    int64_t index;                  // its first position is index * CHUNK_KEYS
    int64_t prefix;                 // every row attends to the positions before this one
    int64_t end;                    // number of positions of the context

    int64_t first() const { return index * CHUNK_KEYS; }
    int64_t size() const { return std::min(CHUNK_KEYS, end - first()); }
};

// The results of one row and chunk: the largest score, the sum of exp(score - largest), and head_dim sums of values.
struct Partials {
    float* memory;
    int64_t size;

    float* of(int64_t packed_row, int64_t chunk, int64_t chunks) const {
        return memory + (packed_row * chunks + chunk) * size;
    }
};

// The packed rows of a task: row p of KV head h is query head h * group + p % group of query row p / group.
struct Task {
    int64_t kv_head, first, count;
};

struct Scratch {
    alignas(64) int32_t key_units[MAX_HEAD_DIM / 2 * LANES];
    alignas(64) float scores[TILE_ROWS * CHUNK_KEYS];
};

// Multiplies the pair of bfloat16 in every lane by a pair of the query, which is the same for all lanes.
inline Floats add_pairs(Floats sum, Ints key_pairs, int32_t query_pair) {
#ifdef __AVX512BF16__
    return dot_bfloat16(sum, key_pairs, query_pair);
#else
    float pair[2];
    const uint32_t bits[2] = {static_cast<uint32_t>(query_pair) << 16, static_cast<uint32_t>(query_pair) & 0xFFFF0000};
    std::memcpy(pair, bits, sizeof pair);
    sum = multiply_add(broadcast(pair[0]), even_bfloat16(key_pairs), sum);
    return multiply_add(broadcast(pair[1]), odd_bfloat16(key_pairs), sum);
#endif
}

// Returns sixteen bytes that are nonzero where the row attends to the positions from `first` on. At the edges of the mask
// they are written to `padded`.
inline const uint8_t* lane_mask(const Chunk& chunk, const View& view, int64_t first, uint8_t (&padded)[LANES]) {
    if (first >= chunk.prefix && first >= view.first && first + LANES <= chunk.end)
        return view.mask + first - chunk.prefix;
    for (int64_t lane = 0; lane < LANES; ++lane) {
        const int64_t position = first + lane;
        padded[lane] = position >= view.first && (position < chunk.prefix ||
                                                  (position < chunk.end && view.mask[position - chunk.prefix]));
    }
    return padded;
}

inline Floats capped(Floats scores, float softcap) {
    return multiply(broadcast(softcap), hyperbolic_tangent(divide(scores, broadcast(softcap))));
}

template <int ROWS>
void score_tile(const Attention& job, const Chunk& chunk, const int32_t* const* queries, const View* views,
                int64_t first_key, const int32_t* key_units, float* scores) {
    Floats sums[ROWS];
#pragma GCC unroll 24
    for (int row = 0; row < ROWS; ++row) sums[row] = zero_floats();
    for (int64_t unit = 0; unit < job.head_dim / 2; ++unit) {
        const Ints pairs = load_ints(key_units + unit * LANES);
#pragma GCC unroll 24
        for (int row = 0; row < ROWS; ++row) sums[row] = add_pairs(sums[row], pairs, queries[row][unit]);
    }
    const bool before_block = first_key + LANES <= chunk.prefix;
#pragma GCC unroll 24
    for (int row = 0; row < ROWS; ++row) {
        Floats scaled = multiply(sums[row], broadcast(job.scale));
        if (job.softcap > 0) scaled = capped(scaled, job.softcap);
        uint8_t padded[LANES];
        if (!before_block || first_key < views[row].first)
            scaled = mask_invisible(scaled, lane_mask(chunk, views[row], first_key, padded));
        store_float32(scores + row * CHUNK_KEYS, scaled);
    }
}

using ScoreFunction = decltype(&score_tile<1>);

template <int... ROWS>
ScoreFunction score_function(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static constexpr ScoreFunction functions[] = {&score_tile<ROWS + 1>...};
    return functions[rows - 1];
}

// Returns the attention weights of one row, which have replaced its scores: pairs of bfloat16 if the processor
// multiplies pairs, else float32.
inline const int32_t* weights_of(const float* scores, int64_t row) {
    return reinterpret_cast<const int32_t*>(scores + row * CHUNK_KEYS);
}

// Computes the sums of attention weights times values over the chunk, for ROWS rows and VECTORS vectors of the head.
template <int ROWS, int VECTORS>
void add_values(const Attention& job, const float* scores, const uint16_t* values, int64_t keys, float* const* results) {
    Floats sums[ROWS][VECTORS];
#pragma GCC unroll 24
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; ++vector) sums[row][vector] = zero_floats();
#ifdef __AVX512BF16__
    for (int64_t key = 0; key < keys; key += 2, values += 2 * job.head_dim) {
        // The weight after the last key is zero.
        const uint16_t* next = key + 1 < keys ? values + job.head_dim : values;
        Ints pairs[VECTORS];
#pragma GCC unroll 2
        for (int vector = 0; vector < VECTORS; vector += 2)
            pair_rows(values + vector * LANES, next + vector * LANES, pairs[vector], pairs[vector + 1]);
#pragma GCC unroll 24
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; ++vector)
                sums[row][vector] = dot_bfloat16(sums[row][vector], pairs[vector], weights_of(scores, row)[key / 2]);
    }
    for (int row = 0; row < ROWS; ++row)
        for (int vector = 0; vector < VECTORS; vector += 2)
            store_paired(results[row] + vector * LANES, sums[row][vector], sums[row][vector + 1]);
#else
    for (int64_t key = 0; key < keys; ++key, values += job.head_dim) {
        Floats wide[VECTORS];
#pragma GCC unroll 4
        for (int vector = 0; vector < VECTORS; ++vector) wide[vector] = load_bfloat16(values + vector * LANES);
#pragma GCC unroll 24
        for (int row = 0; row < ROWS; ++row) {
            const Floats weight = broadcast(scores[row * CHUNK_KEYS + key]);
#pragma GCC unroll 4
            for (int vector = 0; vector < VECTORS; ++vector)
                sums[row][vector] = multiply_add(weight, wide[vector], sums[row][vector]);
        }
    }
    for (int row = 0; row < ROWS; ++row)
        for (int vector = 0; vector < VECTORS; ++vector) store_float32(results[row] + vector * LANES, sums[row][vector]);
#endif
}

template <int ROWS>
void add_rows(const Attention& job, const float* scores, const uint16_t* values, int64_t keys, float* const* results) {
    float* place[ROWS];
    int64_t element = 0;
    const auto advance = [&] {
        for (int row = 0; row < ROWS; ++row) place[row] = results[row] + element;
    };
    for (; element + VALUE_VECTORS * LANES <= job.head_dim; element += VALUE_VECTORS * LANES) {
        advance();
        add_values<ROWS, VALUE_VECTORS>(job, scores, values + element, keys, place);
    }
    constexpr int REST = VALUE_VECTORS > 1 ? 2 : 1;  // number of vectors; a head has an even number of them
    for (; element < job.head_dim; element += REST * LANES) {
        advance();
        add_values<ROWS, REST>(job, scores, values + element, keys, place);
    }
}

using AddFunction = decltype(&add_rows<1>);

template <int... ROWS>
AddFunction add_function(int64_t rows, std::integer_sequence<int, ROWS...>) {
    static constexpr AddFunction functions[] = {&add_rows<ROWS + 1>...};
    return functions[rows - 1];
}

// Replaces the scores of the chunk by the attention weights exp(score - largest), or by 0 if the row attends to no
// slot.
inline void to_weights(float* scores, int64_t keys, float* largest, float* sum) {
    Floats top = broadcast(-INFINITY);
    for (int64_t key = 0; key < keys; key += LANES) top = larger(top, load_float32(scores + key));
    *largest = largest_lane(top);
    *sum = 0;
    if (*largest == -INFINITY) {
        std::memset(scores, 0, CHUNK_KEYS * sizeof(float));
        return;
    }
    Floats total = zero_floats();
    for (int64_t key = 0; key < keys; key += LANES) {
        const Floats weights = exponential(subtract(load_float32(scores + key), broadcast(*largest)));
#ifdef __AVX512BF16__
        // The weights are half as wide as the scores, so they never overwrite scores that have not been read yet.
        total = add(total, store_rounded(reinterpret_cast<uint16_t*>(scores) + key, weights));
#else
        store_float32(scores + key, weights);
        total = add(total, weights);
#endif
    }
    *sum = sum_floats(total);
}

inline bool any_visible(const Chunk& chunk, const View* views, int64_t rows) {
    for (const View* view = views; view < views + rows; ++view) {
        const int64_t first = std::max(chunk.first(), view->first), end = chunk.first() + chunk.size();
        if (first >= end) continue;
        if (first < chunk.prefix) return true;
        if (std::memchr(view->mask + first - chunk.prefix, 1, end - first) != nullptr) return true;
    }
    return false;
}

// Prefetches LANES rows of a head, or as many elements as there are.
inline void prefetch_rows(const Attention& job, const uint16_t* rows, int64_t elements) {
    constexpr int64_t LINE = 32;
    elements = std::min(elements, LANES * job.head_dim);
    for (int64_t element = 0; element < elements; element += LINE)
        _mm_prefetch(reinterpret_cast<const char*>(rows + element), _MM_HINT_T0);
}

// Returns memory of the calling thread for the keys and values of a chunk, 2 * CHUNK_KEYS rows.
uint16_t* chunk_memory(const Attention& job) {
    thread_local Buffer buffer;
    return static_cast<uint16_t*>(buffer.reserve(2 * CHUNK_KEYS * job.head_dim * sizeof(uint16_t)));
}

Chunk chunk_of_cache(const Attention& job, int64_t kv_head, int64_t index) {
    Chunk chunk = {nullptr, nullptr, index, job.prefix, job.slots};
    if (job.keys.bits == 16) {
        const int64_t first = job.keys.row(kv_head, chunk.first());
        chunk.keys = reinterpret_cast<const uint16_t*>(job.keys.codes_of(first));
        chunk.values = reinterpret_cast<const uint16_t*>(job.values.codes_of(first));
    }
    return chunk;
}

// Dequantizes the keys and values of consecutive slots, from that of the chunk's first position on.
void dequantize(const Attention& job, int64_t kv_head, Chunk& chunk) {
    uint16_t *keys = chunk_memory(job), *values = keys + CHUNK_KEYS * job.head_dim;
    const int64_t first = job.keys.row(kv_head, chunk.first());
    for (int64_t key = 0; key < chunk.size(); ++key) {
        read_row(job.keys, first + key, keys + key * job.head_dim);
        read_row(job.values, first + key, values + key * job.head_dim);
    }
    chunk.keys = keys, chunk.values = values;
}

void attend_chunk(const Attention& job, Chunk chunk, const Partials& partials, const Task& task,
                  Scratch& scratch) {
    const int32_t* queries[TILE_ROWS];
    View views[TILE_ROWS];
    float* results[TILE_ROWS];
    const int64_t head_rows = job.group() * job.rows;
    for (int64_t index = 0; index < task.count; ++index) {
        const int64_t packed = task.first + index, row = packed / job.group();
        const int64_t head = task.kv_head * job.group() + packed % job.group();
        queries[index] = reinterpret_cast<const int32_t*>(job.q + (row * job.heads + head) * job.head_dim);
        views[index] = {job.mask + row * job.block(), job.first_visible(row)};
        results[index] = partials.of(task.kv_head * head_rows + packed, chunk.index, job.chunks());
    }
    const int64_t keys = chunk.size();
    if (keys <= 0 || !any_visible(chunk, views, task.count)) {
        for (int64_t index = 0; index < task.count; ++index) results[index][1] = 0;
        return;
    }
    if (chunk.keys == nullptr) dequantize(job, task.kv_head, chunk);
    const ScoreFunction score = score_function(task.count, std::make_integer_sequence<int, TILE_ROWS>());
    for (int64_t key = 0; key < keys; key += LANES) {
        // Sixteen rows are read at a time, which hardware prefetchers do not detect.
        prefetch_rows(job, chunk.keys + (key + LANES) * job.head_dim, (keys - key - LANES) * job.head_dim);
        prefetch_rows(job, chunk.values + key * job.head_dim, (keys - key) * job.head_dim);
        const int32_t* tile[LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) {
            // Lanes after the last key read that key again. They are masked, and nothing after the cache is read.
            const int64_t row = std::min(key + lane, keys - 1);
            tile[lane] = reinterpret_cast<const int32_t*>(chunk.keys + row * job.head_dim);
        }
        for (int64_t unit = 0; unit < job.head_dim / 2; unit += LANES)
            transpose(tile, unit, scratch.key_units + unit * LANES);
        score(job, chunk, queries, views, chunk.first() + key, scratch.key_units, scratch.scores + key);
    }
    for (int64_t index = 0; index < task.count; ++index)
        to_weights(scratch.scores + index * CHUNK_KEYS, keys, &results[index][0], &results[index][1]);

    for (int64_t index = 0; index < task.count; ++index) results[index] += LANES;
    for (int64_t index = 0; index < task.count; index += VALUE_ROWS) {
        const int64_t rows = std::min<int64_t>(VALUE_ROWS, task.count - index);
        add_function(rows, std::make_integer_sequence<int, VALUE_ROWS>())(job, scratch.scores + index * CHUNK_KEYS,
                                                                        chunk.values, keys, results + index);
    }
}

void merge_row(const Attention& job, const Partials& partials, int64_t packed) {
    const int64_t head_rows = job.group() * job.rows, within = packed % head_rows;
    const int64_t head = packed / head_rows * job.group() + within % job.group(), row = within / job.group();
    float largest = -INFINITY, sum = 0;
    for (int64_t chunk = 0; chunk < job.chunks(); ++chunk) {
        const float* part = partials.of(packed, chunk, job.chunks());
        if (part[1] > 0) largest = std::max(largest, part[0]);
    }
    alignas(64) float total[MAX_HEAD_DIM] = {};
    for (int64_t chunk = 0; chunk < job.chunks(); ++chunk) {
        const float* part = partials.of(packed, chunk, job.chunks());
        if (!(part[1] > 0)) continue;
        const float weight = std::exp(part[0] - largest);
        sum += weight * part[1];
        for (int64_t element = 0; element < job.head_dim; element += LANES)
            store_float32(total + element, add(load_float32(total + element),
                                               multiply(broadcast(weight), load_float32(part + LANES + element))));
    }
    uint16_t* out = job.out + (row * job.heads + head) * job.head_dim;
    for (int64_t element = 0; element < job.head_dim; element += LANES)
        store_bfloat16(out + element, divide(load_float32(total + element), broadcast(sum)));
}

// Copies the keys and values of the chunk's positions in the row's branch. The branch is the prefix and then the slots of
// the block that the row attends to, in ascending order.
Chunk chunk_of_branch(const Attention& job, int64_t kv_head, int64_t row, int64_t index) {
    uint16_t *keys = chunk_memory(job), *values = keys + CHUNK_KEYS * job.head_dim;
    const uint8_t* mask = job.mask + row * job.block();
    const int64_t first = index * CHUNK_KEYS;
    int64_t position = std::min(first, job.prefix);
    for (int64_t slot = position; slot < job.slots && position < first + CHUNK_KEYS; ++slot) {
        if (slot >= job.prefix && !mask[slot - job.prefix]) continue;
        if (position >= first) {
            const int64_t stored = job.keys.row(kv_head, slot), place = (position - first) * job.head_dim;
            read_row(job.keys, stored, keys + place);
            read_row(job.values, stored, values + place);
        }
        ++position;
    }
    return {keys, values, index, position, position};
}

// Returns whether some row does not attend to exactly the slots up to its own.
bool is_tree(const Attention& job, int64_t first_row) {
    for (int64_t row = 0; row < job.rows; ++row) {
        const uint8_t* mask = job.mask + row * job.block();
        const int64_t own = first_row + row + 1;
        if (std::memchr(mask, 0, own) != nullptr || std::memchr(mask + own, 1, job.block() - own) != nullptr) return true;
    }
    return false;
}

// The tasks of a batch. Those of shared chunks have tiles of all packed rows. If the block is a tree, the chunks from
// the end of the prefix on differ from row to row, and a tile has packed rows of one row only.
struct Tasks {
    const Attention& job;
    int64_t shared;  // number of chunks that all rows read at the same slots
    int64_t tiles, branch_tiles;

    Tasks(const Attention& job, bool tree)
        : job(job),
          shared(tree ? job.prefix / CHUNK_KEYS : job.chunks()),
          tiles((job.group() * job.rows + TILE_ROWS - 1) / TILE_ROWS),
          branch_tiles((job.group() + TILE_ROWS - 1) / TILE_ROWS) {}

    int64_t shared_count() const { return job.kv_heads * tiles * shared; }
    int64_t count() const {
        return shared_count() + job.kv_heads * job.rows * branch_tiles * (job.chunks() - shared);
    }

    void run(int64_t index, const Partials& partials, Scratch& scratch) const {
        if (index < shared_count()) {
            const int64_t kv_head = index / shared / tiles, tile = index / shared % tiles;
            const int64_t packed = job.group() * job.rows, first = tile * packed / tiles;
            const Task task = {kv_head, first, (tile + 1) * packed / tiles - first};
            attend_chunk(job, chunk_of_cache(job, kv_head, index % shared), partials, task, scratch);
            return;
        }
        index -= shared_count();
        const int64_t chunks = job.chunks() - shared, chunk = shared + index % chunks;
        const int64_t tile = index / chunks % branch_tiles, row = index / chunks / branch_tiles % job.rows;
        const int64_t kv_head = index / chunks / branch_tiles / job.rows;
        const int64_t first = tile * job.group() / branch_tiles, end = (tile + 1) * job.group() / branch_tiles;
        attend_chunk(job, chunk_of_branch(job, kv_head, row, chunk), partials,
                     {kv_head, row * job.group() + first, end - first}, scratch);
    }
};

void attend_batch(const Attention& job, bool tree, int32_t threads) {
    const int64_t size = LANES + job.head_dim;
    const Tasks tasks(job, tree);
    thread_local Buffer buffer;
    const Partials partials = {static_cast<float*>(buffer.reserve(4 * job.heads * job.rows * job.chunks() * size)), size};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        alignas(64) Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < tasks.count(); ++index) tasks.run(index, partials, scratch);
#pragma omp for schedule(static)
        for (int64_t packed = 0; packed < job.heads * job.rows; ++packed) merge_row(job, partials, packed);
    }
}

}  // namespace

void quasar_attention(const uint16_t* q, uint8_t* keys, uint8_t* values, uint8_t* key_scales, uint8_t* value_scales,
                      const uint8_t* mask, uint16_t* out, const int64_t* start, int64_t rows, int64_t heads,
                      int64_t kv_heads, int64_t head_dim, int64_t capacity, int64_t bits, int64_t window, float softcap,
                      float scale, int32_t threads) {
    if (scale == 0) scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    const int64_t prefix = *start, slots = prefix + rows;
    const Slots stored_keys = {keys, key_scales, bits, head_dim, capacity};
    const Slots stored_values = {values, value_scales, bits, head_dim, capacity};
    for (int64_t row = 0; row < rows; row += BATCH_ROWS) {
        const int64_t offset = row * heads * head_dim;
        const Attention job = {q + offset, stored_keys, stored_values, mask + row * rows, out + offset,
                               std::min(BATCH_ROWS, rows - row), heads, kv_heads, head_dim, slots, prefix, window,
                               softcap, scale};
        attend_batch(job, is_tree(job, row), threads);
    }
}
