// Large outputs, and scratch memory.
#pragma once
#include <cstdint>

namespace fastprimer {

// Prepares a large output, freshly allocated, to be written from end to end; its contents stay as they are.
//
// Such memory has no pages yet: each is mapped by a fault when it is first written, and 4 KiB at a time that takes longer
// than a memory-bound kernel itself. Huge pages make it several times faster, except on a virtual machine whose host still
// has to back them, where they make it several times slower. So huge pages are taken one by one, and given up for the rest
// of this output as soon as one came slowly.
void expect_writes(void* data, int64_t bytes);

// Memory for a while, aligned to 64 bytes; null where there is none. A thread keeps some megabytes of what it has given back: the C library
// would return them to the system, and the next call would meet a page fault for every 4 KiB.
void* borrow(int64_t bytes);
void give_back(void* data, int64_t bytes);

// For tests: fills what is borrowed from now on with NaN, or no more; returns whether it did. Then new tensors are torch's to fill, too.
bool poison_scratch(bool poison);
bool memory_is_poisoned();

}  // namespace fastprimer
