"""Recipes are read strictly: a slip is named before anything runs."""

import pytest
import yaml

from multitune import ConfigError
from multitune.cli import options
from multitune.comparing.recipe import Recipe
from multitune.comparing.recipe_entries import OWN_DATA, Budget
from multitune.comparing.sources import METHODS, recipe_of

GIVEN = """
name: my-comparison
backbone: minilm
tasks:
  - demo/topic
  - {task: demo/sentiment, train_rows: 20, validation_rows: 10, max_length: 32, training: {epochs: 2}}
  - {data: mine.csv, text: question, label: intent}
  - {data: quiz.csv, text: question, label: answer, choices: [one, '{two}, or so'], labels: a, name: quiz}
methods:
  lora: {r: [4, 8], learning_rate: [1.0e-3, 3.0e-3], targets: [[query], [query, value]]}
  bitfit:
budgets: [0.1%, 50000]
seeds: 3
search: {trials: 8}
training: {epochs: 3, batch_size: 16}
few_shot: {per_class: [16, 64], subset_seeds: 3}
"""


def test_every_key_is_read(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(GIVEN, "utf-8")
    recipe = Recipe.read(file)
    one, two, three, four = recipe.tasks
    assert (one.task, two.train_rows, two.validation_rows) == ("demo/topic", 20, 10)
    assert two.training == {"epochs": 2.0, "max_length": 32}
    assert (three.data, dict(three.own)) == ("mine.csv", {"text": "question", "label": "intent"})
    assert (four.own["choices"], four.own["labels"]) == (["one", "{two}, or so"], ["a"])
    lora, bitfit = recipe.methods
    assert lora.num_points == len(list(lora.points())) == 8
    assert bitfit.num_points == 1
    assert recipe.budgets == (Budget(name="0.1%", share=0.001), Budget(name="50000", count=50000))
    assert recipe.budgets[0].parameters(22_000_000) == 22_000
    assert recipe.seeds == (0, 1, 2) and recipe.few_shot.subset_seeds == (0, 1, 2)
    assert recipe.search.trials == 8


def test_own_rows_are_read_by_the_keys_of_a_recipe_of_train():
    assert {"train", *OWN_DATA} == set(options.OWN_DATA)


def test_a_recipe_written_and_read_again_is_the_same():
    recipe = Recipe.from_dict(yaml.safe_load(GIVEN))
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_a_setting_that_is_both_goes_to_the_method(values):
    (vera,) = Recipe.from_dict(values(methods={"vera": {"seed": 3, "learning_rate": 0.01}})).methods
    (point,) = vera.points()
    assert vera.method(point).seed == 3
    assert vera.training(point) == {"learning_rate": 0.01}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2}, "'epochs' is a setting of training, .* write training: {epochs: 2}"),
        ({"lr": 0.1}, "'lr' is a setting of training, .* write training: {learning_rate: 0.1}"),
        ({"methds": ["lora"]}, "unknown key 'methds'.* Did you mean 'methods'"),
        ({"tasks": []}, "needs 'tasks'"),
        ({"tasks": "demo/topic"}, "'tasks' is a list"),
        ({"tasks": [{"task": "demo/topic", "train_row": 3}]}, "task 1: unknown key 'train_row'.* 'train_rows'"),
        ({"tasks": [{"task": "demo/topic", "train_rows": 0}]}, "'train_rows' is a whole number of at least 1"),
        ({"tasks": [{"task": "demo/topic", "subset_seed": 1}]}, "'subset_seed' says which train_rows are drawn"),
        (
            {"tasks": [{"task": "demo/topic", "max_length": 9, "training": {"max_length": 8}}]},
            "'max_length' stands there twice",
        ),
        ({"tasks": [{"task": "demo/topic", "label": "x"}]}, "brings its own data, so 'label' cannot be honoured"),
        ({"tasks": [{"task": "demo/topic", "choices": ["x"]}]}, "brings its own data, so 'choices' cannot be honoured"),
        ({"tasks": [{"data": "x.csv", "labels": [True, False]}]}, "task 1: 'labels': True is no name; put quotes"),
        ({"tasks": [{"data": "x.csv", "choices": 3}]}, "task 1: 'choices' is a list of names, such as"),
        ({"tasks": [{"task": "demo/topic", "data": "x.csv"}]}, "give one of"),
        ({"tasks": [{"label": "x"}]}, "give one of"),
        ({"tasks": [{"task": "demo/topic", "training": {"epoch": 2}}]}, "no training setting 'epoch'.* 'epochs'"),
        ({"methods": ["loar"]}, "no method is called 'loar'.* Did you mean 'lora'"),
        ({"methods": {"lora": {"lora_alpha": [2]}}}, "has a setting 'lora_alpha'.* Did you mean 'alpha'"),
        ({"methods": {"lora": {"learning_rat": 1}}}, "setting 'learning_rat'.* Did you mean 'learning_rate'"),
        ({"methods": {"lora": {"lr": 1}}}, "has a setting 'lr'.* Did you mean 'learning_rate'"),
        ({"methods": {"lora": {"r": []}}}, "list of 'r' is empty"),
        ({"methods": {"lora": {"r": [2, 2]}}}, "has a value twice"),
        ({"methods": {"lora": {"r": [4, 0]}}}, "r=0 is not possible"),
        ({"methods": {"lora": {"r": [4, "many"]}}}, "r='many' is not possible"),
        ({"methods": {"lora": {"learning_rate": [0.1, -1.0]}}}, "learning_rate=-1.0 is not possible"),
        ({"methods": {"lora": {"seed": [1, 2]}}}, "seeds stand under 'seeds'"),
        ({"methods": {"lora": 8}}, "a mapping of settings"),
        ({"training": {"seed": 3}}, "seeds stand under 'seeds'"),
        ({"training": {"batch_size": 0}}, "batch_size=0 is not possible"),
        ({"training": [1]}, "training settings are a mapping"),
        ({"budgets": ["lots"]}, "a budget is a share"),
        ({"budgets": ["0%"]}, "a budget is a share"),
        ({"budgets": [-5]}, "a budget is a share"),
        ({"seeds": 0}, "'seeds' is how many seeds"),
        ({"seeds": [1, 1]}, "has a seed twice"),
        ({"seeds": ["one"]}, "'seeds' is how many seeds"),
        ({"search": {"trails": 4}}, "unknown key 'trails'.* Did you mean 'trials'"),
        ({"search": {}}, "'trials' is a whole number"),
        ({"search": 8}, "'search' is a mapping"),
        ({"few_shot": {"per_class": [0]}}, "'per_class' is a whole number"),
        ({"few_shot": {"shots": 4}}, "is a mapping, such as"),
    ],
)  # fmt: skip
def test_a_slip_is_named(values, changes, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(values(**changes))


def test_every_value_of_a_grid_is_checked_beside_every_other_setting(values):
    with pytest.raises(ConfigError, match="target_r"):
        Recipe.from_dict(values(methods={"adalora": {"r": [12], "target_r": [8, 13]}}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("glu", "is no suite"),
        ("missing.yaml", "no recipe missing.yaml"),
        ("missing.csv", "no file or folder"),
    ],
)
def test_something_that_is_not_there_is_named(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        recipe_of(name)


def test_how_to_read_a_table_is_refused_where_there_is_none(tmp_path, values):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values()), "utf-8")
    with pytest.raises(ConfigError, match="--label is for a table"):
        recipe_of(file, label="mood")


def test_a_recipe_without_a_name_is_called_like_its_file(tmp_path, values):
    file = tmp_path / "evening.yaml"
    file.write_text(yaml.safe_dump(values(name=None)), "utf-8")
    assert recipe_of(file).name == "evening"


def test_a_small_table_gets_a_recipe_with_more_epochs(moods, tmp_path):
    recipe = recipe_of(str(moods), label="mood")
    assert [m.name for m in recipe.methods] == list(METHODS)
    assert recipe.seeds == (0, 1, 2) and recipe.name == "moods"
    assert recipe.training["epochs"] == 15  # 43 rows are 3 steps: 200 would take 67 epochs
    large = tmp_path / "large.csv"
    large.write_text("text,mood\n" + "a film,good\nthe film,bad\n" * 3000, "utf-8")
    recipe = recipe_of(str(large))
    (entry,) = recipe.tasks
    assert (entry.train_rows, entry.validation_rows) == (2000, 500)
    assert recipe.training["epochs"] == 2  # of 125 steps


def test_methods_and_seeds_may_be_others(recipe):
    other = recipe().with_methods(["bitfit", "ia3"]).with_seeds([7])
    assert [m.name for m in other.methods] == ["bitfit", "ia3"] and other.seeds == (7,)
    kept = recipe().with_methods(["lora"])
    assert kept.methods[0].grid == {"r": (2, 4)}
