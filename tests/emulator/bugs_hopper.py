"""Bugs to plant in the kernels for Hopper, and what catches each."""

from __future__ import annotations

from .bugs import Bug
from .build import Patch

CHECK = "attention_hopper"
TILE, FORWARD = "csrc/cuda/attention_hopper_tile.cuh", "csrc/cuda/attention_forward_hopper.cuh"
BACKWARD, LAUNCH = "csrc/cuda/attention_backward_hopper.cuh", "csrc/cuda/attention_hopper.cu"
CHANGED, UNDER_WAY = "changed between its issue and its wait", "a product to them is under way"


def bug(name: str, file: str, before: str, after: str, caught: str) -> Bug:
    return Bug(name, CHECK, Patch(file, before, after), {"plain": caught})


BUGS = [
    bug(
        "barriers are used before TMA can see them",
        FORWARD,
        "    barrier_init_done();\n",
        "",
        "not followed by barrier_init_done",
    ),
    bug("a stage is never free", FORWARD, "barrier_wait(free, stage.parity ^ 1);", "barrier_wait(free, stage.parity);", "deadlock"),
    bug(
        "a stage is overwritten while others read it",
        FORWARD,
        "barrier_wait(free, stage.parity ^ 1);",
        "if (stage.parity > 1) barrier_wait(free, 0);",
        "FAILED",
    ),
    bug("fewer bytes are expected than come", FORWARD, "barrier_expect(full, TILE_BYTES);", "barrier_expect(full, 16);", "does not expect"),
    bug(
        "keys are used before they have arrived: wrong parity",
        FORWARD,
        "barrier_wait(k_full[stage.index], stage.parity);",
        "barrier_wait(k_full[stage.index], stage.parity ^ 1);",
        "FAILED",
    ),
    bug(
        "values are used before they have arrived",
        FORWARD,
        "barrier_wait(v_full[now], parity);",
        "if (parity > 1) barrier_wait(v_full[now], 0);",
        CHANGED,
    ),
    bug("scores are read while they are made", FORWARD, "warpgroup_wait<1>(s[0]);", "warpgroup_wait<2>(s[0]);", UNDER_WAY),
    bug(
        "sums are rescaled while they are made",
        FORWARD,
        "warpgroup_wait<0>(o[0]);\n      release",
        "warpgroup_wait<1>(o[0]);\n      release",
        UNDER_WAY,
    ),
    bug(
        "a stage is released before its values are multiplied",
        FORWARD,
        "      warpgroup_wait<0>(o[0]);\n      release(v_free[now]);",
        "      release(v_free[now]);\n      warpgroup_wait<0>(o[0]);",
        CHANGED,
    ),
    bug(
        "weights are not fenced",
        FORWARD,
        "warpgroup_fence(o[0], weights);\n      start",
        "warpgroup_fence(o[0]);\n      start",
        "no warpgroup_fence",
    ),
    bug("zeros are not fenced", TILE, "  fence_async();\n", "", "without fence_async"),
    bug(
        "values are used before all threads have cleared theirs",
        TILE,
        "  fence_async();\n  sync_consumers();",
        "  fence_async();",
        "FAILED",
    ),
    bug("NaN past a sequence reaches its sums", FORWARD, "if (rows < KEYS) clear_rows", "if (rows < 0) clear_rows", "o is wrong"),
    bug(
        "wrong part of a row in a descriptor",
        TILE,
        "b + d / PANEL * 8 * N * PANEL + d % PANEL",
        "b + d / PANEL * 8 * N * PANEL + d % PANEL / 2",
        "is wrong",
    ),
    bug(
        "wrong stride of panels in a descriptor",
        TILE,
        "matrix_descriptor(rows, ROWS * PANEL_ROW)",
        "matrix_descriptor(rows, PANEL_ROW)",
        "o is wrong",
    ),
    bug("wrong row of the mask", FORWARD, "warpgroup_row() + warp_row());", "warpgroup_row() + warp_row() + 1);", "lse is wrong"),
    bug(
        "a tile that some queries see in part is not masked",
        FORWARD,
        "first + KEYS <= queries.end_all",
        "first <= queries.end_all",
        "lse is wrong",
    ),
    bug("sums keep their old maximum", FORWARD, "      scale_rows(o, rescale);\n", "", "o is wrong"),
    bug("keys of the first packed sequence serve all", FORWARD, "at.hk, at.first_key + first,", "at.hk, first,", "is wrong"),
    bug("all groups have the first one's queries", FORWARD, "q_full, at.hk * at.G,", "q_full, 0,", "is wrong"),
    bug("the row after the last is stored", TILE, "first_query + tokens) * at.G; }", "first_query + tokens) * at.G + 1; }", "FAILED"),
    bug("rows that are in no box are multiplied", BACKWARD, "if (rows < OTHER) {", "if (rows < 0) {", "is wrong"),
    bug("NaN of another packed sequence's queries reaches dk", BACKWARD, "if (left < rows) {", "if (left < 0) {", "is wrong"),
    bug("NaN past a sequence reaches dq", BACKWARD, "if (queries.end - first < OTHER) clear_rows", "if (false) clear_rows", "dq is wrong"),
    bug(
        "NaN in a key reaches queries that do not see it",
        BACKWARD,
        "clear_nan<OTHER, HOPPER_CONSUMERS>(Tile<T, WIDTH>{k}, threadIdx.x - WARPGROUP);",
        "",
        "dq is wrong",
    ),
    bug("keys are cleared while others make scores", BACKWARD, "      sync_consumers();  // the scores are made\n", "", "FAILED"),
    bug(
        "a stage is released before its queries are multiplied",
        BACKWARD,
        "    warpgroup_wait<0>(dv[0], dk[0]);\n    release(shared.free[stage.index]);",
        "    release(shared.free[stage.index]);\n    warpgroup_wait<0>(dv[0], dk[0]);",
        CHANGED,
    ),
    bug(
        "rows of queries are overwritten while others read them",
        BACKWARD,
        "barrier_init(full[stage], producers);",
        "barrier_init(full[stage], producers / producers);",
        "FAILED",
    ),
    bug(
        "dk and dv change places",
        BACKWARD,
        "    start_sum(dv, p, dout);\n    start_sum(dk, ds, q);",
        "    start_sum(dv, p, q);\n    start_sum(dk, ds, dout);",
        "is wrong",
    ),
    bug("a gradient of scores has the row of another", BACKWARD, "lane % 4 * 2 + n % 2]", "lane % 4 * 2]", "is wrong"),
]
