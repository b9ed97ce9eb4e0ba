"""The suites that ship: enough methods and seeds, known tasks and settings, and rows that can be drawn as they say."""

import os
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import yaml

from multitune import ConfigError, TrainConfig, load_task, make_method
from multitune.comparing.rows import draw
from multitune.comparing.sources import recipe_of, suites
from multitune.tasks import list_tasks
from multitune.tasks.specs import find_spec

FOLDER = Path(str(resources.files("multitune.comparing"))) / "suites"
TRAINED = ("few-shot", "glue", "intents", "raft", "superglue", "table-to-text")
GLUE = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"}
SUPER_GLUE = {"boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"}


def suite(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))


def tasks(name: str) -> list[dict]:
    return [{"task": entry} if isinstance(entry, str) else entry for entry in suite(name)["tasks"]]


@pytest.fixture
def data():
    if not os.environ.get("MULTITUNE_DATA"):
        pytest.skip("needs the public data sets: set MULTITUNE_DATA to their folder")


def test_the_suites_are_those_that_are_named_here():
    assert sorted(file.stem for file in FOLDER.iterdir()) == sorted([*TRAINED, "overhead"])
    assert all(suite(file.stem)["name"] == file.stem for file in FOLDER.iterdir())
    assert sorted(suites()) == sorted(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_a_suite_says_its_subset_and_has_methods_and_seeds_enough(name):
    head = re.match(r"(#.*\n)+", (FOLDER / f"{name}.yaml").read_text("utf-8"))[0]
    assert "Subset" in head or "fifty" in head
    assert f"`multitune compare {name} --dry-run`" in head.replace("\n# ", " ")
    values = suite(name)
    assert len(values["methods"]) >= 10 and values["seeds"] >= 3
    assert len(values["methods"]) == len({make_method(m, settings).title for m, settings in values["methods"].items()})
    for entry in [values, *tasks(name)]:
        assert TrainConfig.from_dict(entry.get("training", {}))


def test_the_benchmarks_are_complete():
    assert {entry["task"] for entry in tasks("glue")} == {f"glue/{task}" for task in GLUE}
    assert {entry["task"] for entry in tasks("superglue")} == {f"super_glue/{task}" for task in SUPER_GLUE}


@pytest.mark.parametrize("name", TRAINED)
def test_a_suite_is_read_from_the_hub_or_says_that_it_needs_the_folder(name):
    specs = [find_spec(entry["task"]) for entry in tasks(name)]
    needs_folder = "MULTITUNE_DATA" in (FOLDER / f"{name}.yaml").read_text("utf-8")
    assert needs_folder == any(spec is None or not spec.hub for spec in specs)
    assert needs_folder == (name not in ("glue", "superglue"))


def test_the_overhead_suite_is_a_grid_and_no_comparison():
    grid = suite("overhead")
    assert grid["rows"] == [1, 16, 64] and grid["lengths"] == [16, 64, 128, 384]
    with pytest.raises(ConfigError, match=r"times serving and trains nothing: run `python benchmarks/overhead.py`"):
        recipe_of("overhead")


@pytest.mark.parametrize("name", TRAINED)
def test_the_recipe_reader_takes_every_suite(name):
    read = recipe_of(name)
    assert [entry.task for entry in read.tasks] == [entry["task"] for entry in tasks(name)]
    assert [method.name for method in read.methods] == list(suite(name)["methods"])


@pytest.mark.data
@pytest.mark.parametrize("name", TRAINED)
def test_every_task_loads_and_its_rows_are_drawn(name, data):
    few = suite(name).get("few_shot")
    for entry in tasks(name):
        whole = load_task(entry["task"])
        asked = {key: entry[key] for key in ("train_rows", "validation_rows") if key in entry}
        for per_class in few["per_class"] if few else [None]:
            drawn = draw(whole, **asked, per_class=per_class)
            shown = drawn.task.examples(drawn.train)
            if per_class is not None:
                counts = Counter(example.target for example in shown)
                assert counts == dict.fromkeys(range(len(whole.task.labels)), per_class)
                continue
            assert len(shown) == min(asked.get("train_rows", len(whole.train)), len(whole.train))
            if whole.task.kind == "classification":  # whatever can be learnt can be judged
                judged = {example.target for example in drawn.task.examples(drawn.validation)}
                assert len(judged) > 1 and judged <= {example.target for example in shown}


@pytest.mark.data
def test_every_intent_domain_and_raft_task_is_there(data):
    names = set(list_tasks())
    domains = [entry["task"] for entry in tasks("intents") if "clinc_" in entry["task"]]
    assert len(domains) == 10 and set(domains) == {name for name in names if name.startswith("intent/clinc_")}
    assert all(len(load_task(name).task.labels) == 15 for name in domains)
    left_out = {"raft/banking_77", "raft/systematic_review_inclusion"}
    assert {entry["task"] for entry in tasks("raft")} == {n for n in names if n.startswith("raft/")} - left_out


@pytest.mark.data
@pytest.mark.parametrize(("name", "task"), [("superglue", "super_glue/multirc"), ("table-to-text", "nlg/e2e_nlg")])
def test_what_is_judged_together_is_drawn_whole(name, task, data):
    whole = load_task(task)
    (entry,) = (entry for entry in tasks(name) if entry["task"] == task)
    drawn = draw(whole, validation_rows=entry["validation_rows"])
    counts = Counter(example.group for example in whole.task.examples(whole.validation))
    found = Counter(example.group for example in whole.task.examples(drawn.validation))
    assert len(found) > 20 and all(counts[group] == count for group, count in found.items())
