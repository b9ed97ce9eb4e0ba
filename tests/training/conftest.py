"""Shared by the tests of training: tiny tables of every kind of task, and runs small enough to repeat."""

import os
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from multitune import Backbone, train
from multitune.tasks import TaskData

_WORDS = ["good", "bad", "film", "the", "not", "very", "a", "b", "cat", "dog", "x1"]


def _rows(kind: str, count: int, seed: int) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)

    def number(high: int) -> int:
        return int(torch.randint(high, (), generator=draw))

    def words() -> list[str]:
        return [_WORDS[number(len(_WORDS))] for _ in range(2 + number(6))]

    def text() -> str:
        return " ".join(words())

    rows = []
    for _ in range(count):
        if kind == "classification":
            rows.append({"text": text(), "y": ["bad", "good", "mixed"][number(3)]})
        elif kind == "regression":
            rows.append({"a": text(), "b": text(), "y": number(50) / 10})
        elif kind == "multilabel":
            rows.append({"text": text(), "y": [name for name in ("art", "law", "war") if number(2)]})
        elif kind == "multiple_choice":
            rows.append({"text": text(), "one": text(), "two": text(), "three": text(), "y": number(3)})
        else:
            found = words()
            rows.append({"words": found, "y": [["O", "B-PER"][number(2)] for _ in found]})
    return rows


@pytest.fixture
def one_thread():
    """Bit-equal runs on a shared machine; put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(make_backbone, one_thread) -> Backbone:
    """A tiny BERT of this test's own, with dropout, as pretrained models have it."""
    return make_backbone("bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@pytest.fixture(scope="session")
def make_data(tasks):
    """`make_data(kind, train=20, validation=8)`: a task with random rows."""

    def make(kind: str = "classification", train: int = 20, validation: int = 8) -> TaskData:
        return TaskData(
            task=tasks[kind], train=_rows(kind, train, seed=1), validation=_rows(kind, validation, seed=2), test=None
        )

    return make


@pytest.fixture
def quick():
    """`quick(backbone, data, method, output_dir, **settings)`: `train`, small and silent."""

    def run(backbone, data, method="lora", output_dir=None, **settings):
        return train(
            backbone, data, method, output_dir, **({"progress": False, "batch_size": 8, "max_steps": 2} | settings)
        )

    return run


class Stop(Exception):
    """Raised in the middle of a run."""


class Stopping:
    """`stopping(method_class, after)`: the same method, name and all, whose forward pass fails after some calls."""

    error = Stop

    def __call__(self, method_class, after):
        calls = 0

        @dataclass(frozen=True, kw_only=True)
        class Stopping(method_class):
            def deltas(self, params, backbone):
                nonlocal calls
                calls += 1
                if calls > after:
                    raise Stop
                return super().deltas(params, backbone)

        return Stopping


@pytest.fixture
def stopping():
    """Methods that fail in the middle of a run, with `stopping.error`."""
    return Stopping()


@pytest.fixture(scope="session")
def same_tensors():
    """Assert that two adapters hold the same tensors, bit for bit."""

    def check(a, b) -> None:
        for mine, theirs in ((a.params, b.params), (a.head_params, b.head_params)):
            assert set(mine) == set(theirs)
            for name, t in mine.items():
                assert torch.equal(t, theirs[name]), name

    return check
