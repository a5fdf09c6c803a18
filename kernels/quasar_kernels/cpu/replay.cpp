// Repeats a recorded sequence of calls in one call, because a kernel takes a few microseconds and running the Python
// interpreter between two kernels would take longer.
#include <cstring>
#include <utility>

#include "exports.h"

namespace {

// A recorded call. Every argument is in a 64-bit slot; rows_slot is the index of the number of rows, the only argument
// that varies from replay to replay.
struct Call {
    void (*invoke)(const uint64_t* slots);
    uint64_t* slots;
    int64_t rows_slot;
};

template <class T>
T read(uint64_t slot) {
    T value;
    std::memcpy(&value, &slot, sizeof value);  // x86 keeps the low bytes first
    return value;
}

template <class... T, size_t... INDEX>
void invoke(void (*function)(T...), const uint64_t* slots, std::index_sequence<INDEX...>) {
    function(read<T>(slots[INDEX])...);
}

template <class... T>
void invoke(void (*function)(T...), const uint64_t* slots) {
    invoke(function, slots, std::index_sequence_for<T...>());
}

}  // namespace

#define FUNCTION(name, ...) \
    EXPORTED void replay_##name(const uint64_t* slots) { invoke(quasar_##name, slots); }
#include "functions.h"
#undef FUNCTION

EXPORTED void quasar_replay(const Call* calls, int64_t count, int64_t rows) {
    for (const Call* call = calls; call < calls + count; ++call) {
        call->slots[call->rows_slot] = rows;
        call->invoke(call->slots);
    }
}
