"""RoPE's cases."""

from __future__ import annotations

import torch

from fastprimer.cases._case import Case, Inputs, Work, size


def _rope_work(a: dict) -> Work:
    # q and k are read, rotated, written; so are their gradients. Each position in use has a row of cos and sin, read once.
    q, positions = a["q"], a.get("positions")
    rows = q.shape[-3] if positions is None else min(positions.numel(), a["cos"].shape[0])
    moved = 2 * size(q, a["k"]) + size(a["cos"][:rows], a["sin"][:rows], positions)
    return Work(moved, moved)


def rope_case(
    name: str,
    batch: tuple,
    H: int,
    Hk: int,
    D: int,
    R: int,
    P=64,
    positions=None,
    tables=lambda t: t,
    half_tables=False,
    bench=False,
    view=lambda t: t,
    **options,
) -> Case:
    """positions: a function of the random (B, S) or (N,) ones; tables: a function of cos and sin."""

    def arguments(inputs: Inputs) -> dict:
        angle = torch.outer(torch.arange(P, dtype=torch.float64), 100.0 ** (-torch.arange(R // 2, dtype=torch.float64) / (R // 2)))
        wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        a = {
            k: tables(t.to(inputs.dtype if half_tables else wide)).to(inputs.device)
            for k, t in (("cos", angle.cos()), ("sin", angle.sin()))
        }
        a["q"] = inputs.normal(*batch, H, D, view=view)
        a["k"] = inputs.normal(*batch, Hk, D, view=view) if Hk else None
        if positions:
            a["positions"] = positions(inputs.integers(0, P, *a["q"].shape[:-2]))
        return a | options

    return Case("rope", name, arguments, ("q_rotated", "k_rotated"), bench, _rope_work)


ROPE = [
    rope_case("half-split", (2, 9), 4, 2, 16, 16),
    rope_case("interleaved", (2, 9), 4, 2, 16, 16, interleaved=True),
    rope_case("partial", (2, 5), 3, 1, 24, 8),
    rope_case("partial-odd-rest", (2, 5), 3, 1, 23, 6, interleaved=True),
    rope_case("odd-pairs", (1, 7), 2, 3, 42, 42),
    rope_case("odd-pairs-interleaved", (1, 7), 2, 3, 42, 42, interleaved=True),
    rope_case("one-pair", (1, 4), 2, 1, 2, 2),
    rope_case("positions", (2, 7), 4, 2, 64, 64, positions=lambda p: p),
    rope_case("packed-positions", (11,), 2, 2, 32, 16, positions=lambda p: p.int(), interleaved=True),
    rope_case("packed", (11,), 2, 1, 64, 64),
    rope_case("shared-positions", (3, 6), 2, 1, 32, 32, positions=lambda p: p[:1].expand(3, -1)),
    rope_case("transposed-positions", (3, 6), 2, 1, 32, 32, positions=lambda p: p.t().contiguous().t()),
    rope_case("q-alone", (2, 5), 3, 0, 128, 128),
    rope_case("large-head", (1, 3), 2, 1, 256, 192),
    rope_case("heads-first", (2, 3), 9, 9, 32, 32, view=lambda t: t.transpose(1, 2)),
    rope_case("features-first", (2, 5), 16, 16, 16, 16, view=lambda t: t.transpose(-1, -2)),
    rope_case("channels-last", (2, 4), 8, 8, 5, 6, view=lambda t: t.permute(0, 3, 1, 2)),
    rope_case("sliced", (2, 18), 2, 1, 32, 32, view=lambda t: t[:, ::2]),
    rope_case("unaligned", (2, 4), 3, 2, 34, 32, view=lambda t: t[..., 1:33]),
    rope_case("expanded", (1, 6), 2, 1, 32, 32, view=lambda t: t.expand(3, -1, -1, -1)),
    rope_case("half-tables", (1, 9), 2, 1, 32, 32, half_tables=True),
    rope_case("tables-of-whole-heads", (1, 9), 2, 1, 32, 16, tables=lambda t: torch.cat((t, t), -1)[:, :8]),
    rope_case("tables-transposed", (1, 9), 2, 1, 32, 16, tables=lambda t: t.t().contiguous().t()),
    rope_case("one-token", (1, 1), 2, 1, 8, 8),
    rope_case("no-tokens", (2, 0), 2, 1, 8, 8),
    rope_case("many-tokens", (2, 150), 5, 2, 64, 64, P=200),
    rope_case("bench-llama", (1, 2048), 32, 8, 128, 128, P=2048, bench=True),
    rope_case("bench-batch", (4, 2048), 32, 8, 128, 128, P=2048, bench=True),
    rope_case("bench-positions", (1, 2048), 32, 8, 128, 128, P=2048, bench=True, positions=lambda p: p),
    rope_case("bench-interleaved", (1, 2048), 32, 8, 128, 128, P=2048, bench=True, interleaved=True),
    rope_case("bench-calculator", (128, 10), 4, 2, 16, 16, bench=True),
]
