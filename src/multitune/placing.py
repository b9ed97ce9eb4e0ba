"""Where a model's weights are, and in which dtype."""

from __future__ import annotations

import torch
from torch import nn


def place(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
    """Move a model to a device, and its weights to a dtype, in place.

    Buffers that no checkpoint holds keep theirs. Rotary frequencies are among them, which transformers keeps in float32
    in models of every dtype: rounded to bfloat16 they turn a token at position 1000 too far by up to a radian.
    """
    model.to(device)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
