"""AdaLoRA (Zhang et al. 2023, eq. 3):  y + s · ((x A) ⊙ E) B, whose rank is pruned to a budget while it trains.

In the paper's names A is Qᵀ, E is the diagonal of Λ, B is Pᵀ (of the transposed map).   Legend: I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from multitune.deltas import Delta, LowRank
from multitune.methods.base import Method, Recipe, check, check_positive, check_probability
from multitune.methods.low_rank import LowRankMethod
from multitune.methods.registry import register
from multitune.methods.size import Size

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

_TRAINED = ("A", "E", "B")


@register
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRankMethod):
    """A singular value decomposition `A [I, R]`, `E [R]`, `B [R, O]` per site; E is zero and A, B are small at first.

    A triplet is one entry of E with its column of A and row of B. While it trains, triplets are scored by how much
    the loss depends on them, and only as many as the budget allows keep a non-zero E. The budget falls from r to
    target_r a site on average over the run. A finished adapter holds the kept triplets alone, `ranks` says how many.

    Shapes:
        Per chosen linear `A [I, R]`, `E [R]`, `B [R, O]`; `x [.., I]` adds `(alpha / r) · ((x A) ⊙ E) B [.., O]`. While
        training two scores of the same shape go with each. A finished adapter has its own R at every linear.
    Parameters:
        `R · (I + O + 1)` per chosen linear. RoBERTa-base, query and value: 442,656 in training at r=12, 295,104 left at
        8 each.
    Use it when:
        You have a budget of parameters and many targets, and do not know which layers need rank.
    Pitfalls:
        - The pruning is spread over the run: a longer run is another schedule, and few steps leave few prunings.
        - No step before the last pruning can be the result, so early stopping has only the last part of the run to
          choose from.
        - The scale stays `alpha / r` with the rank at the start, whatever rank is left.
        - Ranks differ between sites, so `r` says little about a finished adapter; `ranks` does.
    Published:
        Hugging Face PEFT's method comparison (Llama-3.2-3B trained on MetaMathQA, accuracy on GSM8K), every learning
        rate 1e-4: 37.3 with 18,353,664 parameters, LoRA r=32 47.8 with 9,175,040. No figure of Zhang et al. 2023 has
        been checked, so none stands here.
    """

    name: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2303.10512, eq. 3-12"
    size: ClassVar[Size | None] = Size(  # a third less at the end, the proportion of section 4.1
        fields=("r", "target_r"), settings=lambda n, *_: {"r": n, "target_r": 2 * n // 3}, least=2
    )
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=3e-3,
        source="not swept: LoRA's, from the sweep on small tasks (docs/results.md); released GLUE scripts use 8e-4 on "
        "SST-2",
    )

    r: int = 12
    """Triplets of each site at first."""
    target_r: int = 8
    """Triplets of each site at the end, on average."""
    initial_share: float = 0.1
    """Share of the run before the budget begins to fall."""
    final_share: float = 0.4
    """Share of the run, at its end, in which the kept triplets train on without any pruning."""
    interval: int = 10
    """Steps from one pruning to the next in between; a pruned triplet can come back until the last pruning."""
    beta1: float = 0.85
    """Decay of the moving average of the sensitivity."""
    beta2: float = 0.85
    """Decay of the moving average of its uncertainty."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps the columns of A and the rows of B orthonormal."""
    ranks: tuple[int, ...] | None = None
    """Triplets of each site of a finished adapter, in the order of the sites; none while it trains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "target_r", "interval")
        for name in ("initial_share", "final_share", "beta1", "beta2"):
            check_probability(self, name)
        check(self.target_r <= self.r, self, f"target_r={self.target_r} exceeds r={self.r}", "lower it or raise r")
        shares = self.initial_share + self.final_share
        check(shares <= 1, self, f"initial_share and final_share add up to {shares:g}", "leave some steps for pruning")
        check(self.orthogonality >= 0, self, f"orthogonality={self.orthogonality} rewards overlap", "give at least 0")
        check(self.ranks is None or min(self.ranks, default=0) >= 0, self, f"ranks={self.ranks}", "give none below 0")

    # ---------------------------------------------------------------- tensors

    def sites(self, backbone: Backbone) -> Iterable[Site]:
        """The sites that have a triplet left."""
        return [site for site, rank in self._rank_of(backbone).items() if rank]

    def _rank_of(self, backbone: Backbone) -> dict[Site, int]:
        sites = tuple(super().sites(backbone))
        ranks = (self.r,) * len(sites) if self.ranks is None else self.ranks
        check(
            len(ranks) == len(sites),
            self,
            f"ranks has {len(ranks)} entries for {len(sites)} sites",
            "give one for each, or none to start anew",
        )
        return dict(zip(sites, ranks, strict=True))

    def init_site(self, site: Site, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        rank = self._rank_of(backbone)[site]
        tensors = {
            "A": torch.randn(site.in_features, rank, generator=generator) * 0.02,  # as in the released code
            "E": torch.zeros(rank),
            "B": torch.randn(rank, site.out_features, generator=generator) * 0.02,
        }
        if self.ranks is None:
            for key in _TRAINED:
                tensors[f"{key}_sensitivity"] = torch.zeros_like(tensors[key])
                tensors[f"{key}_uncertainty"] = torch.zeros_like(tensors[key])
            tensors["kept"] = torch.ones(rank)
        return tensors

    def trains(self, name: str) -> bool:
        return name.rsplit(".", 1)[1] in _TRAINED

    def delta(self, params: Mapping[str, Tensor], site: Site, backbone: Backbone) -> Delta:
        return LowRank(A=params["A"] * params["E"], B=params["B"], scale=self.scale, dropout=self.dropout)

    # ---------------------------------------------------------------- training

    def penalty(self, params: Mapping[str, Tensor]) -> Tensor | None:
        """`‖AᵀA - 1‖` and `‖B Bᵀ - 1‖` (Frobenius), averaged over all matrices, times `orthogonality`.

        The paper's eq. 4 squares and sums them; the released code does this, and its weight is for this form.
        """
        if not self.orthogonality:
            return None
        grams = [t.T @ t for name, t in params.items() if name.endswith(".A")]
        grams += [t @ t.T for name, t in params.items() if name.endswith(".B")]
        norms = [torch.linalg.matrix_norm(g - torch.eye(len(g), dtype=g.dtype, device=g.device)) for g in grams]
        return self.orthogonality * torch.stack(norms).mean()

    def last_pruning(self, num_steps: int) -> int:
        """The step after which the kept triplets are final."""
        return max(1, num_steps - int(self.final_share * num_steps))

    def is_settled(self, step: int, num_steps: int) -> bool:
        return self.ranks is not None or step >= self.last_pruning(num_steps)

    def budget(self, step: int, num_steps: int, num_sites: int) -> int:
        """Triplets that may be left in all sites together after `step` (eq. 12)."""
        first, last = int(self.initial_share * num_steps), self.last_pruning(num_steps)
        if step >= last:
            return self.target_r * num_sites
        left = 1.0 if step <= first else 1 - (step - first) / (last - first)
        return int(num_sites * (self.target_r + (self.r - self.target_r) * left**3))

    def after_step(self, params: Mapping[str, Tensor], step: int, num_steps: int) -> None:
        """Score, and prune when it is time to. The scores are tensors of the run, so that they outlive a kill."""
        if self.ranks is not None:
            return
        sites = [name.removesuffix(".E") for name in params if name.endswith(".E")]
        last = self.last_pruning(num_steps)
        if step <= last:
            self._observe(params)
        if step == last or (step < last and step % self.interval == 0):
            _keep_best(params, sites, self.budget(step, num_steps, len(sites)))
        elif step > last:
            for site in sites:  # momentum moves what has no gradient
                params[f"{site}.E"].mul_(params[f"{site}.kept"])

    def _observe(self, params: Mapping[str, Tensor]) -> None:
        """Moving averages of the sensitivity |w · ∂L/∂w| (eq. 8 and 9) and of its deviation (eq. 10)."""
        for name, w in params.items():
            if self.trains(name) and w.grad is not None:
                sensitivity = (w * w.grad).abs()
                average, uncertainty = params[f"{name}_sensitivity"], params[f"{name}_uncertainty"]
                average.lerp_(sensitivity, 1 - self.beta1)
                uncertainty.lerp_((sensitivity - average).abs(), 1 - self.beta2)

    def finish(self, params: Mapping[str, Tensor], backbone: Backbone) -> tuple[Method, Mapping[str, Tensor]]:
        """The kept triplets alone, with the number of each site in `ranks`."""
        if self.ranks is not None:
            return self, params
        ranks: list[int] = []
        cut: dict[str, Tensor] = {}
        for site in self.sites(backbone):
            A, E, B = (params[f"{site.name}.{key}"] for key in _TRAINED)
            kept = (params[f"{site.name}.kept"] != 0) | (E != 0)
            ranks.append(int(kept.sum()))
            if ranks[-1]:
                cut |= {f"{site.name}.A": A[:, kept], f"{site.name}.E": E[kept], f"{site.name}.B": B[kept]}
        return replace(self, ranks=tuple(ranks)), cut

    def expected(self, backbone: Backbone) -> Method:
        """The final budget spread evenly; a run spreads it as it learns to."""
        if self.ranks is not None:
            return self
        return replace(self, ranks=(self.target_r,) * len(list(self.sites(backbone))))


def _keep_best(params: Mapping[str, Tensor], sites: list[str], budget: int) -> None:
    """Set E to zero for all but the `budget` triplets of the highest scores, over all sites (eq. 6)."""
    scores = [_scores(params, site) for site in sites]
    flat = torch.cat(scores)
    kept = torch.zeros_like(flat)
    kept[flat.argsort(descending=True, stable=True)[:budget]] = 1  # stable: a tie falls the same way in every run
    for site, mine in zip(sites, kept.split([len(s) for s in scores]), strict=True):
        params[f"{site}.kept"].copy_(mine)
        params[f"{site}.E"].mul_(mine)


def _scores(params: Mapping[str, Tensor], site: str) -> Tensor:
    """`[R]`: sensitivity times uncertainty (eq. 11), of E plus the means over the column of A and row of B (eq. 7)."""
    A, E, B = (params[f"{site}.{key}_sensitivity"] * params[f"{site}.{key}_uncertainty"] for key in _TRAINED)
    return E + A.mean(0) + B.mean(1)
