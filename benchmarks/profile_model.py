"""Where a model's time on a GPU goes: the kernels of one training step, or of one token of decoding, largest first.

    python benchmarks/profile_model.py --case llama-1b --pass training [--backend cuda] [--out FILE]

The models are those of the benchmark (fastprimer/benchmark/models.py). Times are torch.profiler's, of the device alone; the last lines hold
them against the time from the first kernel's start to the last one's end, for what is missing there is the device waiting for the host.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastprimer.backends import BACKENDS, use_backend
from fastprimer.benchmark import models
from fastprimer.benchmark.contest import Settings
from fastprimer.options import positive

CASES = {case.name: case for case in models.MODEL_CASES["cuda"]}


def kernels(call, times: int) -> tuple[dict[str, list[float]], float]:
    """(name -> milliseconds of each launch in all calls; milliseconds from the first's start to the last's end)"""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(times):
            call()
        torch.cuda.synchronize()
    on_device = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("Optimizer.")]
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in on_device]  # without the optimizer's note around its own kernels
    found = defaultdict(list)
    for start, end, name in spans:
        found[short(name)].append((end - start) / 1e3)
    return found, (max(end for _, end, _ in spans) - min(start for start, _, _ in spans)) / 1e3


def short(name: str) -> str:
    """The beginning of a kernel's name, which tells it from others."""
    return name.removeprefix("void ")[:110]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="llama-1b")
    parser.add_argument("--pass", dest="measured", choices=(models.TRAINING, models.DECODING), default=models.TRAINING)
    parser.add_argument("--backend", choices=(*BACKENDS, "auto"), default="auto")
    parser.add_argument("--times", type=positive, default=5, help="calls that are recorded (default 5)")
    parser.add_argument("--out", type=Path, help="write the table there too")
    return parser


def main() -> None:
    args = parser().parse_args()
    with use_backend(args.backend):
        case, settings = CASES[args.case], Settings("cuda", rounds=1)
        weights = models.weights_of(case, torch.bfloat16, settings)
        call, reason = models.our_call(case, args.measured, weights, case.inputs(args.measured, settings))
        found, span = kernels(call, args.times)
    total = sum(map(sum, found.values())) / args.times
    lines = [f"{args.case}, {args.measured}, {args.backend}, bfloat16 on {torch.cuda.get_device_name()}; ms of one call"]
    lines += [f"no CUDA graph: {reason}"] if reason else []
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1])):
        ms = sum(times) / args.times
        if ms >= total / 500:
            lines.append(
                f"{ms:9.3f} {100 * ms / total:5.1f}% {len(times) / args.times:7.1f} x {1e3 * sum(times) / len(times):9.1f} us  {name}"
            )
    lines.append(f"{total:9.3f} of {span / args.times:.3f} ms, {sum(map(len, found.values())) / args.times:.0f} launches")
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
