"""What a family of PEFT methods is, and the registry of the families; one file each in this folder."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from multitune.convert.names import ModuleNames
from multitune.convert.peft.files import Checkpoint
from multitune.errors import AdapterError, suggest
from multitune.methods import Method
from multitune.sites import Site

if TYPE_CHECKING:
    from multitune.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a family reads: a checkpoint's own tensors, the head's left out."""

    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]
    """By their path in the model without a task head's prefix; a prompt's by the name PEFT gives it."""
    backbone: Backbone

    @property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's settings."""
        return self.checkpoint.config

    @property
    def where(self) -> str:
        """What messages call the checkpoint."""
        return str(self.checkpoint.folder)

    def by_module(self, suffix: str) -> dict[str, Tensor]:
        """Tensors whose name ends in `suffix`, by the path of their module."""
        return {k.removesuffix(suffix): t for k, t in self.tensors.items() if k.endswith(suffix)}

    def by_site(self, suffix: str) -> dict[Site, Tensor]:
        """The same, by site; raises `AdapterError` for a module that is no site."""
        return ModuleNames(self.backbone).sites(self.by_module(suffix), self.where)


@dataclass(frozen=True, kw_only=True)
class Written:
    """An adapter in PEFT's form."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    """By path in the model without a task head; a prompt's by the name PEFT gives it."""
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that belong to no module, by the name PEFT gives them."""


class Family:
    """Methods that PEFT keeps under one `peft_type`."""

    peft_type: ClassVar[str]
    """PEFT's name."""
    methods: ClassVar[tuple[str, ...]]
    """Names of our methods that it exports."""
    settings: ClassVar[frozenset[str]]
    """Settings of PEFT's that it reads, or that change nothing an adapter computes."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Ends of the names of its tensors."""
    prompt: ClassVar[bool] = False
    """Whether it is what PEFT calls prompt learning: one tensor, and no wrapper around the model's modules."""

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        """Our method and its tensors.

        Raises:
            AdapterError: something that our method cannot express; names it.
        """
        raise NotImplementedError

    def write(self, method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
        """Settings and tensors in PEFT's form.

        Raises:
            AdapterError: something that PEFT cannot express; names it.
        """
        raise NotImplementedError

    def fold(self, source: Source, model: nn.Module) -> int | None:
        """Change a plain float64 base model by PEFT's formulas, independent of our method.

        Returns:
            How many vectors to put in front of the word embeddings beside that; they are `prompt_embeddings`. `None`,
            with the model left as it is, where the method is no change of weights: the default.
        """
        return None

    def owns(self, name: str) -> bool:
        """Whether a tensor of a checkpoint is this family's."""
        return name.endswith(self.suffixes) if self.suffixes else name == "prompt_embeddings"


_FAMILIES: dict[str, Family] = {}


def family(cls: type[Family]) -> type[Family]:
    """Register a family; a decorator."""
    assert cls.peft_type not in _FAMILIES, f"two families for {cls.peft_type}"
    _FAMILIES[cls.peft_type] = cls()
    return cls


@cache
def families() -> dict[str, Family]:
    """Every family by PEFT's name."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_FAMILIES.items()))


def family_of_type(peft_type: str, where: str) -> Family:
    """The family of a checkpoint.

    Raises:
        AdapterError: PEFT has this method and we do not.
    """
    known = families()
    if peft_type not in known:
        raise AdapterError(
            f"{where}: the PEFT method '{peft_type}' cannot be imported.{suggest(peft_type, known)} "
            f"What can: {', '.join(known)}"
        )
    return known[peft_type]


def family_of_method(method: Method) -> Family:
    """The family that writes one of our methods.

    Raises:
        AdapterError: PEFT has no such method, or none that computes the same.
    """
    for one in families().values():
        if method.name in one.methods:
            return one
    can = sorted({name for one in families().values() for name in one.methods})
    raise AdapterError(
        f"method '{method.name}' ({method.title}) has no counterpart in PEFT that computes the same. "
        f"What can be exported: {', '.join(can)}"
    )


def weight_of(model: nn.Module, path: str) -> Tensor:
    """The weight of a module of a plain model, `[O, I]` for every linear map; writing to it changes the model."""
    module = model.get_submodule(path)
    weight = module.weight
    assert isinstance(weight, Tensor) and weight.dtype == torch.float64
    return weight.data.T if isinstance(module, Conv1D) else weight.data
