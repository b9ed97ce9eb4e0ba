"""The benchmark of few rows and a language model: a cell runs once, a cut-off store goes on, tables are written."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import LlamaForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif("MULTITUNE_DATA" not in os.environ, reason="MULTITUNE_DATA names no folder of public datasets"),
]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("few_shot_language", BENCHMARKS / "few_shot_language.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "few_shot_language", module)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()


@pytest.fixture
def options(tmp_path, make_model, make_backbone):
    """A tiny language model with room for whole rows, few rows, and a document to write to."""
    base = make_model("llama", tie_word_embeddings=True, max_position_embeddings=4000)
    whole = LlamaForCausalLM(base.config)
    whole.model.load_state_dict(base.state_dict())
    whole.save_pretrained(tmp_path / "llama")
    make_backbone("llama").tokenizer.save_pretrained(tmp_path / "llama")
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- few_shot_language:begin -->\nold\n<!-- few_shot_language:end -->\nBehind.\n")
    few = ["--num-train", "6", "--steps", "1", "--limit-rows", "3", "--store", str(tmp_path), "--write", str(page)]
    return [*few, "--backbone", str(tmp_path / "llama"), "--tasks", "super_glue/copa", "super_glue/cb"]


def test_cells_run_once_and_a_cut_off_line_is_run_again(script, options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["few_shot_language.py", *options, "--systems", "zero", "few", "tfew", "head"])
    script.main()
    store, page = tmp_path / "few_shot_language.jsonl", tmp_path / "page.md"
    rows = [json.loads(line) for line in store.read_text("utf-8").splitlines()]
    assert len(rows) == 8 and all(0 <= row["scores"]["accuracy"] <= 1 for row in rows)
    assert [row["parameters"] > 0 for row in rows] == [False, False, True, True] * 2
    shown = page.read_text("utf-8")
    assert shown.startswith("Before.") and shown.endswith("Behind.\n") and "old" not in shown
    assert "| T-Few: (IA)³, three losses |" in shown and "COPA (3 rows) | CB (3 rows)" in shown
    capsys.readouterr()
    script.main()
    assert "[1/" not in capsys.readouterr().out and len(store.read_text("utf-8").splitlines()) == 8
    store.write_text(store.read_text("utf-8")[:-40], "utf-8")  # killed while it wrote the last line
    script.main()
    assert "[1/1] head      super_glue/cb" in capsys.readouterr().out
    again = json.loads(store.read_text("utf-8").splitlines()[-1])
    assert again["cell"] == rows[-1]["cell"] and again["scores"] == rows[-1]["scores"]


def test_no_row_that_is_judged_is_trained_on(script):
    for task in script.TASKS:
        data = script.load(task, 32, 100, seed=0)
        judged = {json.dumps(row, sort_keys=True) for row in data.validation}
        assert len(data.train) == 32 and not judged & {json.dumps(row, sort_keys=True) for row in data.train}
        other = script.load(task, 32, 100, seed=1)
        assert list(other.validation) == list(data.validation) and list(other.train) != list(data.train)


def test_copa_reads_as_text_that_goes_on(script):
    row = {
        "premise": "My body cast a shadow.",
        "question": "cause",
        "choice1": "The sun rose.",
        "choice2": "It rained.",
    }
    found = script.begun(row)
    assert found == {"begun": "My body cast a shadow because", "choice1": "the sun rose.", "choice2": "it rained."}
