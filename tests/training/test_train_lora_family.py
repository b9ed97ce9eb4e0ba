"""Training of LoRA's relatives: rates by matrix, a penalty once a step, a budget that is met and survives a kill."""

from dataclasses import dataclass

import pytest
import torch

from multitune import AdaLoRA, Adapter, BitFit, Combined, DoRA, LoRA, LoRAPlus, PiSSA, TrainConfig, VeRA, evaluate
from multitune.heads import Head
from multitune.training.data import TaskRows
from multitune.training.model import TuningModel
from multitune.training.process_state import globals_kept
from multitune.training.trainer import TuningTrainer

# 20 rows in batches of 8: 3 steps an epoch, 12 in all. Pruned after steps 2, 4 and 6, and left alone from 7 on.
ADALORA = AdaLoRA(r=4, target_r=2, initial_share=0.1, final_share=0.5, interval=2)
SETTINGS = dict(epochs=4, max_steps=None, evaluations_per_epoch=3, learning_rate=1e-2, warmup_ratio=0.0)


# ---- LoRA+


def test_each_matrix_has_its_own_rate_in_the_optimizer(tiny, make_data, tmp_path):
    data, method = make_data(), LoRAPlus(r=2, ratio=16.0)
    head, g = Head.for_task(data.task), torch.Generator().manual_seed(0)
    model = TuningModel(tiny, method, method.init(tiny, g), head, head.init(tiny, g))
    rows = TaskRows(tiny, data.task, data.train, max_length=32, split="train")
    config = TrainConfig(learning_rate=1e-3, weight_decay=0.1).resolve(method)
    with globals_kept():
        groups = TuningTrainer(model, config, rows, rows, None, tmp_path).create_optimizer().param_groups
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    rates = {name: rate_of[id(p)] for name, p in model.own().items()}
    assert {name.rsplit(".", 1)[1]: rate for name, rate in rates.items()} == {"A": 1e-3, "B": 16e-3}
    assert len(rates) == 12 and {rate_of[id(p)] for p in model.head_params} == {1e-3}


def test_a_step_follows_the_rates(tiny, make_data, quick):
    """From the same start and gradients, B moves as under LoRA at 16 times the rate, A and the head as at its own."""
    settings = dict(max_steps=1, warmup_ratio=0.0)
    plus = quick(tiny, make_data(), LoRAPlus(r=2), learning_rate=1e-3, **settings).adapter
    fast = quick(tiny, make_data(), LoRA(r=2), learning_rate=16e-3, **settings).adapter
    slow = quick(tiny, make_data(), LoRA(r=2), learning_rate=1e-3, **settings).adapter
    for name, t in plus.params.items():
        assert torch.equal(t, (fast if name.endswith(".B") else slow).params[name])
    assert max(t.abs().max() for n, t in plus.params.items() if n.endswith(".B")) == pytest.approx(16e-3, rel=1e-3)
    assert torch.equal(plus.head_params["weight"], slow.head_params["weight"])


def test_after_two_steps_both_matrices_have_moved(tiny, make_data, quick):
    fresh = LoRAPlus(r=2).init(tiny, torch.Generator().manual_seed(0))
    trained = quick(tiny, make_data(), LoRAPlus(r=2), learning_rate=1e-3, max_steps=2, warmup_ratio=0.0).adapter.params
    moved = {key: max((t - fresh[n]).abs().max() for n, t in trained.items() if n.endswith(key)) for key in "AB"}
    assert 0 < moved["A"] <= 1.01e-3 and 5e-3 < moved["B"] <= 2 * 16.1e-3


# ---- what is stored and not trained


def test_the_starts_of_pissa_are_saved_and_do_not_move(tiny, make_data, quick, same_tensors, tmp_path):
    method = PiSSA(r=2)
    fresh = method.init(tiny, torch.Generator().manual_seed(0))
    adapter = quick(tiny, make_data(), method, tmp_path / "out", warmup_ratio=0.0, weight_decay=0.1).adapter
    for name, t in adapter.params.items():
        assert torch.equal(t, fresh[name]) == name.endswith("_start")
    same_tensors(Adapter.load(tmp_path / "out", tiny), adapter)


@pytest.mark.parametrize("method", [DoRA(r=2, constant_norm=False), VeRA(r=8, dropout=0.1), PiSSA(r=2), ADALORA])
def test_a_bfloat16_backbone_trains_them(method, make_backbone, one_thread, make_data, quick):
    backbone = make_backbone("bert")
    backbone.model.to(torch.bfloat16)
    result = quick(backbone, make_data(), method, warmup_ratio=0.0, max_steps=3)
    assert all(t.dtype == torch.float32 for t in result.adapter.params.values())
    evaluate(backbone, result.adapter, make_data())


# ---- a penalty


@dataclass(frozen=True, kw_only=True)
class Penalised(LoRA):
    """LoRA with a penalty whose gradient is known: 3 for every entry of B."""

    weight: float = 3.0

    def penalty(self, params):
        return self.weight * sum(t.sum() for name, t in params.items() if name.endswith(".B"))


def test_a_penalty_counts_once_a_step_however_the_step_is_split(make_backbone, one_thread, make_data, quick):
    settings = dict(max_steps=3, head_dropout=0.0, learning_rate=1e-2, max_grad_norm=0.0, warmup_ratio=0.0)
    runs = {
        (batch, parts, weight): quick(
            make_backbone("bert"),
            make_data(train=20),
            Penalised(r=2, weight=weight),
            batch_size=batch,
            gradient_accumulation=parts,
            **settings,
        )
        for batch, parts, weight in ((16, 1, 3.0), (8, 2, 3.0), (4, 4, 3.0), (16, 1, 0.0))
    }
    whole, *split, without = runs.values()
    for other in split:
        losses = [[e["loss"] for e in r.history] for r in (whole, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for name, t in whole.adapter.params.items():
            torch.testing.assert_close(t, other.adapter.params[name], rtol=1e-3, atol=1e-4)
    assert whole.history[1]["loss"] < without.history[1]["loss"] - 1  # B moved against the penalty
    assert whole.adapter.metrics["loss"] > -1  # which evaluation leaves out


# ---- AdaLoRA


def _num_triplets(adapter):
    return sum(len(t) for name, t in adapter.params.items() if name.endswith(".E"))


def test_the_budget_reaches_its_target_and_the_best_of_those_steps_is_kept(tiny, make_data, quick, tmp_path):
    result = quick(tiny, make_data(), ADALORA, tmp_path / "out", **SETTINGS)
    method = result.adapter.method
    assert sum(method.ranks) == _num_triplets(result.adapter) == 2 * 6
    assert result.num_steps == 12 and result.best_step >= ADALORA.last_pruning(12) == 6
    assert all((t != 0).all() for name, t in result.adapter.params.items() if name.endswith(".E"))
    settled = [e["eval_accuracy"] for e in result.history if "eval_loss" in e and e["step"] >= 6]
    assert result.best_metric == max(settled)
    assert {name.rsplit(".", 1)[1] for name in result.adapter.params} == {"A", "E", "B"}
    loaded = Adapter.load(tmp_path / "out", tiny)
    assert loaded.method == method
    assert evaluate(tiny, loaded, make_data()) == {"accuracy": pytest.approx(result.best_metric)}


def test_early_stopping_waits_for_the_budget(tiny, make_data, quick):
    result = quick(tiny, make_data(), ADALORA, **(SETTINGS | dict(learning_rate=1e-9, early_stopping=1)))
    assert result.num_steps == 7 and result.best_step >= 6  # settled from there on; equal scores keep the later
    assert sum(result.adapter.method.ranks) == 12


@pytest.mark.parametrize("after", [5, 11, 17, 22])
def test_a_stopped_run_goes_on_to_the_same_bits(after, tiny, make_data, quick, same_tensors, tmp_path, stopping):
    whole = quick(tiny, make_data(), ADALORA, tmp_path / "whole", **SETTINGS)
    broken = stopping(AdaLoRA, after)(**ADALORA.settings())
    with pytest.raises(stopping.error):
        quick(tiny, make_data(), broken, tmp_path / "broken", **SETTINGS)
    assert not (tmp_path / "broken" / "adapter.json").exists()
    resumed = quick(tiny, make_data(), ADALORA, tmp_path / "broken", **SETTINGS)
    same_tensors(whole.adapter, resumed.adapter)
    assert resumed.adapter.method == whole.adapter.method
    assert resumed.history == whole.history and resumed.best_step == whole.best_step


def test_a_finished_adapter_can_be_trained_on(tiny, make_data, quick):
    first = quick(tiny, make_data(), ADALORA, **SETTINGS).adapter
    again = quick(tiny, make_data(), first.method, max_steps=2, warmup_ratio=0.0).adapter
    assert again.method == first.method
    assert {k: t.shape for k, t in again.params.items()} == {k: t.shape for k, t in first.params.items()}


def test_beside_another_method_the_budget_is_met_and_the_penalty_counts(tiny, make_data, quick):
    both = Combined(methods=(ADALORA, BitFit()))
    result = quick(tiny, make_data(), both, **SETTINGS)
    adalora, bitfit = result.adapter.method.methods
    assert sum(adalora.ranks) == 12 and bitfit == BitFit() and result.best_step >= 6
    fresh = both.init(tiny, torch.Generator().manual_seed(0))
    own = {k.removeprefix("adalora."): t for k, t in fresh.items() if k.startswith("adalora.")}
    assert both.penalty(fresh) == ADALORA.penalty(own)
    assert Combined(methods=(LoRA(), BitFit())).penalty({}) is None
    assert both.shapes(tiny) == {k: t.shape for k, t in fresh.items()}
