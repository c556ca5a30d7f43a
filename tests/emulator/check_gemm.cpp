// The emulator's test kernel (gemm.cuh) against float64, with not one bank conflict.
#include "check.h"
#include "gemm.cuh"

namespace {

using namespace check;

template <class T>
void check_gemm(int M, int N, int K) {
  std::mt19937 random(1);
  Buffer<T> a(static_cast<size_t>(M) * K), b(static_cast<size_t>(K) * N);
  Buffer<float> d(static_cast<size_t>(M) * N);
  randomize(a, random);
  randomize(b, random);
  emulator::bank_conflicts = 0;
  const std::string name = "gemm " + std::to_string(M) + " x " + std::to_string(N) + " x " + std::to_string(K);
  if (const char* error = fastprimer::gemm(fastprimer::Cuda{}, a.data(), b.data(), d.data(), M, N, K)) return fail(name + ": " + error);
  for (int m = 0; m < M; m++) {
    for (int n = 0; n < N; n++) {
      double truth = 0, scale = 0;
      for (int k = 0; k < K; k++) {
        const double term = static_cast<double>(widen(a[static_cast<size_t>(m) * K + k])) * widen(b[static_cast<size_t>(k) * N + n]);
        truth += term;
        scale += std::abs(term);
      }
      if (!close(d[static_cast<size_t>(m) * N + n], truth, scale)) return fail(name + ": d is wrong");
    }
  }
  d.finish(name + ": d");
  if (emulator::bank_conflicts != 0) fail(name + ": bank conflicts: " + std::to_string(emulator::bank_conflicts));
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool quick) {
    check_gemm<bfloat16>(64, 64, 96);
    check_gemm<float16>(33, 40, 72);
    if (quick) return;
    check_gemm<bfloat16>(100, 72, 8);
    check_gemm<float16>(130, 64, 128);
  });
}
