"""DSEE (Chen et al. 2021):  ΔW = (alpha / r) · (U V + S₂), S₂ sparse; optionally attention heads are pruned meanwhile.

Legend: I in, O out, R rank, N entries of S₂, H heads, K head width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from multitune.deltas import Delta, InputScale, LowRank
from multitune.deltas.base import weight_of
from multitune.methods.base import Layers, Method, Recipe, check, check_positive
from multitune.methods.registry import register
from multitune.methods.sparse_update import largest_places, random_places, sparse_weight

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

TARGETS = ("query", "value")


@register
@dataclass(frozen=True, kw_only=True)
class DSEE(Method):
    """A low-rank and a sparse update of queries and values. `U [I, R]` is normal with std 0.02, `V [R, O]` and the
    values of S₂ are zero at first.

    The places of S₂ are where the pretrained weight is least like a low-rank matrix: it is split in a low-rank and a
    sparse part (GoDec), and the sparse part's places are taken; no training rows are needed. With `pruned_heads` the
    heads whose queries and values were updated least are shut in every layer at the step `prune_at`, and training
    goes on without them. A shut head is a mask of the adapter's own, so the adapter still mixes with every other; no
    arithmetic is saved by it here: nothing cuts the heads out, and merging writes zeros where the next map reads them.

    The unstructured mask S₁ of the paper, which zeroes single pretrained weights, is a backbone of its own, such as
    `minilm+pruned:0.3`, that all its tasks share (`multitune.prune`): as an update of one adapter it would take 8 bytes
    a masked weight, and more arithmetic instead of less. `multitune plan --method dsee --set pruned_heads=0.25` and
    `multitune.pruned.flops` count what either mask would save on kernels that make use of it.

    Shapes:
        Per query and value `U [I, R]`, `V [R, O]`, `values [N]`, all trained, and `indices [N]`, int32, places in the
        weight `[O, I]`; with `pruned_heads` per layer `heads [H]`, ones and zeros, not trained. `x [.., I]` adds
        `(alpha / r) · (x U V + x S₂ᵀ) [.., O]`.
    Parameters:
        `R · (I + O) + N` per query and value. RoBERTa-base: r=4, N=128 150,528; r=8, N=64 296,448; r=16, N=64 591,360.
    Use it when:
        LoRA misses a few large single changes, or you want to know which attention heads a task can do without.
    Pitfalls:
        - Shut heads are masked: nothing is faster, neither attached nor merged.
        - With `pruned_heads` no step before they are shut can be the result; every layer loses as many.
        - One path of the released code scales S₂ alone by alpha / r; here, as in the equation, the low-rank part too.
        - The places `residual` are found by decomposing every target, which takes a while on wide backbones.
    Published:
        Chen et al. 2021, abstract: BERT with 0.5 % of the parameters trained and about a quarter of the arithmetic
        saved at comparable quality (the first version: about 35 %, with less than 1 %). No figure of the tables could
        be verified.
    """

    name: ClassVar[str] = "dsee"
    title: ClassVar[str] = "DSEE"
    paper: ClassVar[str] = "Chen et al. 2021, arXiv 2111.00160; places: Zhou and Tao 2011 (GoDec)"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3, source="as LoRA with alpha / r = 8, not swept")

    r: int = 4
    """Rank of U V."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    num_sparse: int = 128
    """Entries of S₂ per weight."""
    support: Literal["residual", "magnitude", "random"] = "residual"
    """Where S₂ is: the largest entries of what a low-rank matrix leaves of W, of W itself, or anywhere."""
    pruned_heads: float = 0.0
    """Share of the attention heads of every layer that is shut during training; the paper's code shuts a quarter."""
    prune_at: float = 0.5
    """Share of the steps after which they are shut."""
    layers: Layers = None
    """Layers to adapt; none stands for all."""

    def __post_init__(self) -> None:
        check_positive(self, "r", "num_sparse")
        for name in ("pruned_heads", "prune_at"):
            value = getattr(self, name)
            check(0 <= value < 1, self, f"{name}={value} is not a share below 1", f"give 0 <= {name} < 1")

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for site in backbone.find_sites("linear", TARGETS, self.layers):
            size = site.in_features * site.out_features
            problem = f"num_sparse={self.num_sparse} is more than the {size} entries of {site.name}"
            check(self.num_sparse <= size, self, problem, f"give at most {size}")
            u = torch.randn(site.in_features, self.r, generator=generator) * 0.02
            tensors |= {f"{site.name}.U": u, f"{site.name}.V": torch.zeros(self.r, site.out_features)}
            tensors[f"{site.name}.values"] = torch.zeros(self.num_sparse)
            tensors[f"{site.name}.indices"] = self._places(site, backbone, generator)
        for site in self._outputs(backbone):
            tensors[f"{site.name}.heads"] = torch.ones(backbone.heads_at(site)[0])
        return tensors

    def _places(self, site: Site, backbone: Backbone, generator: torch.Generator) -> Tensor:
        if self.support == "random":
            return random_places(self.num_sparse, site.in_features * site.out_features, generator)
        weight = weight_of(backbone.frozen(site.name), "weight").detach().float().cpu()
        if self.support == "magnitude":
            return largest_places(weight.abs(), self.num_sparse)
        return sparse_part(weight, self.r, self.num_sparse, generator)

    def _outputs(self, backbone: Backbone) -> tuple[Site, ...]:
        """The sites that read the heads' outputs, side by side; none where no head is shut."""
        return backbone.find_sites("linear", ("attention_output",), self.layers) if self.pruned_heads else ()

    def trains(self, name: str) -> bool:
        return not name.endswith((".indices", ".heads"))

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        by_site: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in params.items():
            site_name, key = name.rsplit(".", 1)
            by_site[site_name][key] = tensor
        scale = self.alpha / self.r
        found: dict[str, list[Delta]] = {}
        for site in backbone.find_sites("linear", TARGETS, self.layers):
            own = by_site[site.name]
            found[site.name] = [LowRank(A=own["U"], B=own["V"], scale=scale), sparse_weight(own, site, scale)]
        for site in self._outputs(backbone):
            open_ = by_site[site.name]["heads"]
            found[site.name] = [InputScale(s=open_.repeat_interleave(site.in_features // len(open_)) - 1)]
        return found

    @property
    def loop_hooks(self) -> tuple[str, ...]:
        return super().loop_hooks if self.pruned_heads else ()  # without heads to shut there is nothing to do

    def after_step(self, params: Mapping[str, Tensor], step: int, num_steps: int) -> None:
        if self.pruned_heads and step == self._pruning_step(num_steps):
            for name, heads in params.items():
                if name.endswith(".heads"):
                    layer = name.removesuffix("attention_output.heads")
                    query = self._changes(params, f"{layer}query").view(len(heads), -1)
                    value = self._changes(params, f"{layer}value").view(-1, query.shape[1])
                    shared = len(heads) // len(value)  # query heads that read one value head
                    scores = query.sum(1) + value.sum(1).repeat_interleave(shared)
                    heads[scores.argsort(stable=True)[: int(self.pruned_heads * len(heads))]] = 0

    def is_settled(self, step: int, num_steps: int) -> bool:
        return not self.pruned_heads or step >= self._pruning_step(num_steps)

    def _pruning_step(self, num_steps: int) -> int:
        return max(1, round(self.prune_at * num_steps))

    def _changes(self, params: Mapping[str, Tensor], site: str) -> Tensor:
        """`[O]`: the sum of |ΔW| over each row of the weight, up to the scale."""
        update = (params[f"{site}.U"] @ params[f"{site}.V"]).T.contiguous()  # [O, I]
        update.view(-1).index_add_(0, params[f"{site}.indices"].long(), params[f"{site}.values"])
        return update.abs().sum(1)


def sparse_part(weight: Tensor, rank: int, count: int, generator: torch.Generator, rounds: int = 8) -> Tensor:
    """Places of the sparse part of `weight [O, I]` = low rank + sparse + rest, ascending, int32.

    GoDec: in turn the best low-rank matrix for what the sparse part leaves, and the `count` largest entries of what
    the low-rank matrix leaves.
    """
    weight = weight.contiguous()  # it may be a view of a part
    sparse = torch.zeros_like(weight)
    basis = torch.randn(weight.shape[1], min(rank, *weight.shape), generator=generator)
    places = torch.empty(0)
    for _ in range(rounds):
        rest = weight - sparse
        left = torch.linalg.qr(rest @ basis).Q  # one step of the power method per round, from the last round's space
        basis = torch.linalg.qr(rest.T @ left).Q
        residual = weight - (rest @ basis) @ basis.T
        places = largest_places(residual.abs(), count)
        sparse = torch.zeros_like(weight)
        sparse.view(-1)[places.long()] = residual.flatten()[places.long()]
    return places
