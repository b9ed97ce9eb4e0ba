"""One run: what it changes, what it leaves alone, what it writes."""

import json
import math
import os
import random
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from multitune import (
    Adapter,
    Backbone,
    Bank,
    ConfigError,
    DataError,
    Freeze,
    LoRA,
    Plan,
    PromptTuning,
    Task,
    TopLayers,
    TrainConfig,
    evaluate,
    get_method,
    load_task,
    method_names,
    train,
)
from multitune.heads import Head
from multitune.tasks import higher_is_better
from multitune.training.model import TuningModel

KINDS = ("classification", "regression", "multilabel", "multiple_choice", "tagging")


def _weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {k: t.clone() for k, t in backbone.model.state_dict().items()}


def _assert_same(before, backbone) -> None:
    after = backbone.model.state_dict()
    assert list(before) == list(after)
    for name, t in before.items():
        assert torch.equal(t, after[name]), name


@pytest.mark.parametrize("name", method_names())
def test_every_method_changes_its_own_tensors_and_nothing_else(name, tiny, make_data, quick, same_tensors, tmp_path):
    before = _weights(tiny)
    result = quick(tiny, make_data(), name, tmp_path / "out", max_steps=3, learning_rate=1e-2, warmup_ratio=0.0)
    _assert_same(before, tiny)
    assert not any(p.requires_grad for p in tiny.model.parameters())
    assert not tiny.model.training and tiny.attached
    method = result.adapter.method
    fresh = method.init(tiny, torch.Generator().manual_seed(0))
    if method.changes_weights:
        assert result.adapter.params and set(result.adapter.params) <= set(fresh)
    else:
        assert list(result.adapter.params) == list(fresh)
        assert result.num_method_parameters == get_method(name)().num_parameters(tiny)
    assert all(t.dtype == torch.float32 for k, t in result.adapter.params.items() if method.trains(k))
    changed = [k for k, t in result.adapter.params.items() if not torch.equal(t, fresh[k])]
    assert changed or not fresh
    loaded = Adapter.load(tmp_path / "out", tiny)
    same_tensors(loaded, result.adapter)
    assert loaded.method == method
    assert evaluate(tiny, tmp_path / "out", make_data()) == pytest.approx(
        {k: v for k, v in result.adapter.metrics.items() if k != "loss"}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "prompt", "full"])
def test_every_kind_of_task(kind, method, tiny, make_data, quick):
    data = make_data(kind)
    result = quick(tiny, data, method, epochs=2, max_steps=None)
    assert result.num_steps == 6 and math.isfinite(result.history[-1]["loss"])
    scores = evaluate(tiny, result.adapter, data)
    assert scores == pytest.approx({k: v for k, v in result.adapter.metrics.items() if k != "loss"}, abs=1e-5)
    assert scores[data.task.metric] == pytest.approx(result.best_metric, abs=1e-5)
    assert evaluate(tiny, result.adapter, data.validation) == scores
    best = (max if higher_is_better(data.task.metric) else min)(
        e[f"eval_{data.task.metric}"] for e in result.history if "eval_loss" in e
    )
    assert result.best_metric == best


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_unit_of_a_regression_changes_nothing(method, tiny, make_data, quick, tmp_path):
    """Grades from 0 to 5 or prices around 250,000: the same steps, and answers in the unit of the targets."""
    grades, found = make_data("regression"), {}
    units = {"grades": (1, 0), "prices": (40_000, 250_000), "shares": (1e-3, 0)}
    for name, (factor, offset) in units.items():
        train_rows, validation = (
            [row | {"y": factor * row["y"] + offset} for row in rows] for rows in (grades.train, grades.validation)
        )
        data = replace(grades, train=train_rows, validation=validation)
        result = quick(tiny, data, method, tmp_path / name, epochs=3, max_steps=None, learning_rate=1e-3)
        bank = Bank(tiny)
        bank.add(name, tmp_path / name)
        answers = torch.tensor([p.label for p in bank.predict([(name, row) for row in validation])])
        found[name] = (answers - offset) / factor, [e["loss"] for e in result.history if "loss" in e]
    answers, losses = found["grades"]
    assert len(losses) > 1 and answers.std() > 0.005
    for name in ("prices", "shares"):
        torch.testing.assert_close(found[name][0], answers, rtol=0, atol=2e-4)
        assert found[name][1] == pytest.approx(losses, rel=1e-4)


def test_training_learns(minilm):
    data = load_task("demo/sentiment")
    result = train(minilm, data, "lora", epochs=3, max_length=32, progress=False)
    labels = list(data.validation["label"])
    majority = max(labels.count(x) for x in set(labels)) / len(labels)
    assert result.best_metric > majority + 0.12
    assert evaluate(minilm, result.adapter, data) == {"accuracy": result.best_metric}
    answer = Bank(minilm)
    answer.add("s", result.adapter)
    assert answer.predict([("s", "What a wonderful, moving film, I loved it.")])[0].label == "positive"


def test_the_same_seed_gives_the_same_bits_wherever_it_is_written(tiny, make_data, quick, same_tensors, tmp_path):
    runs = [
        quick(tiny, make_data(), "lora", out, epochs=2, max_steps=None)
        for out in (None, tmp_path / "a", tmp_path / "b")
    ]
    for other in runs[1:]:
        same_tensors(runs[0].adapter, other.adapter)
        assert runs[0].adapter.recipe == other.adapter.recipe
        assert runs[0].history == other.history
    differs = quick(tiny, make_data(), "lora", seed=1)
    assert not torch.equal(differs.adapter.head_params["weight"], runs[0].adapter.head_params["weight"])


def test_global_state_is_left_alone(tiny, make_data, quick):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    python, numpy, rng = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    environment, filters = dict(os.environ), list(warnings.filters)
    verbosity, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    quick(tiny, make_data(), "lora")
    assert random.getstate() == python and (np.random.get_state()[1] == numpy).all()
    assert torch.equal(torch.get_rng_state(), rng)
    assert dict(os.environ) == environment and warnings.filters == filters
    assert transformers.logging.get_verbosity() == verbosity and torch.get_num_threads() == threads


def test_silent_without_progress(tiny, make_data, quick, capfd):
    quick(tiny, make_data(), "lora")
    assert capfd.readouterr() == ("", "")
    quick(tiny, make_data(), "lora", progress=True)  # neither stream is a terminal
    assert capfd.readouterr() == ("", "")


def test_what_a_run_writes(tiny, make_data, quick, tmp_path):
    result = quick(tiny, make_data(), LoRA(r=2), tmp_path / "out", name="mine", epochs=2, max_steps=None, seed=3)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"adapter.json", "adapter.safetensors", "curve.png", "history.json"}
    assert (tmp_path / "out" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out" / "history.json").read_text()) == result.history
    adapter = Adapter.load(tmp_path / "out", tiny)
    assert result.adapter.path == tmp_path / "out"
    assert (adapter.name, adapter.seed, adapter.method) == ("mine", 3, LoRA(r=2))
    assert adapter.recipe["learning_rate"] == LoRA.recipe.learning_rate
    assert adapter.recipe["num_train"] == 20 and adapter.recipe["num_validation"] == 8
    assert {"step", "epoch", "loss", "eval_loss", "eval_accuracy"} <= set(result.history[-1])
    assert adapter.metrics["accuracy"] == result.best_metric
    assert result.seconds > 0 and result.peak_memory_bytes > 0


def test_prompts_leave_room_for_themselves(tiny, make_data, quick):
    long = [{"text": "film " * 60, "y": "bad"}] * 8
    data = make_data()
    data = type(data)(task=data.task, train=long, validation=long)
    result = quick(tiny, data, PromptTuning(length=10))
    assert result.adapter.max_length == tiny.max_length - 10
    evaluate(tiny, result.adapter, data)


@pytest.mark.parametrize("name", [n for n in method_names() if n != "full"])
def test_mixed_precision(name, tiny, make_data, quick):
    result = quick(tiny, make_data(), name, precision="bf16")
    trains = result.adapter.method.trains
    assert all(t.dtype == torch.float32 for k, t in result.adapter.params.items() if trains(k))
    assert math.isfinite(result.history[-1]["loss"])


@pytest.mark.parametrize("name", ["lora", "aot_fc", "prompt", "full"])
def test_a_bfloat16_backbone_trains_float32_tensors(name, make_backbone, one_thread, make_data, quick):
    backbone = make_backbone("bert")
    backbone.model.to(torch.bfloat16)
    result = quick(backbone, make_data(), name, warmup_ratio=0.0)
    assert result.adapter.params and all(t.dtype == torch.float32 for t in result.adapter.params.values())
    assert backbone.dtype == torch.bfloat16
    evaluate(backbone, result.adapter, make_data())


def test_a_float16_backbone_is_refused(make_backbone, make_data, quick):
    backbone = make_backbone("bert")
    backbone.model.to(torch.float16)
    with pytest.raises(ConfigError, match="float16.*bfloat16"):
        quick(backbone, make_data())


def test_divergence_stops_the_run_and_saves_nothing(tiny, make_data, quick, tmp_path):
    with pytest.raises(ConfigError, match=r"diverged at step \d+.*for example to 0.003, the usual one of lora"):
        quick(tiny, make_data(), "lora", tmp_path / "out", learning_rate=1e30, warmup_ratio=0.0, max_steps=20)
    assert not (tmp_path / "out" / "adapter.json").exists()
    assert not tiny.model.training and tiny.attached


def test_a_last_step_that_overflows_is_not_saved(tiny, make_data, quick, tmp_path):
    with pytest.raises(ConfigError, match="diverged at step 1"):
        quick(tiny, make_data(), "head", tmp_path / "out", learning_rate=1e37, warmup_ratio=0.0, max_steps=1)
    assert not (tmp_path / "out" / "adapter.json").exists()


def test_early_stopping(tiny, make_data, quick):
    result = quick(
        tiny, make_data(), "head", max_steps=None, epochs=50, early_stopping=2, learning_rate=1e-9, head_dropout=0.0
    )
    evaluated = [e["step"] for e in result.history if "eval_loss" in e]
    assert result.num_steps == 9 and evaluated == [3, 6, 9]
    losses = {e["step"]: e["eval_loss"] for e in result.history if "eval_loss" in e}
    assert result.best_step == max(losses, key=lambda step: (-losses[step], step))


def test_evaluations_per_epoch(tiny, make_data, quick):
    result = quick(tiny, make_data(train=40), "head", max_steps=None, epochs=1.6, evaluations_per_epoch=2)
    assert [e["step"] for e in result.history if "eval_loss" in e] == [2, 5, 7, 8]


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_accumulated_batches_equal_one_large_batch(kind, make_backbone, one_thread, make_data, quick):
    settings = dict(max_steps=3, head_dropout=0.0, learning_rate=1e-2, max_grad_norm=0.0)
    runs = [
        quick(
            make_backbone("bert"), make_data(kind, train=20), LoRA(), batch_size=b, gradient_accumulation=a, **settings
        )
        for b, a in ((16, 1), (8, 2))
    ]
    losses = [[e["loss"] for e in r.history] for r in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, t in runs[0].adapter.params.items():
        torch.testing.assert_close(t, runs[1].adapter.params[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", method_names())
def test_gradient_checkpointing_gives_equal_gradients(name, tiny, make_data):
    data, method = make_data(), get_method(name)()
    head = Head.for_task(data.task)
    backbone = tiny.clone() if method.changes_weights else tiny
    params = method.init(backbone, torch.Generator().manual_seed(0))
    if method.changes_weights:
        own = dict(backbone.model.named_parameters())
        params = {k: own[k].requires_grad_(True) for k in params}
    model = TuningModel(backbone, method, params, head, head.init(backbone, torch.Generator().manual_seed(1)))
    ids = torch.randint(5, 90, (4, 9), generator=torch.Generator().manual_seed(2))
    targets = torch.tensor([0, 1, 2, 0])

    def gradients():
        torch.manual_seed(0)
        model.train()
        model.zero_grad()
        model(ids, targets=targets)["loss"].backward()
        model.eval()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    with torch.random.fork_rng():
        plain = gradients()
        backbone.enable_gradient_checkpointing()
        again = gradients()
        backbone.disable_gradient_checkpointing()
    assert any(g is not None and g.abs().sum() > 0 for g in plain)
    for a, b in zip(plain, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_gradient_checkpointing_trains_the_same_and_is_switched_off(tiny, make_data, quick, same_tensors):
    plain, again = (quick(tiny, make_data(), "lora", gradient_checkpointing=on) for on in (False, True))
    same_tensors(plain.adapter, again.adapter)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in tiny.model.modules())


def test_the_model_holds_the_adapter_only(tiny, make_data):
    head = Head.for_task(make_data().task)
    method = LoRA(r=2)
    model = TuningModel(tiny, method, method.init(tiny, torch.Generator()), head, head.init(tiny, torch.Generator()))
    held = sum(t.numel() for t in model.state_dict().values())
    assert held == method.num_parameters(tiny) + 3 * tiny.hidden_size + 3
    assert not list(model.buffers())
    model.train()
    assert tiny.model.training
    model.eval()
    assert not tiny.model.training


def test_full_fine_tuning_saves_only_what_changed(tiny, make_data, quick):
    before = _weights(tiny)
    result = quick(tiny, make_data(), "full", warmup_ratio=0.0)
    tuned = tiny.with_weights(result.adapter.params)
    for name, t in result.adapter.params.items():
        assert not torch.equal(t, before[name])
        assert torch.equal(tuned.model.state_dict()[name], t)
    seen = {i for row in make_data().train for i in row["text"].split()}
    assert seen  # some word embeddings moved, so the tensor is there
    assert "embeddings.word_embeddings.weight" in result.adapter.params
    assert not any(name.startswith("pooler") for name in result.adapter.params)
    _assert_same(before, tiny)


def test_evaluate_refuses_what_it_cannot_judge(tiny, make_data, quick):
    adapter = quick(tiny, make_data(), "head").adapter
    with pytest.raises(DataError, match="no split 'dev'"):
        evaluate(tiny, adapter, make_data(), "dev")
    with pytest.raises(DataError, match="no labelled test split"):
        evaluate(tiny, adapter, make_data(), "test")
    with pytest.raises(DataError, match="there are no rows"):
        evaluate(tiny, adapter, [])


def test_unknown_settings_and_methods(tiny, make_data, quick):
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        quick(tiny, make_data(), learning_rat=1e-3)
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        quick(tiny, make_data(), "lore")
    for method in ("lora", LoRA()):
        with pytest.raises(ConfigError, match=r"r is a hyper-parameter of lora; give it .*LoRA\(r=\.\.\.\)"):
            quick(tiny, make_data(), method, r=4)
    with pytest.raises(ConfigError, match=r"no training setting 'r'\. There are"):
        quick(tiny, make_data(), "head", r=4)


def test_a_name_for_a_backbone_and_a_class_for_a_method_get_the_line_that_makes_them(tiny, make_data, quick):
    with pytest.raises(ConfigError, match=r"not 'minilm'; give Backbone\.load\('minilm'\)"):
        quick("minilm", make_data())
    with pytest.raises(ConfigError, match=r"a Backbone, not a BertModel"):
        quick(tiny.model, make_data())
    with pytest.raises(ConfigError, match=r"LoRA is a class of methods; give a method: LoRA\(\)"):
        quick(tiny, make_data(), LoRA)
    with pytest.raises(ConfigError, match="a method or the name of one, not a int"):
        quick(tiny, make_data(), 3)


def test_config_and_overrides_add_up(tiny, make_data):
    result = train(
        tiny, make_data(), "lora", config=TrainConfig(max_steps=5, batch_size=8, progress=False), max_steps=1
    )
    assert result.num_steps == 1 and result.adapter.recipe["batch_size"] == 8


def test_a_backbone_in_training_is_refused(tiny, make_data, quick):
    tiny.model.train()
    with pytest.raises(ConfigError, match="training mode"):
        quick(tiny, make_data())
    tiny.model.eval()


@pytest.mark.parametrize("method", [TopLayers(count=1), Freeze(first=1, last=1)], ids=["top", "middle"])
def test_partial_tuning_moves_its_layers_and_goes_no_deeper(method, tiny, make_data, quick):
    (layer,) = method.trained_layers(tiny)
    result = quick(tiny, make_data(), method, warmup_ratio=0.0)
    moved = set(result.adapter.params)
    assert moved and moved <= set(method.weights(tiny))
    assert result.num_method_parameters == method.num_parameters(tiny) < tiny.num_parameters
    copied = tiny.clone()
    for name, parameter in copied.model.named_parameters():
        parameter.requires_grad_(name in method.weights(tiny))
    needs_backward = []
    for i in range(tiny.num_layers):
        copied.model.get_submodule(f"encoder.layer.{i}").register_forward_hook(
            lambda module, args, output: needs_backward.append(output.requires_grad)
        )
    copied.run(Plan([None]), torch.tensor([[5, 6, 7]]))
    assert needs_backward == [i >= layer for i in range(tiny.num_layers)]


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("pairs.csv", r"not a str; give load_table\('pairs.csv'"),
        (Path("pairs.csv"), r"load_table\('pairs.csv'"),
        ([{"text": "a", "label": 1}], r"not a list; give load_table\(rows"),
        (Task(name="t", kind="regression", template="text", label="y"), r"load_table\(FILE, task=task\)"),
    ],
)
def test_what_has_no_rows_of_a_task_is_refused_with_the_line_that_makes_some(tiny, given, fix):
    with pytest.raises(DataError, match=fix):
        train(tiny, given, "lora")


def test_evaluate_reads_a_file(tiny, make_data, quick, tmp_path):
    data = make_data()
    adapter = quick(tiny, data).adapter
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, data.validation)), "utf-8")
    assert evaluate(tiny, adapter, file) == evaluate(tiny, adapter, str(file)) == evaluate(tiny, adapter, data)
    with pytest.raises(DataError, match="not a Task"):
        evaluate(tiny, adapter, data.task)
