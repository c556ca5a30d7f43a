#!/bin/sh
# `make gpu`: on a machine with a GPU and nvcc, with that machine's own python (torch >= 2.10, triton >= 3.6), no network.
#   make gpu                                  everything
#   make gpu WHAT=probe|test|sanitize|train|bench|profile|growth   one part; OP=attention measures only that operation (or OP=model), CASE=causal only those cases
#   make gpu WHAT=tune OP=attention           the neighbours of each tile that Triton's kernels choose
# A part that fails does not keep the next from running; the exit status tells.
set -u
cd "$(dirname "$0")/.."
what=${WHAT:-all}
python=${PYTHON:-python3}
status=0

architecture=$($python - <<'PROBE'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("make gpu: this python's torch sees no CUDA device")
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major >= 9 else ""))
PROBE
) || exit 1
device=$($python -c "import re, torch; print(re.sub(r'\W+', '-', torch.cuda.get_device_name()).lower())")

part() {
  echo "== $1"
  shift
  "$@" || { status=1; echo "== FAILED: $*"; }
}

echo "== build for sm_$architecture ($device)"
CMAKE_ARGS="-DFASTPRIMER_CUDA=ON -DFASTPRIMER_CUDA_ARCHITECTURES=$architecture" PIP_BREAK_SYSTEM_PACKAGES=1 \
  $python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . || exit 1
$python -m fastprimer.cli doctor
$python - <<'READY' || exit 1
import sys
from fastprimer.backends import unavailable
for backend in ("cuda", "triton"):
    reason = unavailable("rms_norm", backend, "cuda")
    if reason:
        sys.exit(f"make gpu: {backend}: {reason}")
READY

case $what in all | probe) part "the emulated layouts against this GPU" env PYTHONPATH=tests $python -m emulator.probe ;; esac
case $what in all | test)
  # What does not depend on the GPU, most of the suite, is CI's.
  cd tests
  $python -c "import xdist" 2>/dev/null && workers="-n auto --maxprocesses 12 --dist loadscope"
  part "the tests of what runs on the GPU" $python -m pytest ${workers:-} -p no:benchmark -k "not cpu and not reference" \
    test_backends.py test_gpu.py test_contract.py test_fuzz.py test_attention.py test_cuda_cross_entropy.py \
    test_cross_entropy.py test_decoding.py::test_generation_by_a_cuda_graph test_emulator.py::test_probe_agrees_with_hardware
  cd .. ;;
esac
# Without torch's cache of memory, so that a read or write beyond a tensor leaves its allocation; only our kernels are looked at.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-regex kns=fastprimer --error-exitcode 9 \
    $python -m fastprimer.verify cuda cuda 0 "$2"
}
case $what in all | sanitize)
  for op in ${OP:-rms_norm rope swiglu attention attention_with_kv_cache route moe cross_entropy linear_cross_entropy}; do
    part "memory of $op" sanitize memcheck "$op"
    part "races of $op" sanitize racecheck "$op"
  done ;;
esac
case $what in all | train)
  for backend in cuda triton; do
    for task in calculator calculator-moe; do
      part "$task trained by $backend" $python -m fastprimer.cli train $task --backend $backend --out "runs/$device-$task-$backend"
    done
  done ;;
esac
name=$device${OP:+-$OP}${CASE:+-$CASE}
case $what in all | bench)
  part "the benchmarks" $python -m fastprimer.cli bench ${OP:+--op "$OP"} ${CASE:+--case "$CASE"} --out "benchmarks/results/$name.json" ;;
esac
case $what in all | profile)
  for measured in training decoding; do
    for case in ${CASE:-llama-1b mixtral-8x160m}; do
      part "where $measured of $case goes" $python benchmarks/profile.py --case "$case" --pass $measured \
        --out "benchmarks/results/profile-$device-$case-$measured.txt"
    done
  done ;;
esac
case $what in all | growth)
  part "cost over size" $python -m fastprimer.cli bench --growth ${OP:+--op "$OP"} --out "benchmarks/results/growth-$name.json" ;;
esac
case $what in tune)
  part "tiles" $python benchmarks/tune.py ${OP:+--op "$OP"} ${CASE:+--case "$CASE"} --out "benchmarks/results/tiles-$name.md" ;;
esac
exit $status
