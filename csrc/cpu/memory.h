// Large outputs.
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

}  // namespace fastprimer
