"""What the benchmark of a mixed batch compares: adapters, banks, the bare model, PEFT's, and what must hold first."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _harness import interleave
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from multitune import Adapter, Backbone, Bank, Head, LoRA, Method, Plan, Task

BANK_SIZE = 128
EVERY_LINEAR = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
TASK = Task(name="benchmark", kind="classification", template=("text",), labels=("no", "yes"))
TOLERANCE = 1e-4
"""Largest difference of a hidden state, float32; the hidden states are of the order of one."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One round's rows."""

    names: list[str]
    ids: Tensor


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every case gets."""

    backbone: Backbone
    bare: PreTrainedModel
    device: torch.device
    rng: random.Random
    folder: Path
    quick: bool
    seconds: float
    least_rounds: int
    warm_up: int

    def ids(self, num_rows: int, num_tokens: int) -> Tensor:
        """Token ids, any but the padding."""
        pad, size = self.backbone.pad_id, self.backbone.vocab_size
        ids = torch.randint(size - 1, (num_rows, num_tokens), generator=torch.Generator().manual_seed(self.seed()))
        return (ids + (ids >= pad)).to(self.device)

    def seed(self) -> int:
        """A fresh seed."""
        return self.rng.randrange(2**31)

    def adapter(self, method: Method) -> Adapter:
        """An adapter as training would leave one: nothing in it is zero."""
        generator = torch.Generator().manual_seed(self.seed())
        params = {
            name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in method.init(self.backbone, generator).items()
        }
        head = Head.for_task(TASK)
        return Adapter(
            name=method.name,
            method=method,
            params=params,
            head=head,
            head_params=head.init(self.backbone, generator),
            task=TASK,
            backbone=self.backbone.describe(),
        )

    def bank(self, methods: Sequence[Method], size: int = BANK_SIZE) -> Bank:
        """Adapters of these methods, called `METHOD-NUMBER`, the methods in turn."""
        bank = Bank(self.backbone)
        for i in range(size):
            method = methods[i % len(methods)]
            bank.add(f"{method.name}-{i // len(methods)}", self.adapter(method))
        return bank

    def time(
        self, systems: Mapping[str, Callable[[Batch], object]], draw: Callable[[], Batch]
    ) -> dict[str, list[float]]:
        """See `interleave`."""
        return interleave(
            systems,
            draw,
            device=self.device,
            seconds=self.seconds,
            least_rounds=self.least_rounds,
            warm_up=self.warm_up,
        )

    def run_bare(self, batch: Batch) -> Tensor:
        """The bare model's hidden states."""
        hidden: Tensor = self.bare(input_ids=batch.ids).last_hidden_state
        return hidden


class Steps:
    """Two steps of one batch on a bank: the first makes the plan, the second has it."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.plan: Plan | None = None

    def once(self, batch: Batch) -> Tensor:
        """A batch of one step."""
        return self.bank.backbone.run(self.bank.plan(batch.names), batch.ids)

    def first(self, batch: Batch) -> Tensor:
        """The first step of a new batch."""
        self.plan = self.bank.plan(batch.names)
        return self.bank.backbone.run(self.plan, batch.ids)

    def second(self, batch: Batch) -> Tensor:
        """The step after; then the plan is dropped."""
        plan, self.plan = self.plan, None
        assert plan is not None
        return self.bank.backbone.run(plan, batch.ids)


# ------------------------------------------------------------------------ the other systems


def bare_model(backbone: Backbone) -> PreTrainedModel:
    """The same model without instrumentation, its weights shared with the backbone's after a comparison."""
    model = AutoModel.from_pretrained(backbone.model.config.name_or_path, dtype=backbone.dtype).eval()
    model.requires_grad_(False).to(backbone.device)
    for mine, theirs in zip(model.parameters(), backbone.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        mine.data = theirs.data
    return model


def peft_model(backbone: Backbone, adapters: Mapping[str, Adapter]) -> torch.nn.Module:
    """PEFT's model with the same adapters, by the same names."""
    from peft import LoraConfig, get_peft_model

    method = next(iter(adapters.values())).method
    assert isinstance(method, LoRA)
    sites = backbone.find_sites("linear", method.targets)
    model = None
    for name in adapters:
        config = LoraConfig(r=method.r, lora_alpha=method.alpha, target_modules=[s.module for s in sites])
        if model is None:
            model = get_peft_model(bare_model(backbone), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    tensors = dict(model.named_parameters())
    for name, adapter in adapters.items():
        for site in sites:
            for key in "AB":
                target = tensors[f"base_model.model.{site.module}.lora_{key}.{name}.weight"]
                target.data.copy_(adapter.params[f"{site.name}.{key}"].T)
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------ what must hold first


def difference(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference, infinite if anything is not finite."""
    return float((x - y).abs().max()) if bool(x.isfinite().all() and y.isfinite().all()) else float("inf")


def check_rows(setup: Setup, bank: Bank, batch: Batch) -> None:
    """Every row of the batch equals itself alone, and its adapter does something; no adapter: the bare model."""
    backbone = bank.backbone
    bare = setup.run_bare(batch)
    nothing = difference(backbone.run(bank.plan([None] * len(batch.names)), batch.ids), bare)
    assert nothing <= TOLERANCE, f"without adapters the backbone differs from the bare model by {nothing}"
    mixed = Steps(bank).once(batch)
    rows = range(0, len(batch.names), 8 if setup.quick else 1)
    worst = 0.0
    for i in rows:
        name = batch.names[i]
        alone = backbone.run(bank.plan([name]), batch.ids[i : i + 1])[0]
        worst = max(worst, difference(mixed[i], alone))
        assert worst <= TOLERANCE, f"row {i} ({name}) differs by {worst} from that row alone"
        assert difference(mixed[i], bare[i]) > 10 * TOLERANCE, f"row {i} ({name}): its adapter does nothing"
    same = "exactly" if nothing == 0 else f"within {nothing:.0e}"
    print(
        f"  checked: no adapters = bare model, {same}; {len(rows)} of {len(batch.names)} rows = row alone, "
        f"within {worst:.0e}"
    )


def check_peft(setup: Setup, bank: Bank, model: torch.nn.Module, batch: Batch) -> None:
    """PEFT gives the same hidden states from the same tensors."""
    theirs = model(input_ids=batch.ids, adapter_names=batch.names).last_hidden_state
    worst = difference(Steps(bank).once(batch), theirs)
    assert worst <= TOLERANCE, f"multitune and PEFT differ by {worst}"
    print(f"  checked: multitune = PEFT, within {worst:.0e}")
