// Memory with CUDA's rules. Shared memory begins poisoned: every byte is 0xFF, which is a NaN in float32, bfloat16 and float16 and -1
// in an integer, so a value that is used before it is written spoils the result. Each array has an allocation of its own, in
// which AddressSanitizer sees every access past the end; without it, a write there is found when the block ends.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizer.h"

namespace emulator {

constexpr int POISON = 0xFF;
constexpr size_t STATIC_SHARED_BYTES = 48 << 10;  // of it static
constexpr size_t SHARED_ALIGNMENT = 1024;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An access of several elements at once must be aligned to its whole size (16 bytes for the widest).
inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) throw Error("an access of " + std::to_string(bytes) + " bytes is not aligned to them");
}

inline uint64_t number(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

inline int compute_capability() { return static_cast<int>(number("FASTPRIMER_EMULATOR_CAPABILITY", 8)); }

// Of a block, static and dynamic: what sm_86, sm_89 and sm_120 have too, or Hopper.
inline size_t most_shared_bytes() { return compute_capability() == 9 ? 227 << 10 : 99 << 10; }

class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes) { dynamic_ = add(nullptr, dynamic_bytes); }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() {
    for (Array& array : arrays_) std::free(array.memory);
  }

  unsigned char* dynamic() const { return dynamic_; }
  size_t dynamic_bytes() const { return arrays_.front().bytes; }

  // The array that belongs to one declaration in the kernel's text, told apart by `key`.
  unsigned char* declared(const void* key, size_t bytes) {
    for (Array& array : arrays_) {
      if (array.key == key) return array.memory;
    }
    static_bytes_ += bytes;
    if (static_bytes_ > STATIC_SHARED_BYTES) throw Error("more than 48 KiB of static shared memory");
    return add(key, bytes);
  }

  void check_ends() const {
    for (const Array& array : arrays_) {
      for (size_t i = 0; i < GUARD_BYTES; i++) {
        if (array.memory[array.bytes + i] != POISON) throw Error("a write past the end of a shared-memory array");
      }
    }
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t GUARD_BYTES = 0;  // the sanitizer guards the end, to the byte
#else
  static constexpr size_t GUARD_BYTES = 256;
#endif

  struct Array {
    const void* key;
    unsigned char* memory;
    size_t bytes;
  };

  unsigned char* add(const void* key, size_t bytes) {
    total_ += bytes;
    if (total_ > most_shared_bytes()) throw Error("more than " + std::to_string(most_shared_bytes() >> 10) + " KiB of shared memory");
    void* memory = nullptr;
    if (posix_memalign(&memory, SHARED_ALIGNMENT, bytes + GUARD_BYTES) != 0) throw std::bad_alloc();
    std::memset(memory, POISON, bytes + GUARD_BYTES);
    arrays_.push_back({key, static_cast<unsigned char*>(memory), bytes});
    return arrays_.back().memory;
  }

  std::vector<Array> arrays_;
  unsigned char* dynamic_ = nullptr;
  size_t static_bytes_ = 0, total_ = 0;
};

}  // namespace emulator
