#!/bin/sh
# `make gpu`: on a machine with a GPU and nvcc, with that machine's own python (torch >= 2.10, triton >= 3.6), no network.
#   make gpu                everything        make gpu WHAT=probe|test|bench        one part
set -eu
cd "$(dirname "$0")/.."
what=${WHAT:-all}
python=${GPU_PYTHON:-python3}

architecture=$($python - <<'PROBE'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("make gpu: this python's torch sees no CUDA device")
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major >= 9 else ""))
PROBE
)
device=$($python -c "import re, torch; print(re.sub(r'\W+', '-', torch.cuda.get_device_name()).lower())")

echo "== build for sm_$architecture ($device)"
CMAKE_ARGS="-DFASTPRIMER_CUDA=ON -DFASTPRIMER_CUDA_ARCHITECTURES=$architecture" \
  $python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
$python -m fastprimer.cli doctor

if [ "$what" = all ] || [ "$what" = probe ]; then
  echo "== the emulated layouts against this GPU"
  $python -m tests.emulator.probe
fi
if [ "$what" = all ] || [ "$what" = test ]; then
  echo "== the test suite, on the GPU where a kernel runs there"
  $python -m fastprimer.cli verify
  $python -m pytest
fi
if [ "$what" = all ] || [ "$what" = bench ]; then
  echo "== the benchmarks"
  $python -m fastprimer.cli bench --out "benchmarks/results/$device.json"
fi
