"""LayerNorm tuning:  PEFT keeps whole trained norms, we keep what differs from the frozen ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from multitune.convert.names import ModuleNames
from multitune.convert.peft.family import Family, Source, Written, family
from multitune.errors import AdapterError
from multitune.methods import Method
from multitune.methods.layernorm import LayerNormTuning

if TYPE_CHECKING:
    from multitune.backbone import Backbone

GAIN, OFFSET = ".ln_tuning_layers.weight", ".ln_tuning_layers.bias"


@family
class LayerNormFamily(Family):
    """`peft_type` LN_TUNING."""

    peft_type = "LN_TUNING"
    methods = ("layernorm",)
    suffixes = (GAIN, OFFSET)
    settings = frozenset()

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        gains, offsets = source.by_site(GAIN), source.by_site(OFFSET)
        layers = tuple(sorted({s.layer for s in gains if s.layer is not None}))
        method = LayerNormTuning(
            layers=None if len(layers) == source.backbone.num_layers else layers,
            embedding_norm=any(s.role == "embedding_norm" for s in gains),
        )
        expected = set(method.sites(source.backbone))
        if set(gains) != expected:
            other = min(s.name for s in set(gains) ^ expected)
            raise AdapterError(
                f"{source.where}: its norms are not those that our LayerNorm tuning trains (all of a layer, and maybe "
                f"that of the embeddings): '{other}' is in one of the two only"
            )
        params = {f"{s.name}.gain": t - _frozen(source.backbone, s.module, "weight", t) for s, t in gains.items()}
        params |= {f"{s.name}.offset": t - _frozen(source.backbone, s.module, "bias", t) for s, t in offsets.items()}
        return method, params

    def write(self, method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
        assert isinstance(method, LayerNormTuning)
        sites = list(method.sites(backbone))
        tensors = {}
        for s in sites:
            for suffix, kind, name in ((GAIN, "weight", "gain"), (OFFSET, "bias", "offset")):
                if f"{s.name}.{name}" in params:
                    change = params[f"{s.name}.{name}"]
                    tensors[s.module + suffix] = change + _frozen(backbone, s.module, kind, change)
        return Written(config={"target_modules": ModuleNames(backbone).target_modules(sites)}, tensors=tensors)

    def fold(self, source: Source, model: nn.Module) -> int:
        for suffix, kind in ((GAIN, "weight"), (OFFSET, "bias")):
            for name, tensor in source.by_module(suffix).items():
                path = ModuleNames(source.backbone).bare(name)
                getattr(model.get_submodule(path), kind).data.copy_(tensor)
        return 0


def _frozen(backbone: Backbone, path: str, kind: str, like: Tensor) -> Tensor:
    """A parameter of a frozen norm in the dtype and on the device of `like`."""
    frozen: Tensor = getattr(backbone.model.get_submodule(path), kind)
    return frozen.detach().to(like)
