#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

// Memory that grows and stays: kept per thread between calls, so that the steady state allocates nothing.
struct Buffer {
    void* memory = nullptr;
    int64_t capacity = 0;

    // At least so many bytes, aligned to a vector; their content is undefined.
    void* reserve(int64_t bytes) {
        if (bytes > capacity) {
            std::free(memory);
            capacity = (bytes + 4095) / 4096 * 4096;
            memory = std::aligned_alloc(64, capacity);
            if (memory == nullptr) std::abort();
        }
        return memory;
    }
    ~Buffer() { std::free(memory); }
};

}  // namespace
