// The ops between the matmuls. They take bfloat16, compute in float32, and return bfloat16 or int8 with a scale per
// token. Every row is computed independently of the other rows.
#include <omp.h>

#include "activations.h"
#include "exponential.h"
#include "exports.h"
#include "slots.h"

namespace {

// With fewer elements than this, one thread finishes before the others have started.
constexpr int64_t PARALLEL_ELEMENTS = 8192;

// The memory that the rows are written to: bfloat16 [rows][size], or int8 [rows][size] and float32 scales
// [rows][size / group].
struct Target {
    uint8_t* out;
    int8_t* quantized;
    float* scales;
    int64_t group;
};

// Calls write(row, bfloat16 pointer) for every row, and then quantizes the row if the target is int8.
template <class Write>
void for_each_row(const Target& target, int64_t rows, int64_t size, int32_t threads, Write write) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * size >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        if (target.quantized == nullptr) {
            write(row, target.out + 2 * row * size);
            continue;
        }
        const int64_t groups = size / target.group;
        thread_local Buffer buffer;
        int32_t* sums = static_cast<int32_t*>(buffer.reserve(4 * groups + 2 * size));
        uint8_t* rounded = reinterpret_cast<uint8_t*>(sums + groups);
        write(row, rounded);
        Request request = {};
        request.x = rounded;
        request.flags = ACTIVATIONS_BFLOAT16;
        quantize_row(request, 0, groups, target.group, target.quantized + row * size, sums,
                     target.scales + row * groups);
    }
}

// Returns 1 / sqrt(mean of squares + eps).
inline float inverse_magnitude(const uint8_t* x, int64_t size, float eps) {
    Floats sum = zero_floats();
    for (int64_t k = 0; k < size; k += LANES) {
        const Floats values = load_bfloat16(x + 2 * k);
        sum = multiply_add(values, values, sum);
    }
    return 1.0f / __builtin_sqrtf(sum_floats(sum) / static_cast<float>(size) + eps);
}

// Rounds to bfloat16 and widens again, at the places where a sequence of PyTorch operations rounds.
inline Floats rounded(Floats values) {
    alignas(32) uint8_t lanes[2 * LANES];
    store_bfloat16(lanes, values);
    return load_bfloat16(lanes);
}

// Normalizes rows with these weights. With one_plus the factor is 1 + weight, and the product is rounded once.
struct Norm {
    const uint8_t* weight;
    float eps;
    bool one_plus;

    Floats apply(const uint8_t* x, int64_t k, float magnitude) const {
        const Floats scaled = multiply(load_bfloat16(x + 2 * k), broadcast(magnitude));
        const Floats factor = load_bfloat16(weight + 2 * k);
        return one_plus ? multiply(scaled, add(broadcast(1.0f), factor)) : multiply(rounded(scaled), factor);
    }
};

// Computes gate * sigmoid(slope(gate)) * up.
template <class Slope>
void multiply_gates(const uint8_t* gate_up, const Target& target, int64_t rows, int64_t size, int32_t threads,
                    Slope slope) {
    for_each_row(target, rows, size, threads, [=](int64_t row, uint8_t* out) {
        const uint8_t* source = gate_up + 4 * row * size;
        for (int64_t k = 0; k < size; k += LANES) {
            const Floats gate = load_bfloat16(source + 2 * k), up = load_bfloat16(source + 2 * (size + k));
            // Below -88, the exponential would overflow; the product with the gate is 0 in bfloat16 there.
            const Floats bounded = larger(slope(gate), broadcast(-88.0f));
            const Floats denominator = add(broadcast(1.0f), exponential(subtract(zero_floats(), bounded)));
            store_bfloat16(out + 2 * k, multiply(rounded(divide(gate, denominator)), up));
        }
    });
}

struct Rotation {
    const float* cosines;
    const float* sines;
};

// Multiplies one head of one row by the norm's weights and by `magnitude` if there are weights, and then rotates it.
// Element k is paired with element k + head_dim / 2.
inline void rotate_head(const uint8_t* x, const Norm& norm, float magnitude, Rotation rotation, int64_t head_dim,
                        uint8_t* out) {
    const auto load = [&](int64_t k) {
        return norm.weight == nullptr ? load_bfloat16(x + 2 * k) : rounded(norm.apply(x, k, magnitude));
    };
    const int64_t half = head_dim / 2;
    for (int64_t k = 0; k < half; k += LANES) {
        const Floats first = load(k), second = load(k + half);
        const Floats cosines = load_float32(rotation.cosines + k), sines = load_float32(rotation.sines + k);
        const Floats upper_cosines = load_float32(rotation.cosines + k + half);
        const Floats upper_sines = load_float32(rotation.sines + k + half);
        store_bfloat16(out + 2 * k, subtract(multiply(first, cosines), multiply(second, sines)));
        store_bfloat16(out + 2 * (k + half), add(multiply(second, upper_cosines), multiply(first, upper_sines)));
    }
}

// Converts a row of bfloat16 to float32.
inline void widen_row(const uint8_t* x, int64_t size, float* out) {
    for (int64_t k = 0; k < size; k += LANES) store_float32(out + k, load_bfloat16(x + 2 * k));
}

}  // namespace

void quasar_rms_norm(const uint8_t* x, const uint8_t* residual, const uint8_t* weight, uint8_t* total, uint8_t* out,
                     int8_t* quantized, float* scales, int64_t rows, int64_t size, int64_t group, float eps,
                     int32_t one_plus, int32_t threads) {
    const Norm norm = {weight, eps, one_plus != 0};
    for_each_row({out, quantized, scales, group}, rows, size, threads, [=](int64_t row, uint8_t* target) {
        const int64_t first = 2 * row * size;
        const uint8_t* source = x + first;
        if (residual != nullptr) {
            for (int64_t k = 0; k < 2 * size; k += 2 * LANES)
                store_bfloat16(total + first + k, add(load_bfloat16(source + k), load_bfloat16(residual + first + k)));
            source = total + first;
        }
        const float magnitude = inverse_magnitude(source, size, eps);
        for (int64_t k = 0; k < size; k += LANES) store_bfloat16(target + 2 * k, norm.apply(source, k, magnitude));
    });
}

void quasar_silu_mul(const uint8_t* gate_up, uint8_t* out, int8_t* quantized, float* scales, int64_t rows, int64_t size,
                     int64_t group, int32_t threads) {
    multiply_gates(gate_up, {out, quantized, scales, group}, rows, size, threads, [](Floats gate) { return gate; });
}

void quasar_gelu_mul(const uint8_t* gate_up, uint8_t* out, int8_t* quantized, float* scales, int64_t rows, int64_t size,
                     int64_t group, int32_t threads) {
    // gelu(x) = x / 2 * (1 + tanh(u)) = x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
    multiply_gates(gate_up, {out, quantized, scales, group}, rows, size, threads, [](Floats gate) {
        const Floats square = multiply(gate, gate);
        const Floats factor = multiply_add(square, broadcast(2 * 0.7978845608f * 0.044715f), broadcast(2 * 0.7978845608f));
        return multiply(gate, factor);
    });
}

void quasar_add_scaled(const uint8_t* x, const uint8_t* update, uint8_t* out, int64_t rows, int64_t size, float factor,
                       int32_t threads) {
    for_each_row({out, nullptr, nullptr, size}, rows, size, threads, [=](int64_t row, uint8_t* target) {
        const int64_t first = 2 * row * size;
        for (int64_t k = 0; k < 2 * size; k += 2 * LANES) {
            const Floats scaled = rounded(multiply(load_bfloat16(update + first + k), broadcast(factor)));
            store_bfloat16(target + k, add(load_bfloat16(x + first + k), scaled));
        }
    });
}

void quasar_first_maxima(const uint8_t* x, int64_t* indices, int64_t rows, int64_t size, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* values = x + 2 * row * size;
        Floats tops[4];
        for (Floats& top : tops) top = load_bfloat16(values);
        int64_t k = 0;
        for (; k + 4 * LANES <= size; k += 4 * LANES)
            for (int part = 0; part < 4; ++part)
                tops[part] = larger(tops[part], load_bfloat16(values + 2 * (k + part * LANES)));
        for (; k < size; k += LANES) tops[0] = larger(tops[0], load_bfloat16(values + 2 * k));
        const Floats top = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
        const Floats largest = broadcast(largest_lane(top));
        uint32_t found = 0;
        for (k = 0; k < size && found == 0; k += LANES) found = equal_lanes(load_bfloat16(values + 2 * k), largest);
        indices[row] = found == 0 ? 0 : k - LANES + __builtin_ctz(found);
    }
}

void quasar_select_inputs(const uint16_t* x, const int64_t* order, uint16_t* out, int64_t rows, int64_t size,
                          int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * size >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < size; ++k) out[row * size + k] = x[row * size + order[k]];
}

void quasar_rotary_write(const uint8_t* qkv, const float* cosines, const float* sines, const uint8_t* q_weight,
                         const uint8_t* k_weight, uint8_t* q, uint8_t* keys, uint8_t* values, uint8_t* key_scales,
                         uint8_t* value_scales, const int64_t* start, int64_t rows, int64_t heads, int64_t kv_heads,
                         int64_t head_dim, int64_t capacity, int64_t bits, float eps, int32_t one_plus, int32_t whole_norm,
                         int32_t threads) {
    const int64_t width = (heads + 2 * kv_heads) * head_dim, first = *start;
    const Slots key_slots = {keys, key_scales, bits, head_dim, capacity};
    const Slots value_slots = {values, value_scales, bits, head_dim, capacity};
    const bool quantized = bits != 16;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows * width >= PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < rows; ++row) {
        const uint8_t* source = qkv + 2 * row * width;
        const Rotation rotation = {cosines + row * head_dim, sines + row * head_dim};
        alignas(64) float wide[MAX_HEAD_DIM];
        alignas(64) uint8_t rotated[2 * MAX_HEAD_DIM];
        // Rotates `count` heads, each to the memory that place(head) returns, and then calls finish(head).
        const auto rotate_heads = [&](const uint8_t* weight, int64_t count, auto place, auto finish) {
            Norm norm = {weight, eps, one_plus != 0};
            float magnitude = 1.0f;
            if (weight != nullptr && whole_norm) magnitude = inverse_magnitude(source, count * head_dim, eps);
            for (int64_t head = 0; head < count; ++head, source += 2 * head_dim) {
                if (weight != nullptr && !whole_norm) magnitude = inverse_magnitude(source, head_dim, eps);
                rotate_head(source, norm, magnitude, rotation, head_dim, place(head));
                if (quantized) {
                    widen_row(place(head), head_dim, wide);
                    hadamard_transform(wide, head_dim);
                    finish(head);
                }
                if (weight != nullptr && whole_norm) norm.weight += 2 * head_dim;
            }
        };
        const auto query = [&](int64_t head) { return q + 2 * (row * heads + head) * head_dim; };
        rotate_heads(q_weight, heads, query, [&](int64_t head) {
            for (int64_t k = 0; k < head_dim; k += LANES) store_bfloat16(query(head) + 2 * k, load_float32(wide + k));
        });
        const auto key_row = [&](int64_t head) { return key_slots.row(head, first + row); };
        rotate_heads(
            k_weight, kv_heads, [&](int64_t head) { return quantized ? rotated : key_slots.codes_of(key_row(head)); },
            [&](int64_t head) { write_row(key_slots, key_row(head), wide); });
        for (int64_t head = 0; head < kv_heads; ++head, source += 2 * head_dim) {
            const int64_t slot = value_slots.row(head, first + row);
            if (!quantized) {
                __builtin_memcpy(value_slots.codes_of(slot), source, 2 * head_dim);
                continue;
            }
            widen_row(source, head_dim, wide);
            write_row(value_slots, slot, wide);
        }
    }
}
