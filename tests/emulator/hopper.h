// The names of hopper.cuh; what they mean stands there.
#pragma once
#include "emulator.h"
#include "wgmma.h"

#define __grid_constant__

namespace fastprimer {

using TensorMap = emulator::TensorMap;

struct alignas(8) Barrier {
  emulator::MBarrier state;
};

template <class T>
Error encode_tiles(TensorMap& map, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3], const int (&box)[4]) {
  static_assert(sizeof(T) == 2, "bfloat16 or float16");
  return emulator::encode(map, data, sizes, strides, box);
}

inline void barrier_init(Barrier& barrier, int arrivals) { emulator::barrier_init(barrier.state, arrivals); }
inline void barrier_init_done() { emulator::barrier_init_done(); }
inline void barrier_arrive(Barrier& barrier) { emulator::barrier_arrive(barrier.state, 0); }
inline void barrier_expect(Barrier& barrier, int bytes) { emulator::barrier_arrive(barrier.state, bytes); }
inline void barrier_wait(Barrier& barrier, unsigned parity, emulator::Where where = {"barrier_wait", __builtin_FILE(), __builtin_LINE()}) {
  emulator::barrier_wait(barrier.state, parity, where);
}

inline void copy_tile(void* shared, const TensorMap& map, Barrier& barrier, int c0, int c1, int c2, int c3) {
  emulator::copy_tile(shared, map, barrier.state, {c0, c1, c2, c3});
}

inline void sync_threads(int id, int threads, emulator::Where where = {"sync_threads", __builtin_FILE(), __builtin_LINE()}) {
  emulator::barrier_of(static_cast<unsigned>(id), static_cast<unsigned>(threads), where);
}

inline void fence_async() { emulator::fence_async(); }

template <int COUNT>
void give_registers() {
  emulator::set_registers(COUNT);
}
template <int COUNT>
void take_registers() {
  emulator::set_registers(COUNT);
}

inline uint64_t matrix_descriptor(const void* start, int panel_stride) {
  const uint64_t address = emulator::dynamic_offset(start, 16);
  return address >> 4 | static_cast<uint64_t>(panel_stride) >> 4 << 16 | uint64_t{8 * PANEL_ROW / 16} << 32 | uint64_t{1} << 62;
}

template <class... Registers>
void warpgroup_fence(Registers&... registers) {
  (emulator::warpgroup_fence(&registers, sizeof registers), ...);
}
inline void warpgroup_commit() { emulator::warpgroup_commit(); }
template <int PENDING, int... N>
void warpgroup_wait(float (&... registers)[N][4]) {
  emulator::warpgroup_wait(PENDING, {"warpgroup_wait", __FILE__, PENDING});
  (emulator::check_arrived(&registers[0][0], 4 * N), ...);
}

template <class T>
float widen_bits(uint16_t bits) {
  return widen(T{bits});
}

template <class T, int N>
void warpgroup_multiply(float (&d)[N][4], uint64_t a, uint64_t b, bool add,
                        emulator::Where where = {"warpgroup_multiply", __builtin_FILE(), __builtin_LINE()}) {
  emulator::warpgroup_multiply({&d[0][0], 8 * N, nullptr, a, b, add, widen_bits<T>, 0, 0}, where);
}
template <class T, int N>
void warpgroup_multiply(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, bool add,
                        emulator::Where where = {"warpgroup_multiply", __builtin_FILE(), __builtin_LINE()}) {
  emulator::warpgroup_multiply({&d[0][0], 8 * N, a, 0, b, add, widen_bits<T>, 0, 0}, where);
}

}  // namespace fastprimer
