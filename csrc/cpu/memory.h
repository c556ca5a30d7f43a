// Fresh memory for large outputs.
#pragma once
#include <cstdint>

namespace fastprimer {

// Asks the system to back a large output with huge pages. A freshly allocated tensor has no pages yet: each is mapped by a
// fault when it is first written, and 4 KiB at a time that takes longer than a memory-bound kernel itself.
void expect_writes(void* data, int64_t bytes);

}  // namespace fastprimer
