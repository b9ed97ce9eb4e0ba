"""Shared by the tests of comparisons: a tiny backbone in a folder, a small table, recipes that take a second."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import random

import pytest
import torch

from multitune.comparing.recipe import Recipe

MOODS = {"good": ("good", "very", "film"), "bad": ("bad", "not", "the")}


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equal runs, in this process and in others; put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folder(make_backbone, tmp_path_factory):
    """A tiny BERT with dropout as `Backbone.load` reads it."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny"
    backbone = make_backbone("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moods(tmp_path_factory):
    """A table of 48 rows with two labels that words tell apart, most of the time."""
    draw = random.Random(0)
    lines = ["text,mood"]
    for _ in range(48):
        mood = draw.choice(list(MOODS))
        words = draw.choices([*MOODS[mood], *(w for words in MOODS.values() for w in words)], k=draw.randint(3, 7))
        lines.append(f"{' '.join(words)},{mood}")
    file = tmp_path_factory.mktemp("tables") / "moods.csv"
    file.write_text("\n".join(lines), "utf-8")
    return file


@pytest.fixture(scope="session")
def causes(tmp_path_factory):
    """A table of 20 rows of a text, two choices, and which is right."""
    rows = [{"premise": f"the film {i}", "first": "good", "second": "very bad", "answer": i % 2} for i in range(20)]
    file = tmp_path_factory.mktemp("tables") / "causes.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return file


@pytest.fixture
def values(tiny_folder, moods):
    """`values(**changes)`: the values of a recipe of a few seconds, with some keys changed."""

    def make(**changes):
        recipe = {
            "name": "moods",
            "backbone": str(tiny_folder),
            "tasks": [{"data": str(moods), "label": "mood"}],
            "methods": {"lora": {"r": [2, 4]}, "bitfit": {}},
            "seeds": 2,
            "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.01},
        }
        return {key: value for key, value in {**recipe, **changes}.items() if value is not None}

    return make


@pytest.fixture
def recipe(values):
    """`recipe(**changes)`: that recipe."""
    return lambda **changes: Recipe.from_dict(values(**changes))


@pytest.fixture(scope="session")
def contents():
    """What of records must be the same however they were run: all but times, memory and date."""

    def of(records):
        found = {}
        for record in records:
            outcome = record.to_dict()["outcome"]
            for name in ("seconds", "processor_seconds", "peak_memory", "together", "environment"):
                del outcome[name]
            found[record.trial.key, record.purpose, record.budget] = outcome
        return found

    return of
