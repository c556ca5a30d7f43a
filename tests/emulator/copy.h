// cp.async: copies from global to shared memory that are under way until they are waited for. Here a copy takes effect as late as CUDA
// allows, at its wait; from its issue until then the destination is poison. So data that is used too early is a NaN, and so is data
// that others still read when the next copy into the same place begins.
#pragma once
#include <cstring>

#include "block.h"

namespace emulator {

constexpr int COPY_BYTES = 16;

inline void copy_async(void* shared, const void* global, int bytes) {
  check_aligned(shared, COPY_BYTES);
  check_aligned(global, COPY_BYTES);
  if (bytes < 0 || bytes > COPY_BYTES) throw Error("cp.async: reads 0 to 16 bytes");
  std::memset(shared, POISON, COPY_BYTES);
  const Quiet quiet;
  Thread& self = thread();
  self.copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, self.copy_group});
}

inline void copy_async_commit() {
  const Quiet quiet;
  thread().copy_group++;
}

inline void copy_async_wait(int pending) {
  const Quiet quiet;
  Thread& self = thread();
  std::vector<AsyncCopy> later;
  for (const AsyncCopy& copy : self.copies) {
    if (copy.group >= self.copy_group - pending) {
      later.push_back(copy);
      continue;
    }
    const Loud loud;
    unsigned char data[COPY_BYTES] = {};
    std::memcpy(data, copy.global, copy.bytes);
    std::memcpy(copy.shared, data, COPY_BYTES);
  }
  self.copies.swap(later);
}

}  // namespace emulator
