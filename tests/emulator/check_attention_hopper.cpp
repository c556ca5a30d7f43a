// Attention's CUDA kernels for Hopper.
#include "check_attention.h"
#include "hopper.cuh"

namespace {

using namespace check;

const std::vector<Case> CASES = {
    {.S = {5}, .T = {7}, .H = 4, .Hk = 2, .D = 16, .Dv = 16, .quick = true},
    {.S = {70}, .T = {600}, .H = 3, .Hk = 1, .D = 64, .Dv = 64, .right = 0, .sinks = true, .quick = true},  // 126 rows in a tile
    {.S = {20, 1, 0, 30}, .T = {140, 3, 4, 0}, .H = 2, .Hk = 1, .D = 16, .Dv = 24, .packed = true, .sinks = true, .quick = true},
    {.S = {9}, .T = {4}, .H = 2, .Hk = 2, .D = 24, .Dv = 72, .right = 0, .softcap = 0.7, .quick = true},  // rows without keys
    {.S = {30}, .T = {150}, .H = 5, .Hk = 1, .D = 32, .Dv = 40, .left = 90, .right = 2, .softcap = 0.7, .quick = true},
    {.S = {4, 7, 5}, .T = {6, 9, 5}, .H = 2, .Hk = 2, .D = 16, .Dv = 16, .packed = true, .nan_sequence = 1, .quick = true},
    {.S = {12}, .T = {12}, .H = 1, .Hk = 1, .D = 16, .Dv = 16, .right = 0, .nan_key = 7, .quick = true},
    {.S = {70}, .T = {300}, .H = 1, .Hk = 1, .D = 128, .Dv = 80, .left = 150, .right = 10, .scale = 0.08, .more = 8},
    {.S = {20, 20}, .T = {150, 150}, .H = 2, .Hk = 1, .D = 256, .Dv = 256, .right = 0, .scale = 0.06},
    {.S = {13}, .T = {300}, .H = 5, .Hk = 1, .D = 40, .Dv = 128, .softcap = 5, .dlse = false},
};

// Each case must come to products of warpgroups: it is no case for Hopper's kernels otherwise.
template <class T>
void check_hopper(Dtype dtype, const char* type, bool quick) {
  for (const Case& c : CASES) {
    if (quick && !c.quick) continue;
    emulator::products = 0;
    check_dtype<T>(dtype, type, quick, {c});
    if (emulator::products == 0) fail(std::string(type) + ": a case was not served by the kernels for Hopper");
  }
}

}  // namespace

int main(int argc, char** argv) {
  setenv("FASTPRIMER_EMULATOR_CAPABILITY", "9", 1);
  return run(argc, argv, [](bool quick) {
    check_hopper<bfloat16>(Dtype::bfloat16, "bfloat16", quick);
    check_hopper<float16>(Dtype::float16, "float16", quick);
  });
}
