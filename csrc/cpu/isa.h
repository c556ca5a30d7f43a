// Which instruction set the CPU kernels use: the best that this processor has, of those that were built.
#pragma once

namespace fastprimer {

enum Isa { PORTABLE, AVX2, AVX512 };

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
  return PORTABLE;
}

inline const char* name_of(Isa isa) { return isa == AVX512 ? "avx512" : isa == AVX2 ? "avx2" : "portable"; }

}  // namespace fastprimer
