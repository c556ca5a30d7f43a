"""Bugs to plant in the kernels for Hopper, and what catches each."""

from __future__ import annotations

from .bugs import Bug
from .build import Patch

CHECK, FORWARD = "attention_hopper", "csrc/cuda/attention_hopper.cuh"

BUGS = [
    Bug(
        "barriers are used before TMA can see them",
        CHECK,
        Patch(FORWARD, "    barrier_init_done();\n", ""),
        {"plain": "not followed by barrier_init_done"},
    ),
    Bug(
        "a stage is never free",
        CHECK,
        Patch(FORWARD, "barrier_wait(free, parity ^ 1);", "barrier_wait(free, parity);"),
        {"plain": "deadlock"},
    ),
    Bug(
        "a stage is overwritten while others read it",
        CHECK,
        Patch(FORWARD, "  barrier_wait(free, parity ^ 1);", "  if (parity > 1) barrier_wait(free, parity ^ 1);"),
        {"plain": "FAILED"},
    ),
    Bug(
        "fewer bytes are expected than come",
        CHECK,
        Patch(FORWARD, "barrier_expect(full, ROWS * WIDTH", "barrier_expect(full, ROWS * PANEL / 2"),
        {"plain": "this phase does not expect"},
    ),
    Bug(
        "keys are used before they have arrived: wrong parity",
        CHECK,
        Patch(FORWARD, "barrier_wait(shared.k_full[next], next_parity);", "barrier_wait(shared.k_full[next], next_parity ^ 1);"),
        {"plain": "FAILED"},
    ),
    Bug(
        "values are used before they have arrived",
        CHECK,
        Patch(FORWARD, "    barrier_wait(shared.v_full[stage], parity);\n    warpgroup_fence", "    warpgroup_fence"),
        {"plain": "changed between its issue and its wait"},
    ),
    Bug(
        "scores are read while they are made",
        CHECK,
        Patch(FORWARD, "warpgroup_wait<1>(s[0]);", "warpgroup_wait<2>(s[0]);"),
        {"plain": "a product to them is under way"},
    ),
    Bug(
        "sums are rescaled while they are made",
        CHECK,
        Patch(FORWARD, "    warpgroup_wait<0>(o[0]);\n    release", "    warpgroup_wait<1>(o[0]);\n    release"),
        {"plain": "a product to them is under way"},
    ),
    Bug(
        "a stage is released before its keys are multiplied",
        CHECK,
        Patch(
            FORWARD,
            "    warpgroup_wait<1>(s[0]);\n    release(shared.k_free[next]);",
            "    release(shared.k_free[next]);\n    warpgroup_wait<1>(s[0]);",
        ),
        {"plain": "changed between its issue and its wait"},
    ),
    Bug(
        "weights are not fenced",
        CHECK,
        Patch(FORWARD, "    warpgroup_fence(o[0], weights);\n    start_sum", "    warpgroup_fence(o[0]);\n    start_sum"),
        {"plain": "no warpgroup_fence"},
    ),
    Bug(
        "zeros are not fenced",
        CHECK,
        Patch(FORWARD, "  fence_async();\n", ""),
        {"plain": "without fence_async"},
    ),
    Bug(
        "values are used before all threads have cleared theirs",
        CHECK,
        Patch(FORWARD, "  sync_threads(1, THREADS);\n", ""),
        {"plain": "FAILED"},
    ),
    Bug(
        "NaN past a sequence reaches its sums",
        CHECK,
        Patch(FORWARD, "  if (rows < KEYS) clear_rows", "  if (rows < 0) clear_rows"),
        {"plain": "o is wrong"},
    ),
    Bug(
        "wrong part of a row in a descriptor",
        CHECK,
        Patch(FORWARD, "k + d / PANEL * KEYS * PANEL + d % PANEL", "k + d / PANEL * KEYS * PANEL + d % PANEL / 2"),
        {"plain": "is wrong"},
    ),
    Bug(
        "wrong stride of panels in a descriptor",
        CHECK,
        Patch(FORWARD, "matrix_descriptor(rows, KEYS * PANEL_ROW)", "matrix_descriptor(rows, KEYS * PANEL_ROW / 2)"),
        {"plain": "o is wrong"},
    ),
    Bug(
        "wrong row of the mask",
        CHECK,
        Patch(FORWARD, "hide(s, first, at, row_warp)", "hide(s, first, at, row_warp + 1)"),
        {"plain": "lse is wrong"},
    ),
    Bug(
        "a tile that some queries see in part is not masked",
        CHECK,
        Patch(FORWARD, "first + KEYS > tile.end_all) hide", "first + KEYS > tile.end_all + 1) hide"),
        {"plain": "lse is wrong"},
    ),
    Bug(
        "sums keep their old maximum",
        CHECK,
        Patch(FORWARD, "    scale_rows(o, rescale);\n", ""),
        {"plain": "o is wrong"},
    ),
    Bug(
        "keys of the first packed sequence serve all",
        CHECK,
        Patch(FORWARD, "static_cast<int>(at.first_key) + first", "first"),
        {"plain": "is wrong"},
    ),
    Bug(
        "all groups have the first one's queries",
        CHECK,
        Patch(FORWARD, "panel * PANEL, at.hk * at.G,", "panel * PANEL, 0,"),
        {"plain": "is wrong"},
    ),
    Bug(
        "the rows after the last are stored",
        CHECK,
        Patch(FORWARD, "min(at.S, tile.first_query + tile.tokens) * at.G;", "(tile.first_query + tile.tokens) * at.G;"),
        {"plain": "FAILED"},
    ),
]
