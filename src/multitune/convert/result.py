"""What reading another library's checkpoint yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multitune.convert.probe import Check
from multitune.heads import Head
from multitune.methods import Method

if TYPE_CHECKING:
    from multitune.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A checkpoint in our form, before it belongs to a task."""

    method: Method
    params: Mapping[str, Tensor]
    """As `method.init` names and shapes them, float32."""
    head: tuple[Head, dict[str, Tensor]] | None
    """Its head, if it holds one."""
    labels: tuple[str, ...] = ()
    """Names of the head's outputs, where the checkpoint has them."""
    origin: Mapping[str, Any]
    """Where it came from, for the adapter's recipe."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An adapter taken over from another library."""

    adapter: Adapter
    """The adapter, saved if a folder was given."""
    head: str
    """Where its head is from: `checkpoint`; `fresh` for a random one that has yet to be trained; or `none`, where the
    checkpoint has none and the adapter embeds texts."""
    check: Check | None
    """How far its outputs are from those of the checkpoint; `None` where nothing can compute them here."""
    unchecked: str = ""
    """Where they were not compared: why, and how to."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An adapter written in another library's format."""

    path: Path
    """Folder of the checkpoint."""
    task: str
    """The other library's name of the task it was written for."""
    head: str
    """Where its head is: `checkpoint`; `beside` for a file of its own, where transformers has no head like it; or
    `none`, where the adapter has none."""
    check: Check | None
    """How far the outputs are apart; `None` where nothing can compute the checkpoint's here."""
    unchecked: str = ""
    """Where they were not compared: why, and how to."""
