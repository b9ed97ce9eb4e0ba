"""Benchmarks that are no package: what they read, what they measure, and where in the pages their tables go."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

import multitune as mt
from multitune.tasks import TaskData

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("sift", "results.md"),
        ("generate", "results.md"),
        ("bug_detection", "lsg.md"),
        ("continual_intents", "continual.md"),
        ("lsg", "lsg.md"),
    ],
)
def test_every_table_has_its_place_in_a_page(script, name, page):
    made = script(name)
    place = getattr(made, "NAME", None) or made.DOCUMENT_PART
    script("_store").check_markers(BENCHMARKS.parent / "docs" / page, place)


def words(rows):
    """A task whose rows are these texts."""
    task = mt.Task(name="words", kind="classification", template=("{text}",), label="y", labels=("a", "b"))
    table = [{"text": text, "y": "ab"[i % 2]} for i, text in enumerate(rows)]
    return TaskData(task=task, train=table, validation=table, test=None)


def test_long_rows_are_the_texts_of_a_task_one_after_another(script, bert, monkeypatch):
    monkeypatch.setattr(mt, "load_task", lambda name: words(["good film", "the bad film not", "very good"]))
    lsg, tokenizer = script("lsg"), bert.tokenizer
    found = lsg.tokens_of(bert, 6, argparse.Namespace(task="words", rows=2))
    assert found.dtype == torch.int64
    assert [tokenizer.decode(row) for row in found] == [
        "[CLS] good film the bad [SEP]",
        "[CLS] film not very good [SEP]",
    ]
    with pytest.raises(SystemExit, match="words has 8 tokens to learn from, and 9 are needed"):
        lsg.tokens_of(bert, 11, argparse.Namespace(task="words", rows=1))


def test_a_table_without_runs_says_so(script, monkeypatch, tmp_path, capsys):
    bugs = script("bug_detection")
    page = tmp_path / "page.md"
    page.write_text("<!-- bug_detection:begin -->\nold\n<!-- bug_detection:end -->\n")
    monkeypatch.setattr(sys, "argv", ["x.py", "--table", "--store", str(tmp_path), "--write", str(page)])
    bugs.main()
    assert capsys.readouterr().out == "Not run yet.\n" and "Not run yet." in page.read_text()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says what a process has held")
def test_growth_counts_what_is_trained_with_its_optimiser(script, make_backbone, monkeypatch):
    """Full fine-tuning of a wide model holds a copy of its weights, gradients and two moments; SIFT next to nothing."""
    wide = make_backbone("bert", hidden_size=512, intermediate_size=4096)
    rows = [f"good film {i}" for i in range(4)]
    monkeypatch.setattr(mt, "load_task", lambda name: words(rows))
    monkeypatch.setattr(mt.Backbone, "load", lambda name, **settings: wide)
    sift, cells = script("sift"), script("_cells")
    monkeypatch.setattr(sift, "draw", lambda table, count: table)
    args = cells.parser("").parse_args(["--quick"])
    vars(args).update(methods=["sift", "full"], steps=2, batch=2, device="cpu")
    weights = 4 * wide.num_parameters
    heap = [torch.ones(1000) for _ in range(60_000)]
    last = heap.pop()
    del heap  # 240 MB are free below what is `last`: a run forked from here could grow without the process growing
    found = {}
    for cell in sift.cells_of(args):
        found[cell["method"]] = cells._alone(sift.run, cell | {"training": {**cell["training"], "max_length": 16}}, 1)
    assert last.numel() == 1000 and found["full"]["growth"] > 3 * weights
    assert found["sift"]["growth"] < weights
    text = sift.render(args, [dict(row, cell=c, environment=cells.environment(1)) for c, row in zip(
        sift.cells_of(args), found.values(), strict=True
    )], 0)  # fmt: skip
    assert "| SIFT |" in text and "| 100 % |" in text
