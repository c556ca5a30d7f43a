// TMA: copies of boxes of a tensor (up to four dimensions, elements of 16 bits) from global to shared memory, in the 128-byte swizzle.
// From its issue until it arrives the destination is poison; when it arrives is up to the scheduler.
#pragma once
#include <cstring>

#include "block.h"

namespace emulator {

constexpr unsigned SWIZZLED_ROW = 128;

// Where the 16-byte chunk of an address lies in the 128-byte swizzle: its place in a row of 128 bytes, exclusive or the row's number.
inline size_t swizzled(size_t address) { return address ^ ((address / SWIZZLED_ROW % 8) << 4); }

struct TensorMap {
  const unsigned char* data;
  int64_t sizes[4], strides[4];  // strides in bytes
  int box[4];

  int bytes() const { return 2 * box[0] * box[1] * box[2] * box[3]; }
};

// What cuTensorMapEncodeTiled refuses: null, or why.
inline const char* encode(TensorMap& map, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3], const int (&box)[4]) {
  map = {static_cast<const unsigned char*>(data), {}, {2}, {}};
  if (data == nullptr || reinterpret_cast<uintptr_t>(data) % 16 != 0) return "TMA: the tensor's address is no multiple of 16 bytes";
  for (int d = 0; d < 4; d++) {
    map.sizes[d] = sizes[d];
    map.box[d] = box[d];
    if (sizes[d] < 1 || sizes[d] > int64_t{1} << 32) return "TMA: a size of a tensor is not in 1 .. 2^32";
    if (box[d] < 1 || box[d] > 256) return "TMA: a size of a box is not in 1 .. 256";
    if (d == 0) continue;
    map.strides[d] = 2 * strides[d - 1];
    if (map.strides[d] <= 0 || map.strides[d] % 16 != 0 || map.strides[d] >= int64_t{1} << 40) {
      return "TMA: a stride is no positive multiple of 16 bytes below 2^40";
    }
  }
  return 2 * box[0] == SWIZZLED_ROW ? nullptr : "TMA: rows of a box in the 128-byte swizzle must have 128 bytes";
}

// The offset of an address in the block's dynamic shared memory, where `bytes` from it on must lie.
inline size_t dynamic_offset(const void* p, size_t bytes) {
  const SharedMemory& shared = running->shared;
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(p) - shared.dynamic());
  if (offset > shared.dynamic_bytes() || offset + bytes > shared.dynamic_bytes()) throw Error("not in dynamic shared memory");
  return offset;
}

inline void copy_tile(void* to, const TensorMap& map, MBarrier& barrier, const int (&at)[4]) {
  const size_t offset = dynamic_offset(to, map.bytes());
  if (offset % SWIZZLED_ROW != 0) throw Error("TMA: an address in shared memory is no multiple of 128 bytes");
  std::memset(to, POISON, map.bytes());
  const Quiet quiet;
  barrier.check();
  if (!barrier.fenced()) throw Error("TMA: the mbarrier's initialisation was not followed by barrier_init_done");
  release(&barrier);
  unsigned char* dynamic = running->shared.dynamic();
  const std::array<int, 4> first = {at[0], at[1], at[2], at[3]};
  const auto write = [=] {
    size_t place = offset;
    int i[4];
    const auto inside = [&](int d, int add) { return first[d] + i[d] + add >= 0 && first[d] + i[d] + add < map.sizes[d]; };
    for (i[3] = 0; i[3] < map.box[3]; i[3]++) {
      for (i[2] = 0; i[2] < map.box[2]; i[2]++) {
        for (i[1] = 0; i[1] < map.box[1]; i[1]++) {
          const bool row_inside = inside(1, 0) && inside(2, 0) && inside(3, 0);
          for (i[0] = 0; i[0] < map.box[0]; i[0]++, place += 2) {
            unsigned char* element = dynamic + swizzled(place / 16 * 16) + place % 16;
            std::memset(element, 0, 2);
            if (!row_inside || !inside(0, 0)) continue;
            const unsigned char* from = map.data;
            for (int d = 0; d < 4; d++) from += (first[d] + i[d]) * map.strides[d];
            std::memcpy(element, from, 2);
          }
        }
      }
    }
  };
  running->tile_copies.push_back({&barrier, map.bytes(), write});
}

inline void barrier_init(MBarrier& barrier, int arrivals) {
  const Quiet quiet;
  check_aligned(&barrier, sizeof barrier);
  dynamic_offset(&barrier, sizeof barrier);
  barrier.init(arrivals);
  running->mbarriers.push_back({&barrier, thread().rank});
}

inline void barrier_init_done() {
  const Quiet quiet;
  for (auto& [barrier, rank] : running->mbarriers) {
    if (rank == thread().rank) barrier->fence();
  }
}

inline void barrier_arrive(MBarrier& barrier, int bytes) {
  const Quiet quiet;
  release(&barrier);
  barrier.arrive(bytes);
}

inline void barrier_wait(MBarrier& barrier, unsigned parity, const Where& where) {
  const Quiet quiet;
  if (parity > 1) throw Error("mbarrier: a parity is 0 or 1");
  Thread& self = thread();
  self.mbarrier = &barrier;
  self.parity = parity;
  if (!barrier.complete(parity)) wait(State::polling, 0, where);
  acquire(&barrier);
}

// A thread's stores to shared memory, as those of its generic proxy, wait for fence_async before TMA or products may see them.
inline void note_store(const void* p, size_t bytes) {
  const Quiet quiet;
  const SharedMemory& shared = running->shared;
  const auto* first = static_cast<const unsigned char*>(p);
  if (first < shared.dynamic() || first >= shared.dynamic() + shared.dynamic_bytes()) return;
  const size_t offset = first - shared.dynamic();
  const auto mine = static_cast<uint16_t>(thread().rank + 1);
  for (size_t i = offset / Block::CHUNK; i <= (offset + bytes - 1) / Block::CHUNK; i++) {
    if (running->unfenced[i] != mine) thread().stored.push_back(static_cast<unsigned>(i));
    running->unfenced[i] = mine;
  }
}

inline void fence_async() {
  const Quiet quiet;
  for (const unsigned i : thread().stored) {
    if (running->unfenced[i] == thread().rank + 1) running->unfenced[i] = 0;
  }
  thread().stored.clear();
}

}  // namespace emulator
