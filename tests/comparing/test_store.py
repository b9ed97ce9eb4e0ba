"""The store: nothing is lost, nothing is kept twice, several processes may write."""

import dataclasses
import multiprocessing
import sqlite3
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from multitune import DataError
from multitune.comparing import Outcome, Record, Store, Trial
from multitune.comparing.records import digest
from multitune.training import TrainConfig


def record(seed=0, *, task="demo/topic", method="lora", purpose="final", budget=None, **outcome):
    trial = Trial(
        task=task,
        data={"task": task, "fingerprint": "f"},
        backbone="minilm",
        backbone_fingerprint="b",
        method=method,
        settings={"r": 4, "targets": ["query", "value"]},
        training={"learning_rate": 1e-3, "seed": seed},
    )
    values = {"status": "finished", "metric": "accuracy", "score": 0.1 + seed / 7, "row_scores": (1.0, 0.0)} | outcome
    return Record(trial=trial, outcome=Outcome(**values), purpose=purpose, budget=budget)


def test_what_was_added_comes_back_as_it_was(tmp_path):
    kept = [
        record(0, history=({"step": 1, "loss": 0.5}, {"step": 2, "eval_accuracy": 0.25}), scores={"accuracy": 1 / 3}),
        record(1, status="failed", score=None, row_scores=None, error="the loss of step 3 is nan"),
        record(2, environment={"versions": {"torch": "2.13"}, "threads": 1}),
    ]
    for one in kept:
        Store(tmp_path / "store.sqlite").add(one)
    assert Store(tmp_path / "store.sqlite").records() == kept


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.integers(0, 2**32 - 1))
def test_any_score_and_text_survive(tmp_path_factory, score, text, seed):
    store = Store(tmp_path_factory.mktemp("store") / "store.sqlite")
    one = record(seed, score=score, error=text)
    store.add(one)
    assert store.records() == [one]
    assert store.has(one.trial.key) and store.outcome(one.trial.key) == one.outcome


def test_a_trial_keeps_its_first_outcome_and_gathers_its_uses(tmp_path):
    store = Store(tmp_path / "store.sqlite")
    first = record(purpose="search", score=0.5)
    store.add(first)
    store.add(record(purpose="final", budget="1%", score=0.75))
    store.add(record(purpose="final", budget="1%"))
    store.add(record(purpose="final"))
    found = store.records()
    assert [(r.purpose, r.budget) for r in found] == [("search", None), ("final", "1%"), ("final", None)]
    assert {r.outcome.score for r in found} == {0.5}


def test_records_are_picked_by_purpose_and_task(tmp_path):
    store = Store(tmp_path / "store.sqlite")
    for one in (record(0, task="a"), record(1, task="b"), record(2, task="a", purpose="search")):
        store.add(one)
    assert [r.trial.seed for r in store.records(purpose="final")] == [0, 1]
    assert [r.trial.seed for r in store.records(tasks=["a"])] == [0, 2]
    assert [r.trial.seed for r in store.records(purpose="search", tasks=["b"])] == []


def test_an_unknown_key_is_not_there(tmp_path):
    store = Store(tmp_path / "store.sqlite")
    assert not store.has("0" * 20)
    assert store.outcome("0" * 20) is None


def _write(path, first):
    store = Store(path)
    for seed in range(first, first + 12):
        store.add(record(seed))


def test_several_processes_write_at_a_time(tmp_path):
    path = tmp_path / "store.sqlite"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, first)) for first in (0, 6, 12)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0, 0, 0]
    assert sorted(r.trial.seed for r in Store(path).records()) == list(range(24))


def test_a_store_that_another_process_is_making_is_waited_for(tmp_path):
    path = tmp_path / "store.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # as it is while the tables are made
    release = threading.Timer(0.3, other.rollback)
    release.start()
    store = Store(path)
    release.join()
    other.close()
    store.add(record())
    assert store.records() == [record()]


def test_a_file_that_is_no_store_is_refused(tmp_path):
    file = tmp_path / "store.sqlite"
    file.write_text("these are notes, and no database at all, however long they go on\n" * 20)
    with pytest.raises(DataError, match="cannot be read as a store"):
        Store(file)


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "store.sqlite"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE albums (title TEXT)")
    connection.close()
    with pytest.raises(DataError, match="SQLite file of something else"):
        Store(file)
    with sqlite3.connect(file) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("albums",)]
    connection.close()


def test_a_store_whose_folder_went_away_says_so_and_goes_on_when_it_is_back(tmp_path):
    store = Store(tmp_path / "here" / "store.sqlite")
    store.add(record(seed=0))
    (tmp_path / "here").rename(tmp_path / "elsewhere")
    for use in (lambda: store.add(record(seed=1)), lambda: store.has("key"), store.records):
        with pytest.raises(DataError, match="folder was moved or removed meanwhile; .* the same command goes on"):
            use()
    (tmp_path / "elsewhere").rename(tmp_path / "here")
    store.add(record(seed=1))
    assert [r.trial.seed for r in store.records()] == [0, 1]


def test_a_store_of_a_later_version_is_refused(tmp_path):
    file = tmp_path / "store.sqlite"
    Store(file)
    with sqlite3.connect(file) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(DataError, match="update multitune"):
        Store(file)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Trial)])
def test_every_field_of_a_trial_makes_another_one(tmp_path, field):
    one = record()
    value = {**getattr(one.trial, field), "more": 1} if field in ("data", "settings", "training") else "other"
    other = dataclasses.replace(one, trial=dataclasses.replace(one.trial, **{field: value}))
    store = Store(tmp_path / "store.sqlite")
    store.add(one)
    assert not store.has(other.trial.key)


def test_a_later_version_knows_the_trials_of_a_store_again():
    """A key that changes runs every stored trial again: a new setting of training is one of `LATER`."""
    assert digest({"settings": sorted(TrainConfig().identity())}) == "a080611312ce2bf5de52"
    trial = Trial(
        task="t",
        data={"task": "t", "train_rows": None},
        backbone="b",
        backbone_fingerprint="f",
        method="lora",
        settings={"r": 8, "targets": ["query"]},
        training={"seed": 0, "learning_rate": 1e-3},
    )
    assert (trial.key, trial.group) == ("bddcbbc180677b398a1c", "1894be0fecbc7cc95c36")
