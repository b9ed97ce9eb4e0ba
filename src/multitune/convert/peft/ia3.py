"""(IA)³:  PEFT keeps the factors `ia3_l`, `[O, 1]` of outputs, `[1, I]` of inputs; we their difference from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from multitune.convert.names import ModuleNames, product_of
from multitune.convert.peft.family import Family, Source, Written, family, weight_of
from multitune.errors import AdapterError
from multitune.methods import Method
from multitune.methods.ia3 import IA3

if TYPE_CHECKING:
    from multitune.backbone import Backbone

FACTOR = ".ia3_l"


@family
class IA3Family(Family):
    """`peft_type` IA3."""

    peft_type = "IA3"
    methods = ("ia3",)
    suffixes = (FACTOR,)
    settings = frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        factors = source.by_site(FACTOR)
        _, layers = product_of(factors, source.backbone, source.where)
        inputs = {s.role for s, t in factors.items() if t.shape[0] == 1}
        outputs = {s.role for s, t in factors.items() if t.shape[0] != 1}
        if inputs & outputs:
            raise AdapterError(
                f"{source.where}: feedforward_modules={source.config.get('feedforward_modules')!r} rescales the input "
                f"of '{min(inputs & outputs)}' in some layers and its output in others; ours does one of the two"
            )
        roles = dict.fromkeys(s.role for s in factors)
        first, second = (tuple(r for r in roles if r in some) for some in (outputs, inputs))
        method = IA3(outputs=first, inputs=second, layers=layers)
        return method, {f"{s.name}.s": t.flatten() - 1 for s, t in factors.items()}

    def write(self, method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
        assert isinstance(method, IA3)
        sites, names = list(method.sites(backbone)), ModuleNames(backbone)
        inputs = [s for s in sites if s.role in method.inputs]
        outputs = [s for s in sites if s.role in method.outputs]
        feedforward = names.target_modules(inputs)
        config = {"target_modules": names.target_modules(outputs) + feedforward, "feedforward_modules": feedforward}
        tensors = {s.module + FACTOR: 1 + params[f"{s.name}.s"][:, None] for s in outputs}
        tensors |= {s.module + FACTOR: 1 + params[f"{s.name}.s"][None] for s in inputs}
        return Written(config=config, tensors=tensors)

    def fold(self, source: Source, model: nn.Module) -> int:
        for name, factor in source.by_module(FACTOR).items():
            path = ModuleNames(source.backbone).bare(name)
            weight = weight_of(model, path)
            bias = model.get_submodule(path).bias
            weight *= factor.double()  # [O, 1] scales rows, [1, I] columns
            if factor.shape[0] != 1 and isinstance(bias, torch.Tensor):
                bias.data *= factor.flatten().double()
        return 0
