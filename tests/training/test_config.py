"""Settings: strict, documented, and exact on the way to JSON and back."""

import ast
import dataclasses
import inspect

import pytest

from multitune import ConfigError, LoRA, TrainConfig
from multitune.training import config as module


def test_every_field_is_documented():
    (body,) = (n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ClassDef))
    after = {a.target.id: b for a, b in zip(body.body, body.body[1:], strict=False) if isinstance(a, ast.AnnAssign)}
    assert list(after) == [f.name for f in dataclasses.fields(TrainConfig)]
    for name, node in after.items():
        assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), f"{name} has no text under it"


def test_dict_and_back():
    config = TrainConfig(learning_rate=1e-3, early_stopping=2, scheduler="cosine")
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_what_came_later_tells_runs_apart_whatever_its_default_becomes(monkeypatch):
    """Results without it are of runs that had no packing: a run that packs is none of them, and one without is."""
    usual = TrainConfig()
    assert {name: getattr(usual, name) for name in module.LATER} == module.LATER
    assert module.LATER.keys().isdisjoint(usual.identity())
    packed, plain = TrainConfig(packing=True), TrainConfig(packing=False)
    monkeypatch.setattr(TrainConfig, "packing", True)
    assert packed.identity() == plain.identity() | {"packing": True} and "packing" not in plain.identity()
    everything = packed.to_dict().keys() - set(module.COSMETIC)
    assert (module.LATER | packed.identity()).keys() == everything


def test_texts_are_read_as_the_type_of_the_field():
    config = TrainConfig.from_dict(
        {"epochs": "2.5", "batch_size": "4", "length_grouped": "false", "max_steps": "none", "learning_rate": "1e-3"}
    )
    assert (config.epochs, config.batch_size, config.length_grouped) == (2.5, 4, False)
    assert config.max_steps is None and config.learning_rate == 1e-3


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no training setting 'batchsize'.*Did you mean 'batch_size'"):
        TrainConfig.from_dict({"batchsize": 4})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", "many"),
        ("epochs", 0),
        ("epochs", float("nan")),
        ("learning_rate", -1.0),
        ("warmup_ratio", 1.0),
        ("head_dropout", -0.1),
        ("max_length", 3),
        ("precision", "fp16"),
        ("pooling", "max"),
        ("scheduler", "step"),
        ("early_stopping", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("length_grouped", "perhaps"),
    ],
)
def test_an_impossible_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"training setting {name}="):
        TrainConfig.from_dict({name: value})


def test_a_text_is_not_a_number_in_the_constructor():
    with pytest.raises(ConfigError, match="batch_size='4'"):
        TrainConfig(batch_size="4")


def test_resolve_takes_the_methods_own_recipe():
    resolved = TrainConfig(weight_decay=0.5).resolve(LoRA())
    assert resolved.learning_rate == LoRA.recipe.learning_rate
    assert resolved.warmup_ratio == LoRA.recipe.warmup_ratio
    assert resolved.weight_decay == 0.5
