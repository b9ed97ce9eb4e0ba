"""Benchmarks kept as cells: none is run twice, a cut-off store goes on, and what is missing is said."""

import json
import math
import os
import statistics
import sys
from pathlib import Path

import pytest

from multitune.prompting.instructions import cluster_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CELLS = [{"n": n, "settings": {"r": n}} for n in range(3)]


@pytest.fixture
def cells(script):
    return script("_cells")


@pytest.fixture
def go(cells, tmp_path, capfd):
    """Run the benchmark with some options; gives what it printed and the cells that were worked on."""

    def run(*options):
        worked = tmp_path / "worked.txt"
        worked.write_text("")

        def work(cell):  # in a process of its own
            with worked.open("a") as out:
                out.write(f"{cell['n']} ")
            return {"scores": cell["n"] ** 2}

        args = cells.parser("about").parse_args(["--store", str(tmp_path / "store"), *options])

        def render(done, missing):
            return "\n".join([str([row["scores"] for row in done]), *cells.about(done, missing, "python this.py")])

        cells.go("bench", args, CELLS, work, lambda row: f"scored {row['scores']}", render)
        return capfd.readouterr().out, [int(n) for n in worked.read_text().split()]

    return run


def test_a_finished_cell_is_not_run_again(go, tmp_path):
    first, worked = go()
    assert worked == [0, 1, 2] and "[0, 1, 4]" in first and "missing" not in first
    assert go()[1] == []
    store = tmp_path / "store" / "bench-1of1.jsonl"
    lines = store.read_text().splitlines()
    store.write_text("\n".join([lines[0], lines[2][:40]]))  # as a kill leaves it
    again, worked = go()
    assert worked == [1, 2] and "[0, 1, 4]" in again
    assert sum(bool(line) and json.loads(line)["cell"]["n"] == 2 for line in store.read_text().splitlines()[2:]) == 1


def test_shards_share_the_cells_and_a_table_counts_what_is_missing(go, tmp_path):
    _, worked = go("--shard", "1/2")
    assert worked == [0, 2]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    shown, worked = go("--table", "--write", str(page))
    assert worked == [] and "1 runs of 3 are still missing" in shown
    assert "[0, 4]" in page.read_text() and "old" not in page.read_text() and page.read_text().endswith("after\n")
    assert go("--shard", "2/2")[1] == [1]


def test_two_shares_may_differ_by_the_widest_interval_of_a_difference(cells):
    for rows in (20, 40, 100):
        right = [1] * (rows // 2) + [0] * (rows // 2)
        spread = 2 * statistics.pvariance(right) / rows
        assert cells.by_chance(rows) == round(100 * statistics.NormalDist(0, math.sqrt(spread)).inv_cdf(0.975))


def test_a_document_without_markers_is_refused_before_the_work(go, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(SystemExit, match="it needs the lines"):
        go("--write", str(page))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["table_to_text", "instruction_mixture", "dcot"])
def test_every_script_names_its_cells_and_its_place_in_the_page(name, script, monkeypatch):
    made, found = script(name), {}
    monkeypatch.setattr(made, "go", lambda name, args, cells, *more: found.update(name=name, cells=cells))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    made.main()
    assert found["name"] == name and len({json.dumps(cell, sort_keys=True) for cell in found["cells"]}) >= 2
    page = (BENCHMARKS.parent / "docs" / "instructions.md").read_text("utf-8")
    assert page.count(f"<!-- {name}:begin -->") == page.count(f"<!-- {name}:end -->") == 1


@pytest.mark.data
def test_the_mixture_holds_out_whole_clusters(script):
    if not os.environ.get("MULTITUNE_DATA"):
        pytest.skip("needs the public data sets: set MULTITUNE_DATA to their folder")
    made = script("instruction_mixture")
    learnt, held = ({cluster_of(name) for name in names} for names in (made.LEARNT, made.HELD_OUT))
    assert len(set(made.LEARNT)) == len(made.LEARNT) >= 20 and len(set(made.HELD_OUT)) >= 5
    assert not learnt & held


def test_the_page_uses_names_that_exist():
    import re
    import textwrap

    import multitune

    page = (BENCHMARKS.parent / "docs" / "instructions.md").read_text("utf-8")
    blocks = [textwrap.dedent(b) for b in re.findall(r"^ *```python\n(.*?)^ *```", page, flags=re.DOTALL | re.M)]
    assert len(blocks) >= 3
    for block in blocks:
        compile(block, "page", "exec")
        for line in (line for line in block.splitlines() if line.startswith("from ")):
            exec(line, {})
        for name in re.findall(r"\bmt\.(\w+)", block):
            assert hasattr(multitune, name), name


def test_a_timing_says_null_for_what_was_not_measured(script):
    result = script("_harness").Result
    added = result(case="f", system="bank", ratio_to_first=1.2, limit=1.5).to_dict()
    assert added == {
        "case": "f", "system": "bank", "median_ms": None, "ratio_to_backbone": None, "ratio_to_first": 1.2,
        "limit": 1.5, "verdict": "ok",
    }  # fmt: skip
    timed = result(case="a", system="bank", median_ms=3.0, ratio_to_backbone=1.0).to_dict()
    assert timed == {"case": "a", "system": "bank", "median_ms": 3.0, "ratio_to_backbone": 1.0}
