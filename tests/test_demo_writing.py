"""The demo of writing, on a tiny model; and its rows are what its script makes."""

import subprocess
import sys
from pathlib import Path

import pytest

from multitune.demo_writing import BARE_PROMPT, TRAINING, Author, run_writing_demo

pytest.importorskip("sacrebleu", reason="pip install 'multitune[generation]'")

ROOT = Path(__file__).parents[1]


def test_every_row_of_the_batch_is_what_its_adapter_writes_alone(make_backbone, tmp_path, monkeypatch):
    # its tokenizer knows few words, so that texts are long
    monkeypatch.setattr("multitune.demo_writing.TRAINING", {**TRAINING, "max_length": 260})
    backbone = make_backbone("gpt2", n_positions=320)
    authors = (Author(method="lora"), Author(method="prefix", settings={"length": 2, "reparametrise": False}))
    lines = []
    done = run_writing_demo(tmp_path, quick=True, threads=1, backbone=backbone, authors=authors, report=lines.append)
    assert done.agrees and [r.adapter for r in done.rows] == ["lora", "lora", "prefix", "prefix", None]
    assert all(a.evaluation.scores.keys() == {"bleu", "chrf"} for a in done.adapters)
    assert (tmp_path / "lora-written" / "predictions.html").exists() and (tmp_path / "prefix" / "adapter.json").exists()
    assert any(line.startswith("prefix: step 2 of 2") for line in lines)
    assert "{facts}" in BARE_PROMPT


def test_the_shipped_rows_are_what_the_script_writes():
    subprocess.run([sys.executable, ROOT / "scripts" / "trails.py", "--check"], check=True)
