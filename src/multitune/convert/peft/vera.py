"""VeRA:  `vera_lambda_b [O]` and `vera_lambda_d [R]` per module, around `vera_A [R, I]` and `vera_B [O, R]` for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from multitune.convert.names import ModuleNames, product_of
from multitune.convert.peft.family import Family, Source, Written, family, weight_of
from multitune.convert.peft.lora import check_lora_settings, check_pairs
from multitune.errors import AdapterError
from multitune.methods import Method
from multitune.methods.vera import VeRA, random_matrices

if TYPE_CHECKING:
    from multitune.backbone import Backbone

LAMBDA_B, LAMBDA_D = ".vera_lambda_b", ".vera_lambda_d"


@family
class VeRAFamily(Family):
    """`peft_type` VERA. The random matrices are made from `projection_prng_key` and not kept in our adapter."""

    peft_type = "VERA"
    methods = ("vera",)
    suffixes = (LAMBDA_B, LAMBDA_D)
    settings = frozenset(
        {
            "r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out", "bias",
            "init_weights", "layers_to_transform", "layers_pattern",
        }
    )  # fmt: skip

    def owns(self, name: str) -> bool:
        return name in ("vera_A", "vera_B") or super().owns(name)

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        check_lora_settings(source)
        check_pairs(source, source.by_module(LAMBDA_B), source.by_module(LAMBDA_D))
        b, d = source.by_site(LAMBDA_B), source.by_site(LAMBDA_D)
        roles, layers = product_of(b, source.backbone, source.where)
        method = VeRA(
            r=int(source.config["r"]),
            seed=int(source.config.get("projection_prng_key") or 0),
            d_initial=float(source.config.get("d_initial", 0.1)),
            dropout=float(source.config.get("vera_dropout") or 0.0),
            targets=roles,
            layers=layers,
        )
        self._check_matrices(source, method)
        params = {f"{s.name}.b": t for s, t in b.items()} | {f"{s.name}.d": t for s, t in d.items()}
        return method, params

    def _check_matrices(self, source: Source, method: VeRA) -> None:
        """Raise `AdapterError` where the checkpoint holds other matrices than those its seed gives."""
        down, up = _matrices(method, source.backbone)
        for name, ours in (("vera_A", down.T), ("vera_B", up.T)):
            theirs = source.tensors.get(name)
            if theirs is not None and not (theirs.shape == ours.shape and torch.allclose(theirs.float(), ours)):
                raise AdapterError(
                    f"{source.where}: its '{name}' {tuple(theirs.shape)} is not the random matrix "
                    f"{tuple(ours.shape)} that projection_prng_key={method.seed} gives for these modules, and our VeRA "
                    f"keeps the seed alone"
                )

    def write(self, method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
        assert isinstance(method, VeRA)
        sites = list(method.sites(backbone))
        fused = [s for s in sites if s.part is not None]
        if fused:
            raise AdapterError(
                f"'{fused[0].name}' is a part of the module '{fused[0].module}', which PEFT adapts whole"
            )
        config = {
            "r": method.r,
            "projection_prng_key": method.seed,
            "save_projection": True,
            "vera_dropout": method.dropout,
            "d_initial": method.d_initial,
            "target_modules": ModuleNames(backbone).target_modules(sites),
            "fan_in_fan_out": any(s.transposed for s in sites),
            "bias": "none",
        }
        down, up = _matrices(method, backbone)
        tensors = {s.module + LAMBDA_B: params[f"{s.name}.b"] for s in sites}
        tensors |= {s.module + LAMBDA_D: params[f"{s.name}.d"] for s in sites}
        return Written(config=config, tensors=tensors, whole={"vera_A": down.T, "vera_B": up.T})

    def fold(self, source: Source, model: nn.Module) -> int:
        d = source.by_module(LAMBDA_D)
        down, up = source.tensors.get("vera_A"), source.tensors.get("vera_B")
        if down is None or up is None:
            method, _ = self.read(source)
            assert isinstance(method, VeRA)
            down, up = (t.T for t in _matrices(method, source.backbone))
        for name, b in source.by_module(LAMBDA_B).items():
            weight = weight_of(model, ModuleNames(source.backbone).bare(name))
            num_out, num_in = weight.shape
            inner = d[name].double()[:, None] * down.double()[:, :num_in]
            weight += b.double()[:, None] * (up.double()[:num_out] @ inner)
        return 0


def _matrices(method: VeRA, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """The random `A [I, R]` and `B [R, O]`, float32 on the CPU."""
    sites = backbone.find_sites("linear", method.targets)
    widths = max(s.in_features for s in sites), max(s.out_features for s in sites)
    return random_matrices(method.seed, method.r, *widths, torch.float32, torch.device("cpu"))
