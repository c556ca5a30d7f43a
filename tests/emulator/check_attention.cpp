// Attention's CUDA kernels for every GPU.
#include "check_attention.h"

namespace {

using namespace check;

const std::vector<Case> CASES = {
    {.S = {5}, .T = {7}, .H = 4, .Hk = 2, .D = 16, .Dv = 16, .quick = true},
    {.S = {70}, .T = {70}, .H = 2, .Hk = 1, .D = 64, .Dv = 64, .right = 0, .quick = true},                     // tiles of a group
    {.S = {3, 3}, .T = {8, 8}, .H = 3, .Hk = 1, .D = 40, .Dv = 24, .right = 0, .sinks = true, .quick = true},  // bottom right
    {.S = {9}, .T = {4}, .H = 2, .Hk = 2, .D = 24, .Dv = 72, .right = 0, .softcap = 0.7, .quick = true},       // rows without keys
    {.S = {20, 1, 0, 30}, .T = {20, 3, 4, 0}, .H = 2, .Hk = 1, .D = 16, .Dv = 16, .packed = true, .sinks = true, .quick = true},
    {.S = {9, 9}, .T = {9, 9}, .H = 2, .Hk = 1, .D = 20, .Dv = 9, .right = 0, .dlse = false, .more = 3, .offset = 1, .quick = true},  // odd
    {.S = {90}, .T = {140}, .H = 1, .Hk = 1, .D = 8, .Dv = 8, .left = 20, .right = 10, .quick = true},  // a window of some tiles
    {.S = {4, 7, 5}, .T = {6, 9, 5}, .H = 2, .Hk = 2, .D = 16, .Dv = 16, .packed = true, .nan_sequence = 1, .quick = true},
    {.S = {8}, .T = {8}, .H = 1, .Hk = 1, .D = 16, .Dv = 16, .more = 3, .quick = true},  // tokens not aligned
    {.S = {12}, .T = {12}, .H = 1, .Hk = 1, .D = 16, .Dv = 16, .right = 0, .nan_key = 7, .quick = true},
    {.S = {6}, .T = {200}, .H = 5, .Hk = 1, .D = 64, .Dv = 64, .more = 8},
    {.S = {140}, .T = {9}, .H = 2, .Hk = 1, .D = 32, .Dv = 32, .left = 0, .right = 0, .sinks = true},
    {.S = {33}, .T = {65}, .H = 2, .Hk = 1, .D = 128, .Dv = 80, .left = 16, .right = 0, .softcap = 5},
    {.S = {20}, .T = {36}, .H = 1, .Hk = 1, .D = 256, .Dv = 256, .right = 0},
    {.S = {17, 70}, .T = {33, 66}, .H = 2, .Hk = 1, .D = 136, .Dv = 64, .packed = true, .left = 9, .sinks = true},
};

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [](bool quick) {
    check_dtype<float>(Dtype::float32, "float32", quick, CASES);
    check_dtype<bfloat16>(Dtype::bfloat16, "bfloat16", quick, CASES);
    check_dtype<float16>(Dtype::float16, "float16", quick, CASES);
  });
}
