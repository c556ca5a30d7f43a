#include "brgemm.h"

#include <dlfcn.h>

#include <cstring>

namespace fastprimer {
namespace {

bool allowed = true, forced = false;

constexpr int64_t SIZE = 32;  // of the matrices that a function is tried on

// libtorch_cpu exports these functions without promising to; so they are looked up by name, and tried before they are used.
template <class Function>
Function look_up(void* torch_cpu, const char* name) {
  return torch_cpu ? reinterpret_cast<Function>(dlsym(torch_cpu, name)) : nullptr;
}

// Whether the product of ones and of small integers is exact. A function throws where the processor has no such instructions.
template <class T>
bool works(SmallProduct multiply, T (*number)(float), bool pairs) {
  static T a[SIZE * SIZE], b[SIZE * SIZE];
  static float c[SIZE * SIZE];
  for (int64_t k = 0; k < SIZE; k++) {
    for (int64_t n = 0; n < SIZE; n++) {
      a[n * SIZE + k] = number(static_cast<float>(k % 5 + n % 3));
      b[pairs ? (k / 2 * SIZE + n) * 2 + k % 2 : k * SIZE + n] = number(static_cast<float>(k % 7 - n % 4));
      c[k * SIZE + n] = 1;
    }
  }
  try {
    multiply(SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, true, a, b, c, pairs);
  } catch (...) {
    return false;
  }
  for (int64_t m = 0; m < SIZE; m++) {
    for (int64_t n = 0; n < SIZE; n++) {
      int64_t expected = 1;
      for (int64_t k = 0; k < SIZE; k++) expected += (k % 5 + m % 3) * (k % 7 - n % 4);
      if (c[m * SIZE + n] != static_cast<float>(expected)) return false;
    }
  }
  return true;
}

uint16_t bfloat16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

void* libtorch() { return dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD); }

// torch.backends.mkldnn.flags: where they are off, the product of bfloat16 throws, and that of float32 is another one.
bool mkldnn_enabled() {
  static const auto context = look_up<const void* (*)()>(libtorch(), "_ZN2at13globalContextEv");
  static const auto enabled = look_up<bool (*)(const void*)>(libtorch(), "_ZNK2at7Context17userEnabledMkldnnEv");
  return context == nullptr || enabled == nullptr || enabled(context());
}

Brgemm look() {
  void* torch_cpu = libtorch();
  const auto float32 = look_up<SmallProduct>(torch_cpu, "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");
  const auto bfloat16 = look_up<SmallProduct>(torch_cpu, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
  const auto release = look_up<void (*)(bool)>(torch_cpu, "_ZN2at6native7cpublas14brgemm_releaseEb");
  if (release == nullptr) return {};
  Brgemm found = {};
  found.release = release;
  if (float32 && works<float>(float32, [](float v) { return v; }, false)) found.float32 = float32;
  if (bfloat16 && works<uint16_t>(bfloat16, bfloat16_bits, true)) found.bfloat16 = bfloat16;
  release(true);
  return found;
}

}  // namespace

Brgemm brgemm() {
  if (!allowed || !mkldnn_enabled()) return {};
  static const Brgemm found = look();
  return found;
}

bool force_bfloat16_tiles(bool force) { return forced = force; }

bool bfloat16_tiles_forced() { return forced; }

bool allow_brgemm(bool allow) {
  allowed = allow;
  return brgemm().float32 != nullptr;
}

}  // namespace fastprimer
