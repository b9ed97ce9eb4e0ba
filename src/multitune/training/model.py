"""What is trained: a method's tensors and a head, around a backbone that stays outside the module tree.

Legend: B sequences, T tokens, C outputs, R rows (a multiple-choice or ranked row has several sequences),
N tokens of choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from multitune import heads
from multitune.backbone import Backbone
from multitune.deltas import Delta
from multitune.errors import ConfigError
from multitune.heads import Head
from multitune.inputs import Batch
from multitune.language_loss import distilled_losses, token_losses
from multitune.methods import Method
from multitune.methods.yielded import check_deltas, why_not_trainable
from multitune.plan import DeltaSet, Plan
from multitune.ranked import choice_log_probs
from multitune.sharing import first_touched, first_trained
from multitune.training.choices import LOSSES, Candidates, distillation_loss

#: Kinds of head that read more than one vector of a row.
_READ_TOKENS = ("tagging", "generation", "ranking")


class TuningModel(nn.Module):
    """Trainable tensors of one task. The backbone is a guest: never copied, moved, saved or registered."""

    def __init__(
        self,
        backbone: Backbone,
        method: Method,
        params: Mapping[str, Tensor],
        head: Head,
        head_params: Mapping[str, Tensor],
        *,
        num_choices: int = 1,
        autocast: torch.dtype | None = None,
        label_smoothing: float = 0.0,
        losses: Sequence[str] = ("choice",),
        distill_weight: float = 1.0,
    ) -> None:
        """
        Args:
            params: the method's tensors by name; those that `method.trains` are float32. A tensor that is a parameter
                already (full fine-tuning: one of the backbone's own) is trained in place.
            num_choices: multiple choice: sequences per row, where all rows have as many.
            autocast: dtype of mixed precision, `None` for none.
            label_smoothing: generation: as `token_losses` takes it, in training only.
            losses: ranking: names of `choices.LOSSES` whose sum is minimised.
            distill_weight: where a batch has a teacher: the share of its loss, in training only.
        """
        super().__init__()
        self.backbone = backbone  # no nn.Module, so nothing of it is registered here
        self.method = method
        self.head = head
        self.num_choices = num_choices
        self.autocast = autocast
        self.label_smoothing = label_smoothing
        self.losses = tuple(losses)
        self.distill_weight = distill_weight
        self.frozen_layers = 0
        """Layers, from the bottom, that run without dropout, with all that is in front of them and behind the last."""
        self._unreached: str | None = None
        """What is wrong with deltas that depend on no trained tensor; empty if nothing is, `None` before a look."""
        self.names = tuple(params)
        self.head_names = tuple(head_params)
        # Lists, because a module's parameter may not have a dot in its name and the methods' tensors do.
        self.params = nn.ParameterList([_parameter(t, backbone, method.trains(n)) for n, t in params.items()])
        self.head_params = nn.ParameterList([_parameter(t, backbone, True) for t in head_params.values()])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        targets: Tensor | None = None,
        states: Tensor | None = None,
        slots: Tensor | None = None,
        index: Tensor | None = None,
        teacher: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pieces: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits, and with targets the mean loss.

        Args:
            input_ids: int64 `[B, T]`; of a multiple choice the sequences of row after row.
            targets: as `heads.loss` takes them; generation as `token_losses` does.
            states: `[B, S, D]` of `frozen_outputs`, so that the frozen layers do not run.
            slots, decoder_input_ids: int64 `[B, S]` and `[B, U]`, as `Backbone.run` takes them; with the latter targets
                and `index` are of the decoder's tokens.
            index: ranking: int64 `[N, 6]`, the tokens of the choices, as `multitune.ranked.index_of` makes it;
                generation with a teacher: int64 `[N, K]`, the words that it speaks of.
            teacher: what is distilled, in training. Ranking: float32 `[R, choices]`, scores; generation: float32
                `[N, K + 1]` or `[N, V]`, log-probabilities as `likeliest_words` gives them.
            pieces: generation: int64 `[B, T]` as `Backbone.run` takes them; no text's first token is a target.

        Returns:
            `logits` `[R, C]`, multiple choice `[R, choices]`, tagging `[B, T, C]`; ranking the scores per token
            `[R, choices]`; `loss` scalar. Generation: `logits`
            `[B, T, V]` without targets, and with them `loss` alone, the mean over all tokens that count; in evaluation
            with a teacher also `distillation`, which is then the loss of training, while `loss` is that without one.
        """
        backbone, device = self.backbone, self.backbone.device
        given = (input_ids, attention_mask, token_type_ids, pieces)
        ids, mask, types, pieces = (None if t is None else t.to(device) for t in given)
        assert ids is not None
        with self.arithmetic():
            plan = self.plan(len(ids))
            if states is None:
                slots, written = (None if t is None else t.to(device) for t in (slots, decoder_input_ids))
                hidden = backbone.run(plan, ids, mask, types, slots, written, pieces)
            elif self.frozen_layers < backbone.num_layers:
                batch = Batch(input_ids=ids, attention_mask=mask, token_type_ids=types, pieces=pieces)
                hidden = backbone.run_above(plan, self.frozen_layers, states.to(device), batch)
            else:
                hidden, mask = states.to(device), None if self.keeps_one_state else mask
        return self.read(hidden, mask, targets, index, teacher)

    def arithmetic(self) -> torch.autocast:
        """The precision that the forward pass runs in."""
        return torch.autocast(self.backbone.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def plan(self, num_rows: int) -> Plan:
        """So many rows with the deltas that the tensors yield now, differentiably; call it within `arithmetic`."""
        backbone = self.backbone
        params = {name: p.to(backbone.dtype) if p.is_floating_point() else p for name, p in self.own().items()}
        yielded = self.method.deltas(params, backbone)
        if self._unreached is None and torch.is_grad_enabled():
            self._unreached = why_not_trainable(self.method, self.own(), yielded)
        return Plan([DeltaSet(yielded)] * num_rows)

    def read(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        targets: Tensor | None,
        index: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `forward` returns, from the backbone's last hidden states `[B, T, D]` and the mask `[B, T]`."""
        with self.arithmetic():
            if self.head.kind == "generation":
                return self._written(hidden, targets, index, teacher)
            if self.head.kind == "ranking":
                assert index is not None
                return self._ranked(hidden, targets, index, teacher)
            tensors = dict(zip(self.head_names, self.head_params, strict=True))
            logits = heads.logits(self.backbone, self.head, tensors, hidden, mask, self.training).float()
        if self.head.kind == "multiple_choice":
            logits = heads.by_row(logits.squeeze(-1), self.num_choices, targets)
        if targets is None:
            return {"logits": logits}
        return {"logits": logits, "loss": heads.loss(self.head, logits, targets.to(hidden.device))}

    def _written(
        self, hidden: Tensor, targets: Tensor | None, words: Tensor | None, teacher: Tensor | None
    ) -> dict[str, Tensor]:
        """`forward` for a task of generation, from `hidden [B, T, D]`."""
        head, device = self.backbone.lm_head, hidden.device
        if targets is None:
            return {"logits": head(hidden)}
        targets, smoothing = targets.to(device), self.label_smoothing if self.training else 0.0
        taught: dict[str, Tensor] = {}
        if words is not None and teacher is not None:
            said = words.to(device), teacher.to(device)
            away = distilled_losses(head, hidden, targets, *said, self.distill_weight, smoothing).mean()
            if self.training:
                return {"loss": away}
            taught = {"distillation": away}
        return {"loss": token_losses(head, hidden, targets, smoothing).mean()} | taught

    def _ranked(
        self, hidden: Tensor, targets: Tensor | None, index: Tensor, teacher: Tensor | None
    ) -> dict[str, Tensor]:
        """`forward` for rows whose answers are texts, from `hidden [B, T, D]`."""
        log_probs = choice_log_probs(self.backbone.token_head, hidden, index)
        candidates = Candidates.from_tokens(log_probs, index)
        scores = candidates.by_row(candidates.scores())
        if targets is None:
            return {"logits": scores}
        answers = targets.to(hidden.device)
        loss = torch.stack([LOSSES[name](candidates, answers) for name in self.losses]).sum()
        if teacher is not None and self.training:
            taught = distillation_loss(candidates, teacher.to(hidden.device))
            loss = self.distill_weight * taught + (1 - self.distill_weight) * loss
        return {"logits": scores, "loss": loss}

    @property
    def keeps_one_state(self) -> bool:
        """Whether `frozen_outputs` are one vector per sequence: no layer is trained and the head reads no more."""
        return self.frozen_layers == self.backbone.num_layers and self.head.kind not in _READ_TOKENS

    def frozen_outputs(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        """What the lowest `frozen_layers` give without dropout: what goes into the layer above them.

        Where all layers are frozen, what the head reads: the last hidden states, or what it pools of them.

        Returns:
            `[B, T', D]` as `Backbone.run_below` gives it; `[B, T, D]`, or `[B, 1, D]` where `keeps_one_state`.
        """
        backbone, device = self.backbone, self.backbone.device
        ids, mask, types = (None if t is None else t.to(device) for t in (input_ids, attention_mask, token_type_ids))
        assert ids is not None
        self.eval()
        plan = Plan([None] * len(ids))
        with torch.no_grad(), torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if self.frozen_layers < backbone.num_layers:
                batch = Batch(input_ids=ids, attention_mask=mask, token_type_ids=types)
                return backbone.run_below(plan, self.frozen_layers, batch)
            hidden = backbone.run(plan, ids, mask, types)
            if not self.keeps_one_state:
                return hidden
            # The pooler, which reads the first token, has no dropout and is the head's business.
            way = "cls" if self.head.pooling == "pooler" else self.head.pooling
            return heads.pool(backbone, hidden, mask, way).unsqueeze(1)

    def find_frozen_layers(self) -> tuple[int, str]:
        """How many layers lie below all that is trained, and where there are none, why."""
        backbone = self.backbone
        if backbone.decodes:
            return 0, f"a pass of backbone '{backbone.name}', an encoder and its decoder, is not cut in two"
        if self.method.changes_weights:
            found = first_trained(self.names, backbone)
        else:
            params = {name: p.detach() for name, p in self.own().items()}
            found = first_touched(DeltaSet(self.method.deltas(params, backbone)), backbone)
        if not found:
            return 0, f"method '{self.method.name}' trains something in the lowest layer or in front of it"
        paths = next(s.layers for s in backbone.sites if s.kind == "layers")
        if set(paths[:found]) & set(paths[found:]):
            return 0, f"layers of backbone '{backbone.name}' share their weights, so that none is frozen by itself"
        return found, ""

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off, the backbone's too, but for what `frozen_layers` says."""
        super().train(mode)
        if mode and self.frozen_layers:
            self.backbone.train_above(self.frozen_layers)
        else:
            self.backbone.model.train(mode)
        return self

    def own(self) -> dict[str, nn.Parameter]:
        """The method's tensors by name, in float32 or whole numbers."""
        return dict(zip(self.names, self.params, strict=True))

    def delta_set(self) -> DeltaSet:
        """The deltas as they are now, detached."""
        return DeltaSet(self._detached())

    def checked_delta_set(self) -> DeltaSet:
        """`delta_set`, or `ConfigError` where the method's deltas do not fit the backbone."""
        yielded = self._detached()
        check_deltas(self.method, yielded, self.backbone)
        return DeltaSet(yielded)

    def check_reached(self) -> None:
        """Raise `ConfigError` if the deltas of the passes so far depend on none of the method's trained tensors."""
        if self._unreached:
            raise ConfigError(self._unreached)

    def _detached(self) -> dict[str, list[Delta]]:
        return self.method.deltas({name: p.detach() for name, p in self.own().items()}, self.backbone)

    @property
    def num_trained(self) -> int:
        """Trained parameters without the head."""
        return sum(p.numel() for p in self.params if p.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in an adapter file; not copies."""
        own = {f"method.{n}": p.detach() for n, p in self.own().items()}
        return own | {f"head.{n}": p.detach() for n, p in zip(self.head_names, self.head_params, strict=True)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over values by the names of `tensors`."""
        with torch.no_grad():
            for name, own in self.tensors().items():
                own.copy_(tensors[name])

    def load_own(self, params: Mapping[str, Tensor]) -> None:
        """Take over values of the method's tensors."""
        with torch.no_grad():
            for name, own in self.own().items():
                own.copy_(params[name])

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all tensors, on the CPU."""
        return {name: t.to("cpu", copy=True) for name, t in self.tensors().items()}


def _parameter(t: Tensor, backbone: Backbone, trained: bool) -> nn.Parameter:
    if isinstance(t, nn.Parameter):
        return t
    dtype = torch.float32 if t.is_floating_point() else t.dtype
    return nn.Parameter(t.detach().to(backbone.device, dtype, copy=True), requires_grad=trained)
