#include <sys/mman.h>

#include "exports.h"

// Requests huge pages for the whole pages of a buffer before it is first written, which saves misses of the address
// translation cache while weights are read. If the system refuses, nothing changes.
void quasar_advise_huge_pages(uint8_t* start, int64_t bytes) {
    const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}
