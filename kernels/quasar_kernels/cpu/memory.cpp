#include <sys/mman.h>

#include "exports.h"

// Asks for huge pages below the whole pages of a buffer, before it is first written: fewer address translations to
// miss while weights stream. The request is a hint, and refusal changes nothing.
void quasar_advise_huge_pages(uint8_t* start, int64_t bytes) {
    const uintptr_t page = 4096, first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
}
