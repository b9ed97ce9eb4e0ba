"""Module names of a backbone and its sites, both ways: `encoder.layer.3.attention.self.query` and `layer.3.query`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from multitune.errors import AdapterError, suggest
from multitune.sites import Site

if TYPE_CHECKING:
    from multitune.backbone import Backbone

T = TypeVar("T")

#: Kinds of site that stand for exactly one module with weights.
_KINDS = ("linear", "norm")


class ModuleNames:
    """Sites by the path of their module, as other libraries name them."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.prefix = str(backbone.model.base_model_prefix)
        """What a model with a task head puts in front of every path, such as `bert`."""
        self._sites: dict[str, list[Site]] = {}
        for site in backbone.sites:
            if site.kind in _KINDS:
                self._sites.setdefault(site.module, []).append(site)

    def bare(self, path: str) -> str:
        """A path without the prefix of a model with a task head."""
        return path.removeprefix(f"{self.prefix}.")

    def sites_of(self, path: str, what: str) -> list[Site]:
        """The sites of a module: one, or one for each part of a fused projection.

        Raises:
            AdapterError: a module that is no site of this backbone.
        """
        found = self._sites.get(self.bare(path))
        if found is None:
            near = suggest(self.bare(path), self._sites)
            paths = dict.fromkeys(self._generic(s) for sites in self._sites.values() for s in sites)
            raise AdapterError(
                f"{what} adapts the module '{path}', which is no site of backbone '{self.backbone.name}' "
                f"({self.backbone.model.config.model_type}).{near} Its sites (N is a layer): {', '.join(paths)}"
            )
        return found

    def sites(self, tensors: Mapping[str, T], what: str) -> dict[Site, T]:
        """Tensors by the site whose module each is named after; of a module that runs as several layers, all of them.

        Raises:
            AdapterError: a module that is no site of this backbone, or several maps at once.
        """
        found: dict[Site, T] = {}
        for path, tensor in tensors.items():
            sites = self.sites_of(path, what)
            if len({s.part for s in sites}) > 1:
                parts = ", ".join(s.role for s in sites)
                raise AdapterError(
                    f"{what} adapts the module '{path}', which computes {parts} at once; of such modules only LoRA can "
                    f"be taken over"
                )
            found |= dict.fromkeys(sites, tensor)
        return found

    @staticmethod
    def _generic(site: Site) -> str:
        return site.module if site.layer is None else site.module.replace(f".{site.layer}.", ".N.", 1)

    def target_modules(self, sites: Iterable[Site]) -> list[str]:
        """The shortest list of names that select exactly these sites, where a name selects every path it ends.

        One name for all layers where that selects nothing else; whole paths otherwise.
        """
        chosen = list(sites)
        every = [name for name, _ in self.backbone.model.named_modules()]
        names: list[str] = []
        for role in dict.fromkeys(s.role for s in chosen):
            mine = {s.module for s in chosen if s.role == role}
            short = {path.split(f".{s.layer}.", 1)[-1] for s in chosen if s.role == role for path in [s.module]}
            (common,) = short if len(short) == 1 else ("",)
            found = {path for path in every if common and (path == common or path.endswith(f".{common}"))}
            names += [common] if found == mine else sorted(mine)
        return names


def check_passes(params: Mapping[str, Tensor], backbone: Backbone, library: str) -> None:
    """Refuse tensors of their own for layers that share their weights: other libraries have one adapter for them all.

    Raises:
        AdapterError: two passes of one module differ.
    """
    first: dict[tuple[str, str, tuple[int, int] | None], str] = {}
    for site in backbone.sites:
        if not site.shared:
            continue
        other = first.setdefault((site.kind, site.module, site.part), site.name)
        mine, theirs = (
            {k.removeprefix(f"{name}."): t for k, t in params.items() if k.startswith(f"{name}.")}
            for name in (site.name, other)
        )
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[k], theirs[k]) for k in mine):
            raise AdapterError(
                f"{other} and {site.name} are passes of one module, which {library} adapts once, and this adapter has "
                f"tensors of their own for each"
            )


def part_of(whole: Tensor, site: Site) -> Tensor:
    """What belongs to a site of a tensor `[O, ...]` over all output features of its module."""
    if site.part is None:
        return whole
    rows = slice(*site.part)
    return whole[rows] if site.blocks == 1 else whole.unflatten(0, (site.blocks, -1))[:, rows].flatten(0, 1)


def whole_of(parts: Mapping[Site, Tensor]) -> Tensor:
    """The tensor `[O, ...]` over a module's output features from those of its parts; undoes `part_of`."""
    in_order = sorted(parts, key=lambda s: s.part or ())
    blocks = in_order[0].blocks
    return torch.cat([parts[s].unflatten(0, (blocks, -1)) for s in in_order], dim=1).flatten(0, 1)


def product_of(sites: Iterable[Site], backbone: Backbone, what: str) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """The roles and layers (`None`: all) whose combinations are exactly these sites.

    Raises:
        AdapterError: some layers have other roles than others; our methods adapt the same roles in every layer.
    """
    chosen = list(sites)
    roles = tuple(dict.fromkeys(s.role for s in backbone.sites if s in set(chosen)))
    layers = tuple(sorted({s.layer for s in chosen if s.layer is not None}))
    have = {(s.role, s.layer) for s in chosen}
    missing = [f"layer.{layer}.{role}" for layer in layers for role in roles if (role, layer) not in have]
    if missing:
        raise AdapterError(
            f"{what} adapts {len(chosen)} modules, but not {missing[0]}, whose role and whose layer are among theirs: "
            f"an adapter here has the same roles in every layer it adapts"
        )
    return roles, None if len(layers) == backbone.num_layers else layers
