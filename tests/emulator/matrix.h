// The matrix instructions of a warp: ldmatrix and mma.sync m16n8k16, in the layouts of the PTX manual ("Warp-level matrix load
// instruction: ldmatrix", "Matrix fragments for mma.m16n8k16 with floating point type"). python -m tests.emulator.probe compares them
// with hardware.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "collective.h"

namespace emulator {

constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// The eight rows of a matrix are read at once, 16 bytes each, from eight groups of four banks: rows in one group wait for each other.
inline unsigned conflicts(const Offers<const unsigned char*>& rows, unsigned matrix) {
  unsigned uses[8] = {}, most = 0;
  for (unsigned row = 0; row < 8; row++) {
    most = std::max(most, ++uses[reinterpret_cast<uintptr_t>(rows[8 * matrix + row]) / 16 % 8]);
  }
  return most - 1;
}

// Lane 8 m + r points to row r of matrix m; a lane receives elements (i, j), (i, j + 1) with i = lane / 4, j = 2 (lane % 4), of the
// matrix or of its transpose.
template <bool TRANSPOSED>
void load_matrix(uint32_t (&fragment)[4], const void* row, const Where& where) {
  check_aligned(row, 16);
  const Quiet quiet;
  const auto rows = exchange(ALL_LANES, static_cast<const unsigned char*>(row), where);
  const unsigned i = lane() / 4, j = lane() % 4 * 2;
  for (unsigned m = 0; m < 4; m++) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; e++) {
      const unsigned char* element = TRANSPOSED ? rows[8 * m + j + e] + 2 * i : rows[8 * m + i] + 2 * (j + e);
      const Loud loud;
      std::memcpy(&pair[e], element, 2);
    }
    fragment[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    if (lane() == 0) running->bank_conflicts += conflicts(rows, m);
  }
}

struct Operands {
  uint32_t a[4], b[2];
};

// d += a b in float32, summed along k in its order. (Hardware sums in an order, and with a width, of its own.) `wide` turns the 16 bits
// of an element into a float.
template <class Wide>
void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Where& where, Wide wide) {
  const Quiet quiet;
  Operands mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const auto offers = exchange(ALL_LANES, mine, where);
  const unsigned i = lane() / 4, j = lane() % 4 * 2;
  for (unsigned k = 0; k < 16; k++) {
    // The two neighbours k, k + 1 lie in one register of the lane (row or column, k / 2 % 4), low half first.
    const unsigned holder = k / 2 % 4, half = k % 2 * 16;
    const Operands row = offers[i * 4 + holder], column[2] = {offers[j * 4 + holder], offers[(j + 1) * 4 + holder]};
    for (unsigned r = 0; r < 2; r++) {
      const float a_value = wide(static_cast<uint16_t>(row.a[r + k / 8 * 2] >> half));
      for (unsigned c = 0; c < 2; c++) d[2 * r + c] += a_value * wide(static_cast<uint16_t>(column[c].b[k / 8] >> half));
    }
  }
}

}  // namespace emulator
