"""Continual learning by adding up sparse updates, read by class means (SoTU, Ning et al. 2024, arXiv 2411.02813).

Tasks come one after another. Each trains a sparse update of its own (`method="sotu"`) on the same frozen backbone;
the updates hardly overlap, so their sum serves all tasks at once. No head has to know all classes: a text gets the
class whose mean feature is nearest by cosine. The paper's equations could not be read; this form is ours.

Legend: R rows, D width, C classes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from multitune import heads
from multitune.adapter import Adapter
from multitune.backbone import Backbone
from multitune.batching import encode, pad
from multitune.deltas import SparseWeight
from multitune.errors import AdapterError, DataError
from multitune.files import replace_folder
from multitune.plan import DeltaSet, Plan
from multitune.pooling import Pooling
from multitune.tasks import Task

_FORMAT = 1
_CONFIG_FILE, _TENSOR_FILE = "prototypes.json", "prototypes.safetensors"


def sum_of_updates(backbone: Backbone, adapters: Sequence[Adapter], scale: float = 1.0) -> DeltaSet:
    """One set of deltas that adds the sparse updates of all adapters to the backbone, in any order alike.

    Args:
        scale: every update is multiplied by this.

    Raises:
        AdapterError: an adapter whose deltas are not all sparse updates; names it and its method.
        BackboneError: an adapter of another backbone.
    """
    parts: dict[str, list[SparseWeight]] = defaultdict(list)
    for adapter in adapters:
        for site, update in sparse_updates(backbone, adapter).items():
            parts[site].append(update)
    total = {site: [_add(updates, scale)] for site, updates in parts.items()}
    return DeltaSet(total).fused(backbone.dtype, backbone.device)


def sparse_updates(backbone: Backbone, adapter: Adapter) -> dict[str, SparseWeight]:
    """An adapter's sparse updates by site, on the CPU: a GPU adds up in another order each time.

    Raises:
        AdapterError: it has deltas of another kind.
        BackboneError: it belongs to another backbone.
    """
    adapter.check_backbone(backbone)
    found: dict[str, SparseWeight] = {}
    with torch.no_grad():
        params = {k: t.to(backbone.device) for k, t in adapter.params.items()}
        for site, deltas in adapter.method.deltas(params, backbone).items():
            for delta in deltas:
                if not isinstance(delta, SparseWeight) or site in found:
                    raise AdapterError(
                        f"adapter '{adapter.name}' ({adapter.method.title}) has a {delta.kind} at {site}, but only "
                        f"adapters made of one sparse update a site can be added up; train it with method='sotu'"
                    )
                found[site] = delta.map(Tensor.cpu)
    return found


def _add(updates: Sequence[SparseWeight], scale: float) -> SparseWeight:
    places = torch.cat([u.indices.long() for u in updates])
    values = torch.cat([u.values * u.scale for u in updates])
    unique, where = places.unique(return_inverse=True)
    summed = torch.zeros(len(unique), dtype=values.dtype).index_add_(0, where, values) * scale
    return SparseWeight(values=summed, indices=unique.int(), shape=updates[0].shape)


def cosine_of_updates(backbone: Backbone, one: Adapter, other: Adapter) -> float:
    """Cosine of two adapters' updates as vectors over all weights; 0 if one of them is zero.

    Raises:
        AdapterError: one of them has deltas that are no sparse updates.
        BackboneError: one of them belongs to another backbone.
    """
    left, right = sparse_updates(backbone, one), sparse_updates(backbone, other)
    product = sum(_dot(left[site], right[site]) for site in left.keys() & right.keys())
    norms = [
        sum(float((u.values.double() * u.scale).square().sum()) for u in side.values()) ** 0.5 for side in (left, right)
    ]
    return product / (norms[0] * norms[1]) if all(norms) else 0.0


def _dot(one: SparseWeight, other: SparseWeight) -> float:
    places = torch.cat([one.indices, other.indices]).unique()
    dense = [
        torch.zeros(len(places), dtype=torch.double).index_add_(
            0, torch.searchsorted(places, u.indices), u.values.double() * u.scale
        )
        for u in (one, other)
    ]
    return float(dense[0] @ dense[1])


def features(
    backbone: Backbone,
    deltas: DeltaSet | None,
    task: Task,
    table: Iterable[dict[str, Any]],
    *,
    pooling: Pooling = "mean",
    max_length: int = 128,
    batch_size: int = 32,
) -> tuple[Tensor, list[str]]:
    """Pooled hidden states of a table's rows, float32 `[R, D]` on the CPU, and the names of their classes.

    Args:
        deltas: what is applied to the backbone, `None` for nothing.
        task: a classification task.

    Raises:
        DataError: the task is of another kind, or a row does not fit it.
    """
    if task.kind != "classification":
        raise DataError(f"class means need a classification task, and '{task.name}' is of kind {task.kind}")
    examples = task.examples(table)
    encoded = encode(backbone, [e.texts[0] for e in examples], max_length=max_length, words=False)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    out = torch.empty(len(encoded), backbone.hidden_size)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = pad([encoded[i] for i in rows], backbone.pad_id).to(backbone.device)
        with torch.no_grad():
            plan = Plan([deltas] * len(rows))
            hidden = backbone.run(plan, batch.input_ids, batch.attention_mask, batch.token_type_ids)
            out[rows] = heads.pool(backbone, hidden, batch.attention_mask, pooling).float().cpu()
    targets: list[Any] = [e.target for e in examples]
    return out, [task.labels[t] for t in targets]


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Class means of features: `predict` gives the class whose mean is nearest by cosine."""

    labels: tuple[str, ...]
    """Names of the classes."""
    means: Tensor
    """float32 `[C, D]`"""

    @classmethod
    def of(cls, features: Tensor, labels: Sequence[str]) -> Prototypes:
        """The mean of `features [R, D]` for every class that `labels` (one a row) names.

        Raises:
            DataError: no rows, or not one label a row.
        """
        if not labels:
            raise DataError("there are no rows to take class means of; give at least one row per class")
        if features.ndim != 2 or len(features) != len(labels):
            shape = tuple(features.shape)
            raise DataError(f"features of shape {shape} do not go with {len(labels)} labels; give one label a row")
        names = tuple(dict.fromkeys(labels))
        number = torch.tensor([names.index(label) for label in labels])
        sums = torch.zeros(len(names), features.shape[1]).index_add_(0, number, features)
        return cls(names, sums / number.bincount()[:, None])

    def extended(self, other: Prototypes) -> Prototypes:
        """These classes and those of a later task.

        Raises:
            DataError: a class that both have, or features of another width.
        """
        self._check_width(other.means, "the later task's means")
        both = sorted(set(self.labels) & set(other.labels))
        if both:
            raise DataError(f"the classes {both} are there already; give the later task's classes other names")
        return Prototypes(self.labels + other.labels, torch.cat([self.means, other.means]))

    def predict(self, features: Tensor) -> list[str]:
        """The class of every row of `features [R, D]`.

        Raises:
            DataError: features of another width than the class means have.
        """
        self._check_width(features, "features")
        cosines = F.normalize(features, dim=1) @ F.normalize(self.means, dim=1).T
        return [self.labels[i] for i in cosines.argmax(1).tolist()]

    def save(self, path: str | Path) -> Path:
        """Write a folder of `prototypes.json`, the names, and `prototypes.safetensors`, the means; atomically.

        Raises:
            ConfigError: `path` is a file, or a folder that holds anything else.
        """
        folder = Path(path).absolute()

        def write(temporary: Path) -> None:
            text = json.dumps({"format": _FORMAT, "labels": self.labels}, indent=2, ensure_ascii=False) + "\n"
            (temporary / _CONFIG_FILE).write_text(text, "utf-8")
            save_file({"means": self.means.detach().cpu().contiguous()}, temporary / _TENSOR_FILE)

        replace_folder(folder, write, ours=(_CONFIG_FILE, _TENSOR_FILE))
        return folder

    @classmethod
    def load(cls, path: str | Path) -> Prototypes:
        """Read what `save` wrote.

        Raises:
            DataError: a file is missing, damaged or of another format, or names and means do not fit each other.
        """
        folder = Path(path)
        try:
            config = json.loads((folder / _CONFIG_FILE).read_text("utf-8"))
            tensors = load_file(folder / _TENSOR_FILE)
        except FileNotFoundError as error:
            raise DataError(f"{folder} holds no class means: {error.filename or error} is missing") from error
        except (ValueError, OSError, SafetensorError) as error:
            raise DataError(f"the class means in {folder} are damaged: {error}") from error
        if not isinstance(config, dict) or set(config) != {"format", "labels"} or config["format"] != _FORMAT:
            raise DataError(
                f"{folder / _CONFIG_FILE} is no list of classes of format {_FORMAT}; save them again: Prototypes.save"
            )
        labels, means = config["labels"], tensors.get("means")
        named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        if not named or len(set(labels)) != len(labels):
            raise DataError(f"{folder / _CONFIG_FILE}: its labels are not names that differ: {labels!r}")
        if set(tensors) != {"means"} or means is None or means.dtype != torch.float32 or means.ndim != 2:
            found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
            raise DataError(f"{folder / _TENSOR_FILE} holds {found} where one float32 'means' [C, D] is expected")
        if len(means) != len(labels):
            raise DataError(f"{folder} has {len(labels)} names for {len(means)} class means; it is damaged")
        return cls(tuple(labels), means)

    def _check_width(self, t: Tensor, what: str) -> None:
        width = self.means.shape[1]
        if t.ndim != 2 or t.shape[1] != width:
            raise DataError(
                f"{what} of shape {tuple(t.shape)} do not go with class means of {width} numbers; give [rows, {width}] "
                f"of the same backbone"
            )
