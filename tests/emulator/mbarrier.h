// mbarrier: a word of shared memory that counts arrivals of threads and bytes of TMA copies, phase by phase.
#pragma once
#include <cstdint>
#include <cstring>

#include "memory.h"

namespace emulator {

class MBarrier {
 public:
  void init(int arrivals) {
    if (arrivals < 1 || arrivals > 1 << 10) throw Error("mbarrier: initialised for no, or for more than 1024, arrivals");
    std::memset(this, 0, sizeof *this);
    magic_ = MAGIC;
    expected_ = pending_ = static_cast<unsigned>(arrivals);
  }

  void check() const {
    if (magic_ != MAGIC) throw Error("mbarrier: used before it was initialised");
  }

  // To whoever is not the thread that initialised it. The fence after that is for TMA, which is no thread.
  void fence() { fenced_ = 1; }
  bool fenced() const { return fenced_ == 1; }

  void arrive(int bytes) {
    check();
    if (pending_ == 0) throw Error("mbarrier: more arrivals in a phase than it was initialised for");
    pending_--;
    bytes_ += bytes;
    step();
  }

  void receive(int bytes) {
    check();
    if (bytes_ < bytes) throw Error("mbarrier: bytes of a TMA copy arrived that this phase does not expect");
    bytes_ -= bytes;
    step();
  }

  // Whether the phase of this parity is complete.
  bool complete(unsigned parity) const {
    check();
    return phase_ != parity;
  }

 private:
  void step() {
    if (pending_ > 0 || bytes_ > 0) return;
    pending_ = expected_;
    phase_ ^= 1;
  }

  static constexpr uint64_t MAGIC = 0x5A;
  uint64_t magic_ : 8, fenced_ : 1, phase_ : 1, expected_ : 11, pending_ : 11;
  int64_t bytes_ : 32;
};
static_assert(sizeof(MBarrier) == 8);

}  // namespace emulator
