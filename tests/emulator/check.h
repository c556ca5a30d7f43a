// What the checks of emulated kernels share: random inputs, guarded outputs, comparison with float64, one run per seed.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device.cuh"

namespace check {

using fastprimer::bfloat16;
using fastprimer::float16;
using fastprimer::narrow;
using fastprimer::widen;

inline int failures = 0;
inline uint64_t digest = 0;  // of all outputs under the seed in force

// Of a planted bug the report that was looked for, $FASTPRIMER_UNTIL, is enough.
inline void fail(const std::string& what) {
  const std::string line = "FAILED " + what;
  const char* until = std::getenv("FASTPRIMER_UNTIL");
  std::puts(line.c_str());
  failures++;
  if (until && line.find(until) != std::string::npos) {
    std::fflush(stdout);
    std::_Exit(1);
  }
}

// Half a unit in the last place of 1.
template <class T>
constexpr double ROUNDING = 0;
template <>
constexpr double ROUNDING<float> = 0x1p-24;
template <>
constexpr double ROUNDING<bfloat16> = 0x1p-8;
template <>
constexpr double ROUNDING<float16> = 0x1p-11;

// Memory of exactly `count` elements, filled with NaN, `offset` elements off a 16-byte boundary. AddressSanitizer sees any access
// beyond; otherwise guards of NaN stand on both sides: what is read there spoils the result, and what is written there is found.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, size_t offset = 0) : count_(count), begin_(GUARD + offset) {
    void* memory = nullptr;
    bytes_ = (begin_ + count + GUARD) * sizeof(T);
    if (posix_memalign(&memory, 64, bytes_) != 0) std::abort();
    memory_.reset(static_cast<unsigned char*>(memory));
    std::memset(memory, emulator::POISON, bytes_);
  }

  T* data() { return reinterpret_cast<T*>(memory_.get()) + begin_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data()[i]; }

  // That nothing was written outside. Also adds the contents to the digest.
  void finish(const std::string& name) {
    const unsigned char* first = memory_.get();
    for (size_t i = begin_ * sizeof(T); i < (begin_ + count_) * sizeof(T); i++) digest = digest * 1099511628211u + first[i];
    const auto spoiled = [&](size_t i) { return first[i] != emulator::POISON; };
    for (size_t i = 0; i < begin_ * sizeof(T); i++) {
      if (spoiled(i)) return fail(name + ": a write before its begin");
    }
    for (size_t i = (begin_ + count_) * sizeof(T); i < bytes_; i++) {
      if (spoiled(i)) return fail(name + ": a write past its end");
    }
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t GUARD = 0;
#else
  static constexpr size_t GUARD = 1 << 14;
#endif
  size_t count_, begin_, bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

template <class T>
void randomize(Buffer<T>& buffer, std::mt19937& random) {
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < buffer.size(); i++) buffer[i] = narrow<T>(normal(random));
}

// One element against the truth; `scale` is the size of the numbers that were added up in float32 to get it.
template <class T>
bool close(T value, double truth, double scale) {
  return std::abs(widen(value) - truth) <= 1.01 * ROUNDING<T> * std::abs(truth) + 8 * ROUNDING<float> * scale + 1e-7 * (sizeof(T) == 2);
}

using Kernel = std::function<void()>;

inline void expect(const std::string& name, bool true_statement) {
  if (!true_statement) fail(name);
}

inline void expect_report(const std::string& report, unsigned threads, size_t shared_bytes, const Kernel& kernel) {
  const char* error = emulator::launch(dim3(1), dim3(threads), shared_bytes, kernel);
  if (error == nullptr) return fail("not reported: " + report);
  if (std::string(error).find(report) == std::string::npos) fail("expected the report '" + report + "', got '" + error + "'");
}

inline void run_kernel(unsigned blocks, unsigned threads, size_t shared_bytes, const Kernel& kernel) {
  if (const char* error = emulator::launch(dim3(blocks), dim3(threads), shared_bytes, kernel)) fail(error);
}

// A sum of terms that each hold a weight, which is rounded to T and has the error of its score: given the sum of the terms' sizes, and
// that of the largest score's terms.
template <class T>
bool near(T value, double truth, double terms, double score_terms) {
  if (std::isnan(truth)) return std::isnan(widen(value));
  return close(value, truth, terms * (ROUNDING<T> / ROUNDING<float> / 4 + 4 + score_terms));
}

// Runs `cases` once with each seed from 0 up: all must pass, with the same bits. Arguments of the program: how many seeds; "quick" for
// the small cases only.
inline int run(int argc, char** argv, const std::function<void(bool quick)>& cases) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 1;
  const bool quick = argc > 2 && std::string(argv[2]) == "quick";
  uint64_t first_digest = 0;
  for (int seed = 0; seed < seeds && failures == 0; seed++) {
    setenv("FASTPRIMER_EMULATOR_SEED", std::to_string(seed).c_str(), 1);
    digest = 0;
    cases(quick);
    if (seed == 0) first_digest = digest;
    if (failures == 0 && digest != first_digest) fail("the bits of the outputs depend on the schedule");
    if (failures > 0) std::printf("with seed %d\n", seed);
  }
  if (failures == 0) std::printf("%d seeds passed\n", seeds);
  return failures > 0;
}

}  // namespace check
