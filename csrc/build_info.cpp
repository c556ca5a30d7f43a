// What this build is made of, for `fastprimer doctor`. The only module that speaks to Python itself: everything else goes
// through torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

std::vector<std::string> split(const std::string& names) {
  std::vector<std::string> parts;
  std::stringstream stream(names);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "How fastprimer's native library was built.";
  m.def(
      "info",
      [] {
        pybind11::dict info;
        info["compiler"] = FASTPRIMER_COMPILER;
        info["cuda_compiler"] = FASTPRIMER_CUDA_COMPILER;
        info["cuda_architectures"] = split(FASTPRIMER_CUDA_ARCHITECTURES);
        info["cpu_instruction_sets"] = split(FASTPRIMER_ISAS);
        info["cpu_instruction_set_in_use"] = fastprimer::name_of(fastprimer::best_isa());
        info["emulator"] = bool(FASTPRIMER_EMULATOR);
        return info;
      },
      "Compiler, CUDA compiler and architectures (empty without CUDA), CPU instruction sets (and the one this processor gets), and whether "
      "the emulator is there.");
}
