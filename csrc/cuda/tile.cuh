// Tiles in shared memory, of attention and of the products of experts.
#pragma once
#include "device.cuh"

namespace fastprimer {

template <class T>
constexpr int CHUNK = 16 / sizeof(std::remove_const_t<T>);  // elements in 16 bytes

// Rows of WIDTH features in shared memory, in chunks of 16 bytes that are permuted within a row so that the eight rows of an 8 x 8
// matrix lie in different banks.
template <class T, int WIDTH>
struct Tile {
  T* data;

  __device__ __forceinline__ T* chunk(int row, int chunk) const { return data + (row * (WIDTH / CHUNK<T>)+(chunk ^ (row % 8))) * CHUNK<T>; }
  // Columns 8 n + 2 (lane % 4) and the next. For float32 what depends on the lane is kept apart from n, so that one register serves
  // all n of a row.
  __device__ __forceinline__ T* pair(int row, int n, int lane) const {
    if constexpr (sizeof(T) == 2) return chunk(row, n) + lane % 4 * 2;
    const int half = lane % 4 / 2 ^ row % 2;
    return data + row * WIDTH + half * 4 + lane % 2 * 2 + (2 * n ^ row % 8 / 2 * 2) * 4;
  }
};

}  // namespace fastprimer
