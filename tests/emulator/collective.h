// Warp operations: every lane of the mask offers a value, waits for the others, and reads what they offered. They order no memory:
// ThreadSanitizer takes a value that went through shared memory with only a shuffle between for a race, as it is.
#pragma once
#include <bit>
#include <cstring>
#include <type_traits>

#include "block.h"

namespace emulator {

// What the lanes of the calling warp offered. Valid until the caller's next warp operation.
template <class T>
class Offers {
 public:
  Offers(const std::vector<Offer>& offers, unsigned first, unsigned mask) : offers_(offers), first_(first), mask_(mask) {}

  bool has(unsigned lane) const { return (mask_ >> lane & 1) && first_ + lane < offers_.size(); }

  // A lane outside the mask, or that does not exist, offers poison.
  T operator[](unsigned lane) const {
    T value;
    if (has(lane)) {
      std::memcpy(&value, &offers_[first_ + lane], sizeof value);
    } else {
      std::memset(&value, POISON, sizeof value);
    }
    return value;
  }

 private:
  const std::vector<Offer>& offers_;
  unsigned first_, mask_;
};

// To be called within a Quiet scope.
template <class T>
Offers<T> exchange(unsigned mask, const T& value, const Where& where) {
  static_assert(sizeof(T) <= sizeof(Offer) && std::is_trivially_copyable_v<T>);
  Thread& self = thread();
  std::vector<Offer>& offers = running->offers[self.operations++ % 2];
  std::memcpy(&offers[self.rank], &value, sizeof value);
  wait(State::at_warp, mask, where);
  return {offers, self.rank / WARP * WARP, mask};
}

// A shuffle within groups of `width` lanes: source(lane, first of its group) says whom to read; beyond the group, the lane's own value.
// In front of it too, but for an exchange, which reads earlier groups (so an H100 answered).
template <class T, class Source>
T shuffle(unsigned mask, T value, int width, const Where& where, Source source, bool earlier_groups = false) {
  const Quiet quiet;
  const auto offers = exchange(mask, value, where);
  const int self = static_cast<int>(lane()), group = self & ~(width - 1), from = source(self, group);
  return from < (earlier_groups ? 0 : group) || from >= group + width ? value : offers[from];
}

}  // namespace emulator

#define WHERE(name) emulator::Where where = {name, __builtin_FILE(), __builtin_LINE()}

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, WHERE("__shfl_sync")) {
  return emulator::shuffle(mask, v, width, where, [=](int, int group) { return group + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, WHERE("__shfl_xor_sync")) {
  return emulator::shuffle(mask, v, width, where, [=](int self, int) { return self ^ lanes; }, true);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned distance, int width = 32, WHERE("__shfl_up_sync")) {
  return emulator::shuffle(mask, v, width, where, [=](int self, int) { return self - static_cast<int>(distance); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned distance, int width = 32, WHERE("__shfl_down_sync")) {
  return emulator::shuffle(mask, v, width, where, [=](int self, int) { return self + static_cast<int>(distance); });
}

inline unsigned __ballot_sync(unsigned mask, int predicate, WHERE("__ballot_sync")) {
  const emulator::Quiet quiet;
  const auto offers = emulator::exchange(mask, predicate != 0, where);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < emulator::WARP; lane++) ballot |= static_cast<unsigned>(offers.has(lane) && offers[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate, WHERE("__any_sync")) {
  const emulator::Quiet quiet;
  const auto offers = emulator::exchange(mask, predicate != 0, where);
  int any = 0;
  for (unsigned lane = 0; lane < emulator::WARP; lane++) any |= offers.has(lane) && offers[lane];
  return any;
}
inline int __all_sync(unsigned mask, int predicate, WHERE("__all_sync")) {
  const emulator::Quiet quiet;
  const auto offers = emulator::exchange(mask, predicate != 0, where);
  int all = 1;
  for (unsigned lane = 0; lane < emulator::WARP; lane++) all &= !offers.has(lane) || offers[lane];
  return all;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, WHERE("__match_any_sync")) {
  const emulator::Quiet quiet;
  const auto offers = emulator::exchange(mask, value, where);
  unsigned equal = 0;
  for (unsigned lane = 0; lane < emulator::WARP; lane++) equal |= static_cast<unsigned>(offers.has(lane) && offers[lane] == value) << lane;
  return equal;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

inline void __syncthreads(WHERE("__syncthreads")) { emulator::barrier(where); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, WHERE("__syncwarp")) { emulator::warp_barrier(mask, where); }

#undef WHERE
