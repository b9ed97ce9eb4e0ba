"""What is trained: a method's tensors and a head, around a backbone that stays outside the module tree.

Legend: B sequences, T tokens, C outputs, R rows (a multiple-choice row has several sequences).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from multitune import heads
from multitune.backbone import Backbone
from multitune.heads import Head
from multitune.methods import Method
from multitune.plan import DeltaSet, Plan


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
    ) -> None:
        """
        Args:
            params: the method's tensors by name; those that `method.trains` are float32. A tensor that is a parameter
                already (full fine-tuning: one of the backbone's own) is trained in place.
            num_choices: multiple choice: sequences per row.
            autocast: dtype of mixed precision, `None` for none.
        """
        super().__init__()
        self.backbone = backbone  # no nn.Module, so nothing of it is registered here
        self.method = method
        self.head = head
        self.num_choices = num_choices
        self.autocast = autocast
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
    ) -> dict[str, Tensor]:
        """Logits, and with targets the mean loss.

        Args:
            input_ids: int64 `[B, T]`; B is R times the number of choices.
            targets: as `heads.loss` takes them.

        Returns:
            `logits` `[R, C]`, multiple choice `[R, choices]`, tagging `[B, T, C]`; `loss` scalar.
        """
        backbone, device = self.backbone, self.backbone.device
        ids, mask, types = (None if t is None else t.to(device) for t in (input_ids, attention_mask, token_type_ids))
        assert ids is not None
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            params = {name: p.to(backbone.dtype) if p.is_floating_point() else p for name, p in self.own().items()}
            delta_set = DeltaSet(self.method.deltas(params, backbone))
            hidden = backbone.run(Plan([delta_set] * len(ids)), ids, mask, types)
            tensors = dict(zip(self.head_names, self.head_params, strict=True))
            logits = heads.logits(backbone, self.head, tensors, hidden, mask, self.training).float()
        if self.head.kind == "multiple_choice":
            logits = logits.view(-1, self.num_choices)
        if targets is None:
            return {"logits": logits}
        return {"logits": logits, "loss": heads.loss(self.head, logits, targets.to(device))}

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off, the backbone's too."""
        super().train(mode)
        self.backbone.model.train(mode)
        return self

    def own(self) -> dict[str, nn.Parameter]:
        """The method's tensors by name, in float32 or whole numbers."""
        return dict(zip(self.names, self.params, strict=True))

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
