#!/bin/sh
# `make gpu`: on a machine with a GPU and nvcc, with that machine's own python (torch >= 2.10, triton >= 3.6), no network.
#   make gpu                                  everything but tune, which only suggests, and models, a part of bench
#   make gpu WHAT="test models"               some of probe test sanitize train models bench profile growth tune, in that order;
#                                             nothing is built where the library is newer than its sources
#   OP=attention                              only that operation (or OP=model); CASE=causal  only those cases;
#   PART=1/8                                  of sanitize's cases, the first of eight equal parts
#   LIMIT=200                                 seconds that each command of a part may take
#   RESULTS=folder                            where results go (benchmarks/results)
# A part that fails does not keep the next from running; the exit status tells.
set -u
cd "$(dirname "$0")/.."
parts="probe test sanitize train models bench profile growth tune"
what=${WHAT:-probe test sanitize train bench profile growth}
for one in $what; do
  case " $parts " in *" $one "*) ;; *) echo "make gpu: WHAT: expected some of $parts, got $one" >&2; exit 2 ;; esac
done
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
status=0
mkdir -p "$results"

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
name=$device${OP:+-$OP}${CASE:+-$CASE}

asked() {
  case " $what " in *" $1 "*) ;; *) return 1 ;; esac
}
part() {
  began=$(date +%s)
  echo "== $1"
  shift
  timeout -s INT "${LIMIT:-0}" "$@" || { status=1; echo "== FAILED: $*"; }
  echo "== $(($(date +%s) - began)) s"
}

ready() {
  $python - <<'READY'
import sys
from fastprimer.backends import unavailable
for backend in ("cuda", "triton"):
    reason = unavailable("rms_norm", backend, "cuda")
    if reason:
        sys.exit(f"make gpu: {backend}: {reason}")
READY
}
if [ -z "$(find csrc CMakeLists.txt setup.py -newer fastprimer/_native.so 2>&1 | head -n 1)" ] && ready; then
  echo "== built already"
else
  echo "== build for sm_$architecture ($device)"
  began=$(date +%s)
  CMAKE_ARGS="-DFASTPRIMER_CUDA=ON -DFASTPRIMER_CUDA_ARCHITECTURES=$architecture" PIP_BREAK_SYSTEM_PACKAGES=1 \
    $python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . || exit 1
  echo "== $(($(date +%s) - began)) s"
  ready || exit 1
fi
$python -m fastprimer.cli doctor

asked probe && part "the emulated layouts against this GPU" env PYTHONPATH="tests:${PYTHONPATH:-}" $python -m emulator.probe
if asked test; then
  # What does not depend on the GPU, most of the suite, is CI's.
  cd tests
  $python -c "import xdist" 2>/dev/null && workers="-n auto --maxprocesses 12 --dist loadscope"
  part "the tests of what runs on the GPU" $python -m pytest ${workers:-} -p no:benchmark -q -k "not cpu and not reference" \
    test_backends.py test_gpu.py test_contract.py test_fuzz.py test_attention.py test_cuda_cross_entropy.py \
    test_cross_entropy.py test_decoding.py::test_generation_by_a_cuda_graph test_emulator.py::test_probe_agrees_with_hardware
  cd ..
fi
# Without torch's cache of memory, so that a read or write beyond a tensor leaves its allocation; only our kernels are looked at.
sanitize() {
  part "$1 of $2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-regex kns=fastprimer --error-exitcode 9 \
    $python -m fastprimer.verify cuda cuda 0 "${PART:-1/1}" "$2"
}
if asked sanitize; then
  for op in ${OP:-rms_norm rope swiglu attention attention_with_kv_cache route moe cross_entropy linear_cross_entropy}; do
    sanitize memcheck "$op"
    sanitize racecheck "$op"
  done
fi
if asked train; then
  for backend in cuda triton; do
    for task in calculator calculator-moe; do
      part "$task trained by $backend" $python -m fastprimer.cli train $task --backend $backend --out "runs/$device-$task-$backend"
    done
  done
fi
if asked models; then # training steps against the peers that matter, and tokens against the roof
  bench="$python -m fastprimer.cli bench --op model --dtype bfloat16 --rounds 7"
  theirs() { $python -c "import transformers" 2>/dev/null && echo "$1" || echo none; }
  part "a dense model's step" $bench --case llama-1b --pass training --peers "$(theirs hf-compiled,liger)" \
    --out "$results/$device-llama-1b.json"
  part "a model of experts' step" $bench --case mixtral-8x160m --pass training --peers "$(theirs transformers)" \
    --out "$results/$device-mixtral.json"
  part "tokens" $bench --case llama-1b --pass decoding --peers none --out "$results/$device-llama-1b-tokens.json"
  part "tokens alone" $bench --case llama-1b-alone --pass decoding --peers none --out "$results/$device-llama-1b-alone-tokens.json"
fi
asked bench && part "the benchmarks" \
  $python -m fastprimer.cli bench ${OP:+--op "$OP"} ${CASE:+--case "$CASE"} --out "$results/$name.json"
if asked profile; then
  for case in ${CASE:-llama-1b mixtral-8x160m}; do
    for measured in training decoding; do
      part "where $measured of $case goes" $python benchmarks/profile_model.py --case "$case" --pass $measured \
        --out "$results/profile-$device-$case-$measured.txt"
    done
  done
fi
asked growth && part "cost over size" \
  $python -m fastprimer.cli bench --growth ${OP:+--op "$OP"} --out "$results/growth-$name.json"
asked tune && part "tiles" \
  $python benchmarks/tune.py ${OP:+--op "$OP"} ${CASE:+--case "$CASE"} --out "$results/tiles-$name.md"
exit $status
