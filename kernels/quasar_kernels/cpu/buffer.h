#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

// Memory that only grows. Every thread keeps its own between calls, so that later calls allocate nothing.
struct Buffer {
    void* memory = nullptr;
    int64_t capacity = 0;

    // Returns at least this many bytes, aligned to a vector. Their content is undefined.
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
