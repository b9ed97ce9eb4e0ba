"""Tasks of writing: compared on decoders and encoder-decoders, judged by texts as long as the recipe says."""

import sys
from pathlib import Path

import pytest

from multitune import Backbone, Bank, ConfigError, compare, make_method, train
from multitune.comparing.budgets import counted
from multitune.comparing.execute import Place
from multitune.comparing.run import load
from multitune.comparing.sources import recipe_for_table
from multitune.generation import evaluate_texts


@pytest.fixture(scope="module")
def folders(make_backbone, tmp_path_factory):
    """`folders(name)`: a tiny model that writes, as `Backbone.load` takes it."""

    def make(name):
        place = tmp_path_factory.mktemp("writers") / "tiny"
        backbone = make_backbone(name)
        backbone.model.save_pretrained(place)
        backbone.tokenizer.save_pretrained(place)
        return f"{place}+decoder" if backbone.decodes else str(place)

    return make


@pytest.fixture
def names(tmp_path):
    """A table of prompts and answers."""
    words = ("good", "bad", "not good", "very bad")
    lines = [f"the {w} film {i},{w} film" for i in range(6) for w in words]
    file = tmp_path / "names.csv"
    file.write_text("\n".join(["text,answer", *lines]), "utf-8")
    return file


@pytest.fixture
def written(recipe, names):
    """`written(backbone, **of_task)`: a recipe of a task of writing."""

    def make(backbone, methods=("bitfit",), training=None, **of_task):
        task = {"data": str(names), "kind": "generation", "label": "answer", "metric": "chrf", **of_task}
        settings = {"max_steps": 2, "batch_size": 8, "max_length": 24, **(training or {})}
        return recipe(backbone=backbone, tasks=[task], methods=list(methods), seeds=1, training=settings)

    return make


def scores_alone(recipe, trial, **decoding):
    """Of the texts that the adapter of a trial writes, trained by itself."""
    backbone = Backbone.load(recipe.backbone)
    data = load(recipe).cells[0].draws[0].data
    method = make_method(trial.method, trial.settings)
    bank = Bank(backbone)
    bank.add("it", train(backbone, data, method, progress=False, **trial.training).adapter)
    return evaluate_texts(bank, "it", data.validation, decoding).scores


def test_a_process_elsewhere_finds_a_folder_whatever_stands_behind_its_name(folders):
    there = Path(folders("t5/writes"))
    assert Place(there.name, "cpu", None, str(there.parent))._backbone.decodes


@pytest.mark.parametrize("name", ["t5/writes", "bart/writes"])
def test_an_encoder_decoder_is_compared_and_full_tuning_beside_it(name, folders, written, tmp_path):
    given = written(folders(name), ["lora", "full"], max_new_tokens=5)
    small, full = compare(given, tmp_path, max_jobs=2).records  # no trial of it can share a pass
    assert {small.outcome.status, full.outcome.status} == {"finished"}, (small.outcome.error, full.outcome.error)
    assert (
        small.outcome.together == 1
        and small.outcome.scores.items() >= scores_alone(given, small.trial, max_new_tokens=5).items()
    )


def test_judged_texts_are_as_long_as_the_recipe_says(folders, written, tmp_path):
    backbone = folders("gpt2")
    learns = {"max_steps": 40, "learning_rate": 0.03}  # so that some of what is written is right
    judged = {"eval_texts": 2, "eval_new_tokens": 6, "eval_batch_size": 2}
    asked = {
        1: written(backbone, ["lora"], learns, max_new_tokens=1),
        6: written(backbone, ["lora"], learns | judged),
    }
    found = {}
    for tokens, given in asked.items():
        (record,) = compare(given, tmp_path / str(tokens)).records
        found[tokens] = scores_alone(given, record.trial, max_new_tokens=tokens)
        assert record.outcome.scores.items() >= found[tokens].items()
        assert record.trial.data.get("max_new_tokens") == (1 if tokens == 1 else None)
    assert 0 < found[1]["chrf"] < found[6]["chrf"]


def test_a_length_that_no_text_can_have_is_refused_before_anything_runs(folders, written, recipe, moods):
    backbone = folders("gpt2")
    with pytest.raises(ConfigError, match="max_new_tokens=40 leaves no room for a prompt in the 40 positions"):
        load(written(backbone, max_new_tokens=40))
    with pytest.raises(ConfigError, match="generation by perplexity judges none; leave it out"):
        load(written(backbone, metric="perplexity", max_new_tokens=5))
    with pytest.raises(ConfigError, match="classification by accuracy judges none; leave it out"):
        load(recipe(tasks=[{"data": str(moods), "label": "mood", "max_new_tokens": 5}]))


def test_what_a_trial_would_be_refused_for_is_refused_before_the_first(folders, written, recipe, monkeypatch):
    backbone = folders("gpt2")
    with pytest.raises(ConfigError, match="method 'head': .* trains nothing on task 'names'"):
        load(written(backbone, ["lora", "head"]))
    with pytest.raises(ConfigError, match="method 'lora': eval_texts=3 is for generation"):
        load(recipe(training={"eval_texts": 3}))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"multitune\[generation\]"):
        load(written(backbone))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"a search needs optuna.*multitune\[compare\]"):
        load(recipe(search={"trials": 1}))
    assert load(recipe(search={"trials": 2}))  # all of a grid takes no sampler


def test_the_methods_for_a_table_of_writing_all_train_something(names, moods):
    assert "head" not in {m.name for m in recipe_for_table(str(names), kind="generation", label="answer").methods}
    assert "head" in {m.name for m in recipe_for_table(str(moods), label="mood").methods}


def test_a_network_that_only_training_has_counts_in_no_report(folders, written, tmp_path):
    given = written(folders("gpt2"), ["prefix"], max_new_tokens=2)
    plan = load(given)
    (record,) = compare(given, tmp_path).records
    prefix = make_method("prefix")
    assert record.outcome.parameters == counted(plan.backbone, prefix) < prefix.num_parameters(plan.backbone)
