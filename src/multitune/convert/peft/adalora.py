"""AdaLoRA:  PEFT keeps `lora_A [R, I]`, `lora_E [R, 1]` and `lora_B [O, R]`, scaled by alpha / (initial rank + 1e-5).

A finished AdaLoRA of ours is written as LoRA, which computes the same and which every library can load.
"""

from __future__ import annotations

from torch import Tensor, nn

from multitune.convert.names import ModuleNames, product_of
from multitune.convert.peft.family import Family, Source, family, weight_of
from multitune.convert.peft.lora import check_lora_settings, check_pairs
from multitune.methods import Method
from multitune.methods.adalora import AdaLoRA

A, B, E = ".lora_A", ".lora_B", ".lora_E"

#: PEFT adds this to the rank by which it divides.
_EPSILON = 1e-5


@family
class AdaLoRAFamily(Family):
    """`peft_type` ADALORA: the triplets that are left, however many each module has."""

    peft_type = "ADALORA"
    methods = ()
    suffixes = (A, B, E)
    settings = frozenset(
        {
            "r", "init_r", "target_r", "lora_alpha", "lora_dropout", "rank_pattern", "fan_in_fan_out", "beta1", "beta2",
            "deltaT", "tinit", "tfinal", "total_step", "orth_reg_weight", "init_lora_weights", "bias",
            "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
        }
    )  # fmt: skip

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        check_lora_settings(source)
        check_pairs(source, source.by_module(A), source.by_module(B))
        check_pairs(source, source.by_module(A), source.by_module(E))
        first, second, third = (source.by_site(key) for key in (A, B, E))
        roles, layers = product_of(first, source.backbone, source.where)
        start = int(source.config["init_r"])
        common = AdaLoRA(
            r=start,
            target_r=min(start, int(source.config.get("target_r") or start)),
            alpha=float(source.config["lora_alpha"]),
            dropout=float(source.config.get("lora_dropout") or 0.0),
            targets=roles,
            layers=layers,
        )
        order = source.backbone.find_sites("linear", roles, layers)
        params: dict[str, Tensor] = {}
        for site in order:
            if first[site].shape[0]:
                params[f"{site.name}.A"] = first[site].T
                params[f"{site.name}.E"] = third[site].flatten() * (start / (start + _EPSILON))
                params[f"{site.name}.B"] = second[site].T
        ranks = {"ranks": tuple(first[site].shape[0] for site in order)}
        return AdaLoRA.from_settings(common.settings() | ranks), params

    def fold(self, source: Source, model: nn.Module) -> int:
        up, values = source.by_module(B), source.by_module(E)
        scale = float(source.config["lora_alpha"]) / (int(source.config["init_r"]) + _EPSILON)
        for name, down in source.by_module(A).items():
            weight = weight_of(model, ModuleNames(source.backbone).bare(name))
            weight += scale * (up[name].double() @ (down.double() * values[name].double()))
        return 0
