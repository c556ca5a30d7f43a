// wgmma: products of 64 rows by a warpgroup (four warps), m64nNk16, in the layouts of the PTX manual ("Asynchronous warpgroup-level
// matrix instructions"). Each warp makes 16 rows, its registers those of mma.sync.
//
// A product takes effect at its wait. Until then the registers of d are poison, and what is written to them is lost; if an operand in
// shared memory is not the same at the wait as it was at the issue, that is reported: it was not there yet, or was overwritten.
#pragma once
#include <atomic>

#include "collective.h"
#include "matrix.h"
#include "tma.h"

namespace emulator {

constexpr unsigned PRODUCT_DEPTH = 16, WARP_ROWS = 16, MOST_COLUMNS = 256;
constexpr unsigned REGISTERS = 64 << 10, MOST_REGISTERS = 255;  // of a multiprocessor, of a thread

inline std::atomic<uint64_t> products{0};  // of a warp's 16 rows, since it was last set to 0

// A matrix in shared memory as a descriptor gives it, in the 128-byte swizzle, in units of 16 bytes: bits 0-13 its address, 16-29 the
// stride from a panel of 64 elements to the next (if those are not along k), 32-45 that from eight rows to the next, 49-51 an offset, 0
// for panels at multiples of 1024 bytes, 62-63 the kind of swizzle, 1 for 128 bytes.
struct Matrix {
  size_t start, panel_stride, eight_rows;

  explicit Matrix(uint64_t descriptor)
      : start((descriptor & 0x3FFF) << 4), panel_stride((descriptor >> 16 & 0x3FFF) << 4), eight_rows((descriptor >> 32 & 0x3FFF) << 4) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) throw Error("wgmma: a descriptor of another kind than the 128-byte swizzle");
  }

  // Where row r, k of a matrix is whose rows lie along k; and where row k, column n of one whose rows lie along n.
  size_t along_k(unsigned r, unsigned k) const { return swizzled(start + r / 8 * eight_rows + r % 8 * SWIZZLED_ROW + 2 * k); }
  size_t along_n(unsigned k, unsigned n) const {
    return swizzled(start + n / 64 * panel_stride + k / 8 * eight_rows + k % 8 * SWIZZLED_ROW + n % 64 * 2);
  }
};

// The 16 bits at an offset of dynamic shared memory, read by the tensor cores.
inline uint16_t read_operand(size_t offset) {
  const unsigned char* p = running->shared.dynamic() + offset;
  dynamic_offset(p, 2);
  if (running->unfenced[offset / Block::CHUNK] != 0) throw Error("wgmma: reads what was stored in shared memory without fence_async");
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

// The operands of the calling warp's part of a product, k by k; a's rows are those of the warp, or missing.
struct ProductOperands {
  uint16_t a[WARP_ROWS][PRODUCT_DEPTH] = {}, b[PRODUCT_DEPTH][MOST_COLUMNS];

  ProductOperands(const Product& product, unsigned warp) {
    const Matrix b_matrix(product.b);
    for (unsigned k = 0; k < PRODUCT_DEPTH; k++) {
      for (unsigned n = 0; n < product.columns; n++) {
        b[k][n] = read_operand(product.a_registers == nullptr ? b_matrix.along_k(n, k) : b_matrix.along_n(k, n));
      }
    }
    if (product.a_registers != nullptr) return;
    const Matrix a_matrix(product.a);
    for (unsigned r = 0; r < WARP_ROWS; r++) {
      for (unsigned k = 0; k < PRODUCT_DEPTH; k++) a[r][k] = read_operand(a_matrix.along_k(warp % 4 * WARP_ROWS + r, k));
    }
  }

  uint64_t digest(unsigned columns) const {
    uint64_t digest = 0;
    const auto add = [&](uint16_t bits) { digest = digest * 1099511628211u + bits; };
    for (unsigned k = 0; k < PRODUCT_DEPTH; k++) {
      for (unsigned r = 0; r < WARP_ROWS; r++) add(a[r][k]);
      for (unsigned n = 0; n < columns; n++) add(b[k][n]);
    }
    return digest;
  }
};

inline std::vector<float>& numbers_of(Thread& thread, float* d) {
  for (Accumulator& accumulator : thread.accumulators) {
    if (accumulator.d == d) return accumulator.numbers;
  }
  throw Error("wgmma: lost an accumulator");
}

// Begins d = a b^T (a_registers null) or d = a b, or adds it, in groups that warpgroup_commit ends.
inline void warpgroup_multiply(Product product, const Where& where) {
  struct Same {
    uint64_t a, b;
    unsigned columns;
    bool add;
    bool operator==(const Same&) const = default;
  };
  const Quiet quiet;
  Thread& self = thread();
  if (self.rank / (4 * WARP) * 4 * WARP + 4 * WARP > running->threads.size()) throw Error("wgmma: the warp is not in a group of four");
  const auto fenced = [&](const void* registers) {
    return std::any_of(self.fenced.begin(), self.fenced.end(),
                       [&](auto range) { return registers >= range.first && registers < range.second; });
  };
  if (!fenced(product.d) || (product.a_registers != nullptr && !fenced(product.a_registers))) {
    throw Error("wgmma: no warpgroup_fence of its registers since the last wait");
  }
  const Same mine = {product.a, product.b, product.columns, product.add};
  const auto offers = exchange(ALL_LANES, mine, where);
  for (unsigned other = 0; other < WARP; other++) {
    if (!(offers[other] == mine)) throw Error("wgmma: operands differ between the lanes of a warp");
  }
  if (lane() == 0) {
    const Loud loud;
    product.operands = ProductOperands(product, self.rank / WARP).digest(product.columns);
  }
  product.group = self.product_group;
  self.products.push_back(product);
  const unsigned registers = product.columns / 2;
  for (const Accumulator& accumulator : self.accumulators) {
    if (accumulator.d == product.d) return;
  }
  self.accumulators.push_back({product.d, std::vector<float>(product.d, product.d + registers)});
  std::memset(product.d, POISON, registers * sizeof(float));
}

inline void warpgroup_fence(const void* registers, size_t bytes) {
  const Quiet quiet;
  thread().fenced.emplace_back(registers, static_cast<const unsigned char*>(registers) + bytes);
}

inline void warpgroup_commit() {
  const Quiet quiet;
  thread().product_group++;
}

// Makes one product of a warp, its `which`-th, for all lanes.
inline void make_product(unsigned warp, size_t which) {
  Thread* lanes = &running->threads[warp * WARP];
  const Product& product = lanes[0].products[which];
  const ProductOperands operands(product, warp);
  products++;
  if (operands.digest(product.columns) != product.operands) {
    throw Error("wgmma: an operand in shared memory changed between its issue and its wait");
  }
  float b[PRODUCT_DEPTH][MOST_COLUMNS], sums[WARP_ROWS][MOST_COLUMNS] = {};
  for (unsigned k = 0; k < PRODUCT_DEPTH; k++) {
    for (unsigned n = 0; n < product.columns; n++) b[k][n] = product.wide(operands.b[k][n]);
  }
  for (unsigned r = 0; r < WARP_ROWS; r++) {
    for (unsigned k = 0; k < PRODUCT_DEPTH; k++) {
      uint16_t bits = operands.a[r][k];
      if (product.a_registers != nullptr) {
        // The two neighbours k, k + 1 lie in one register of the lane (row, k / 2 % 4), low half first.
        const uint32_t* registers = lanes[r % 8 * 4 + k / 2 % 4].products[which].a_registers;
        bits = static_cast<uint16_t>(registers[r / 8 + k / 8 * 2] >> k % 2 * 16);
      }
      const float a = product.wide(bits);
      for (unsigned n = 0; n < product.columns; n++) sums[r][n] += a * b[k][n];
    }
  }
  for (unsigned lane = 0; lane < WARP; lane++) {
    std::vector<float>& numbers = numbers_of(lanes[lane], lanes[lane].products[which].d);
    for (unsigned i = 0; i < numbers.size(); i++) {
      const float sum = sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
      numbers[i] = product.add ? numbers[i] + sum : sum;
    }
  }
}

// Waits until at most `pending` of the thread's latest groups are under way. The lane that goes on first makes the products of all.
inline void warpgroup_wait(int pending, const Where& where) {
  const Quiet quiet;
  Thread& self = thread();
  exchange(ALL_LANES, pending, where);
  self.fenced.clear();
  const auto done = [&](const Thread& thread, size_t which) { return thread.products[which].group < thread.product_group - pending; };
  size_t count = 0;
  while (count < self.products.size() && done(self, count)) count++;
  if (count == 0) return;
  const unsigned warp = self.rank / WARP;
  for (size_t which = 0; which < count; which++) make_product(warp, which);
  for (unsigned lane = 0; lane < WARP; lane++) {
    Thread& thread = running->threads[warp * WARP + lane];
    thread.products.erase(thread.products.begin(), thread.products.begin() + static_cast<std::ptrdiff_t>(count));
    std::erase_if(thread.accumulators, [&](const Accumulator& accumulator) {
      for (const Product& product : thread.products) {
        if (product.d == accumulator.d) return false;
      }
      std::memcpy(accumulator.d, accumulator.numbers.data(), accumulator.numbers.size() * sizeof(float));
      return true;
    });
  }
}

// To be called for registers that a wait is to bring.
inline void check_arrived(const float* d, size_t count) {
  const Quiet quiet;
  for (const Accumulator& accumulator : thread().accumulators) {
    if (accumulator.d >= d && accumulator.d < d + count) throw Error("wgmma: registers are read while a product to them is under way");
  }
}

// setmaxnreg: a thread's registers, which the block's warps share.
inline void set_registers(unsigned count) {
  const Quiet quiet;
  if (count < 24 || count > 256 || count % 8 != 0) throw Error("setmaxnreg: a multiple of 8 in 24 .. 256 is expected");
  thread().registers = count;
  const auto threads = static_cast<unsigned>(running->threads.size());
  const unsigned at_launch = std::min(REGISTERS / threads, MOST_REGISTERS) / 8 * 8;
  unsigned all = 0;
  for (const Thread& other : running->threads) all += other.registers;
  if (all > at_launch * threads) throw Error("setmaxnreg: more registers than the block was launched with");
}

}  // namespace emulator
