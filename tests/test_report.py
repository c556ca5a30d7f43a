"""`fastprimer report`: its page, its plots, README's table, and files of results that it cannot use."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from bench_checks import results, row, wrong_row
from fastprimer import checkpoint, cli
from fastprimer.benchmark import tables
from fastprimer.benchmark.rows import Results, write_whole
from fastprimer.benchmark.timing import Timing
from fastprimer.peers import EAGER
from fastprimer.report import MARKERS, readme_table

ROOT = Path(__file__).resolve().parent.parent
REPORTED = results(
    *(row(2.0 + i, op=op, case="bench-case", flops=10**9 * (i % 2), matrix_gflop_per_s=100.0) for i, op in enumerate(EAGER)), wrong_row()
)


def report(tmp_path, *more, of: Results = REPORTED) -> int:
    of.write(tmp_path / "r.json")
    where = ["--results", tmp_path / "r.json", "--out", tmp_path / "page.html", "--folder", ROOT / "benchmarks/results"]
    return cli.main(["report", *map(str, [*where, *more])])


def test_the_page_has_every_operation_and_needs_nothing_else(tmp_path):
    assert report(tmp_path) == 0
    text = (tmp_path / "page.html").read_text()
    for op in EAGER:
        assert f'<h2 id="{op}">' in text and f'id="{op}-peers-figure_1"' in text
    assert 'name="viewport"' in text and "error is 9 of its budget" in text
    assert "Operation x backend" in text and "The compile gate" in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import|<script""", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_readme_is_rewritten_between_its_markers_and_plots_are_files(tmp_path, capsys):
    readme, short = tmp_path / "README.md", results(*REPORTED.rows[:1], wrong_row(case="bench-b"))
    readme.write_text("before\n\n<!-- results -->\nold\n<!-- /results -->\n\nafter\n")
    assert report(tmp_path, "--readme", readme, "--plots", tmp_path / "plots", of=short) == 0
    first = readme.read_text()
    assert report(tmp_path, "--readme", readme, of=short) == 0
    assert readme.read_text() == first
    assert first.startswith("before\n\n<!-- results -->\n") and first.endswith("\n<!-- /results -->\n\nafter\n") and "old" not in first
    assert f"<details><summary>All 2 rows</summary>\n\n{tables.markdown(short.rows)}\n\n</details>" in first
    assert all((tmp_path / f"plots/rms_norm-{what}").stat().st_size for what in ("roof.png", "roof.svg", "peers.png", "peers.svg"))
    readme.write_text("no markers")
    assert report(tmp_path, "--readme", readme, of=short) == 2
    assert "argument --readme: expected the line <!-- results -->" in capsys.readouterr().err


def test_at_a_glance_every_row_counts():
    """Geometric means over the rows of an operation, and the least; a wrong one has no time and is counted."""
    rows = [row(1.0, eager=1.0, vs_best_peer=1.0, of_roof=0.5), row(1.0, eager=4.0, vs_best_peer=1.5, of_roof=0.75, case="bench-b")]
    for r, eager in zip(rows, (1.0, 4.0), strict=True):
        r.ours, r.peers = Timing.of([1.0]), {"eager": Timing.of([eager])}
    told = tables.overview([("here", r) for r in [*rows, wrong_row(case="bench-c")]]).splitlines()
    assert told[0] == "| operation | dtype | backend | best peer | least | eager | of roof | rows | wrong |"
    assert told[2:] == ["| `rms_norm` | float32 | cpu | 1.22x | 1.00x | 2.00x | 62% | 3 | 1 |"]
    assert tables.overview([("here", rows[0]), ("there", rows[1])]).splitlines()[2].endswith(" | 1.00x | 50% | 1 | here |")


def glance(folder: Path, *runs: Results) -> str:
    paths = [folder / f"{i}.json" for i in range(len(runs))]
    for path, run in zip(paths, runs, strict=True):
        run.write(path)
    where = ["--out", folder / "page.html", "--folder", folder]
    assert cli.main(["report", *map(str, ["--results", *paths, *where])]) == 0
    text = (folder / "page.html").read_text()
    assert "counts once, as the newest of them has it" in text
    return re.sub(r"<[^>]+>\s*", "|", re.search(r"At a glance</h2>.*?</table>", text, re.S)[0])


def test_at_a_glance_a_row_of_several_runs_counts_once(tmp_path):
    """As the newest has it, wherever it is given; of another machine it is another row."""

    def run(ratio: float, date: str, *more, **machine) -> Results:
        return results(row(1.0, vs_best_peer=ratio, of_roof=0.5), *more, date=date, **machine)

    other = row(1.0, case="bench-b", vs_best_peer=3.0, of_roof=0.5)
    told = glance(tmp_path, run(3.0, "2026-01-02T00:00:00"), run(9.0, "2026-01-01T00:00:00", other))
    assert re.search(r"\|3\.00x\|+3\.00x\|", told) and re.search(r"\|50%\|+2\|", told)
    assert re.search(r"\|9\.00x\|+9\.00x\|", glance(tmp_path, run(3.0, "2026-01-01T00:00:00"), run(9.0, "2026-01-01T00:00:00")))
    told = glance(tmp_path, run(3.0, "2026-01-02T00:00:00"), run(9.0, "2026-01-01T00:00:00", device="another"))
    assert "|3.00x|" in told and "|9.00x|" in told


def test_a_row_without_the_host_s_time_has_an_empty_cell(tmp_path, capsys):
    timed, other = row(2.0, host_us={"ours": 7.0}), row(2.0, case="bench-b")
    results(timed, other).write(tmp_path / "r.json")
    assert cli.main(["bench", "--results", str(tmp_path / "r.json"), "--markdown"]) == 0
    first, second = capsys.readouterr().out.splitlines()[2:]
    assert " GB/s | 7 | " in first and " GB/s |  | " in second
    assert report(tmp_path, of=results(timed, other)) == 0


BEGIN, END = MARKERS


@pytest.mark.parametrize(
    "text",
    (
        f"how to: put {BEGIN}\nhere\n{BEGIN}\nold\n{END}\n",
        f"{BEGIN}\nold\n{END}\nprose\n{END}\n",
        f"{END}\n{BEGIN}\n",
        f"{BEGIN}\n{END}\n" * 2,
    ),
)
def test_a_readme_with_markers_too_many_is_left_alone(tmp_path, capsys, text):
    (tmp_path / "README.md").write_text(text)
    assert report(tmp_path, "--readme", tmp_path / "README.md") == 2
    assert "once in" in capsys.readouterr().err and (tmp_path / "README.md").read_text() == text


def test_a_readme_keeps_its_ends_of_lines_its_permissions_and_its_table_where_there_is_no_other(tmp_path, monkeypatch, capsys):
    readme, link = tmp_path / "README.md", tmp_path / "link.md"
    readme.write_bytes(f"b\u00e9fore\r\n{BEGIN}\r\nold\r\n{END}\r\nafter\r\n".encode())
    readme.chmod(0o640)
    link.symlink_to(readme)
    before = readme.read_bytes()
    assert report(tmp_path, "--readme", link, of=results()) == 2
    assert "argument --readme: expected results of single cases" in capsys.readouterr().err and readme.read_bytes() == before
    replace = os.replace

    def full(source, target):
        if Path(target) == readme:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", full)
        assert report(tmp_path, "--readme", link) == 2
        assert "No space left" in capsys.readouterr().err
    assert readme.read_bytes() == before
    assert report(tmp_path, "--readme", link) == 0
    after = readme.read_bytes()
    assert link.is_symlink() and readme.stat().st_mode & 0o777 == 0o640
    assert after.count(b"\n") == after.count(b"\r\n") > 5 and after.startswith(f"b\u00e9fore\r\n{BEGIN}\r\na processor".encode())


def spoiled(name: str, value) -> dict:
    """Results as a file holds them, with one field of the first row, or of its timing, changed."""
    record = json.loads(results(row(2.0)).to_json())
    where = record["machine"] if name in record["machine"] else record["rows"][0]
    (where["ours"] if name in where.get("ours", ()) else where)[name] = value
    return record


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", None), ("date", 5), ("ours", None), ("of_roof", None), ("vs_best_peer", -1.0), ("roof_samples", []),
        ("roof_samples", [0.0]), ("size", "1"), ("wrong", "oops"),
        ("samples", []), ("median", "x"), ("median", 0), ("high", float("nan")), ("dtype", "float64"), ("measured", "both"), ("case", 5),
        ("bytes", 0), ("left_out", []), ("host_us", {"eager": 1.0}),
        ("host_us", {"ours": None}), ("host_us", None), ("host_us", 0), ("host_us", []), ("peak_mb", {"ours": "x"}), ("best_peer", 5),
    ],
)  # fmt: skip
def test_a_file_that_no_table_can_show_is_refused(tmp_path, capsys, field, value):
    (tmp_path / "r.json").write_text(json.dumps(spoiled(field, value)))
    (tmp_path / "good.json").write_text(results(row(2.0)).to_json())
    for line in (
        ["bench", "--results", "r.json"],
        ["bench", "--results", "good.json", "--compare", "r.json"],
        ["report", "--results", "r.json", "--out", "x.html"],
    ):
        assert cli.main([str(tmp_path / word) if "." in word else word for word in line]) == 2
        assert "r.json: expected results of schema 2, got a broken record" in capsys.readouterr().err


def test_a_peer_of_another_revision_has_a_colour_and_a_series_stays_in_its_folder(tmp_path):
    new = row(2.0)
    new.peers["numba"] = new.peers["eager"]
    size = dataclasses.replace(new, case="x S 8", series="../../x", letter="S", size=8)
    assert report(tmp_path / "a/b", "--plots", tmp_path / "a/b/plots", of=results(new, size)) == 0
    assert "numba" in (tmp_path / "a/b/page.html").read_text() and sorted(p.name for p in tmp_path.rglob("growth*.png"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_readme_leaves_out_the_backward_pass_where_both_passes_are_there():
    row = REPORTED.rows[0]
    passes = [dataclasses.replace(row, measured=measured) for measured in ("forward", "backward", "forward+backward")]
    alone = dataclasses.replace(row, case="bench-alone", measured="backward")
    assert tables.markdown([passes[0], passes[2], alone]) in readme_table([results(*passes, alone)])


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    assert cli.main(["report", "--folder", str(tmp_path)]) == 2
    assert "argument --results: expected results in" in capsys.readouterr().err


def test_a_device_and_a_pipe_are_written_to():
    write_whole(Path(os.devnull), "text")
    assert Path(os.devnull).is_char_device()
    end, begin = os.pipe()
    write_whole(Path(f"/dev/fd/{begin}"), "text")
    assert os.read(end, 9) == b"text"
    os.close(begin), os.close(end)
