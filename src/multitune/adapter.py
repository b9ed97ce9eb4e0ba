"""Adapters as files: what a training run leaves, in one folder.

`adapter.json` says what it is; `adapter.safetensors` holds the tensors; `table.safetensors`, if fused, the table
of token rows. Nothing is ever unpickled. Loading builds the expected names and shapes from the configuration
first and names every difference.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multitune import tables
from multitune.adapter_config import check_config
from multitune.deltas import TableRows, TokenBias, build_table, table_error
from multitune.errors import AdapterError, BackboneError, ConfigError, MultituneError, suggest, suggest_file
from multitune.files import left_aside, replace_file, replace_folder, sha256
from multitune.heads import Head
from multitune.layer_drop import without_layers
from multitune.methods import Method, make_method, method_names
from multitune.plan import DeltaSet
from multitune.tasks import Task
from multitune.version import __version__

if TYPE_CHECKING:
    from multitune.backbone import Backbone

FORMAT = 1
CONFIG_FILE = "adapter.json"
TENSOR_FILE = "adapter.safetensors"
UNFINISHED = "checkpoints/run.json"
"""What a training run writes first, and removes last."""

#: What an adapter's folder may hold: these two, a fused table, and what training leaves beside them.
FILES = (CONFIG_FILE, TENSOR_FILE, tables.TABLE_FILE, "history.json", "curve.png", "job.json")
_OF_THE_RUN = FILES[3:]
"""Of these, what the training run left that made the tensors."""

_MEND = f"Copy the folder again, or put back what was changed in {CONFIG_FILE}"
_KEYS = (
    "format", "multitune", "name", "method", "head", "task", "max_length", "backbone", "metrics", "recipe", "seed",
    "parameters", "tensors_sha256", "table",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One task's trained parameters, head and configuration."""

    name: str
    """What to call it."""
    method: Method
    """Method and hyper-parameters."""
    params: Mapping[str, Tensor]
    """The method's trained tensors, as `method.init` names and shapes them."""
    head: Head
    """Head configuration."""
    head_params: Mapping[str, Tensor]
    """The head's tensors, as `Head.shapes` names them."""
    task: Task
    """Columns, template, labels and metric."""
    backbone: Mapping[str, Any]
    """What `Backbone.describe` said of the backbone it was trained on."""
    max_length: int = 128
    """Tokens a text was cut to in training."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What it reached on the validation rows."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Every training setting."""
    seed: int = 0
    """Seed of the run."""
    version: str = __version__
    """Library version that wrote it."""
    path: Path | None = None
    """Where it was loaded from or saved to; absolute."""
    digest: str | None = None
    """sha256 of its file of tensors; `None` if it is not on disk."""
    table: Mapping[str, Any] | None = None
    """If fused: dtype and sha256 of the table of token rows, and how far its rows are from those computed."""

    @property
    def num_method_parameters(self) -> int:
        """Trained parameters without the head."""
        return sum(t.numel() for name, t in self.params.items() if self.method.trains(name))

    @property
    def num_head_parameters(self) -> int:
        """Trained parameters of the head."""
        return sum(t.numel() for t in self.head_params.values())

    # ---------------------------------------------------------------- use

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise `BackboneError` unless this adapter was trained on these weights, as far as fingerprints tell.

        A fingerprint is of every tensor's name and shape and of a few hundred of its values (`Backbone.fingerprint`):
        another training run shows, a change of single weights may not.
        """
        mine, theirs = self.backbone, backbone.describe()
        if mine["fingerprint"] != theirs["fingerprint"]:
            differing = [k for k in theirs if k != "fingerprint" and mine.get(k) != theirs[k]]
            details = ", ".join(f"{k} {mine.get(k)!r} there and {theirs[k]!r} here" for k in differing)
            fix = f"Load the backbone it names: Backbone.load({mine['name']!r}), or --backbone {mine['name']}"
            if _unquantized(mine) == _unquantized(theirs):
                fix = (
                    "The weights are the same but for their quantisation: Adapter.moved_to(backbone) takes the adapter "
                    f"over, after which it should be evaluated anew. {fix}"
                )
            elif mine["name"] == theirs["name"]:  # what goes by this name has changed, and loading it again is no help
                fix = "Load the backbone it was trained on, or train the adapter anew on this one"
            raise BackboneError(
                f"adapter '{self.name}' was trained on backbone '{mine['name']}' with fingerprint "
                f"{mine['fingerprint']}, not on '{theirs['name']}' with fingerprint {theirs['fingerprint']} "
                f"({details or 'same shape, other weights'}). {fix}"
            )

    def moved_to(self, backbone: Backbone) -> Adapter:
        """This adapter for a backbone of the same weights held otherwise: quantised, in another way, or not at all.

        Its answers change by what rounding the weights changes, so its metrics are left behind: `evaluate` it there.

        Returns:
            An adapter that is not on disk; `save` it.

        Raises:
            BackboneError: the backbones' weights differ in more than their quantisation.
            AdapterError: the adapter's tensors are the backbone's own weights.
        """
        theirs = backbone.describe()
        if _unquantized(self.backbone) != _unquantized(theirs):
            raise BackboneError(
                f"adapter '{self.name}' cannot be moved to backbone '{theirs['name']}': it was trained on "
                f"'{self.backbone['name']}', and the two have different weights before any quantisation"
            )
        if self.method.changes_weights:
            raise AdapterError(
                f"adapter '{self.name}' uses {self.method.title}: its tensors are weights of "
                f"'{self.backbone['name']}', which another backbone has no place for"
            )
        return replace(self, backbone=theirs, metrics={}, path=None, digest=None, table=None)

    def delta_set(self, backbone: Backbone, *, aot_store: str = "factors", drop_layers: Sequence[int] = ()) -> DeltaSet:
        """The deltas for serving: fused, in the backbone's dtype, on its device.

        Args:
            aot_store: where token rows come from: "factors" (computed per batch), "ram" or "mmap" (the fused table).
            drop_layers: layers in which the adapter is left out (AdapterDrop).

        Raises:
            AdapterError: a table is asked for that is not on disk, or not the one that was fused.
            BackboneError: the adapter belongs to another backbone.
            ConfigError: a layer that does not exist, or in which there is nothing to leave out.
        """
        self.check_backbone(backbone)
        with torch.no_grad():
            params = {k: t.to(backbone.device) for k, t in self.params.items()}
            deltas = self.method.deltas(params, backbone)
            if aot_store != "factors" and self.method.fuses_to_table:
                rows = self._table(backbone, verify=aot_store == "ram")
                if aot_store == "ram":
                    rows = rows.in_memory(backbone.device)
                deltas = {**deltas, "layers": [TokenBias(source=rows)]}
            if drop_layers:
                deltas = without_layers(deltas, drop_layers, backbone, self.name)
            return DeltaSet(deltas).fused(backbone.dtype, backbone.device)

    def _table(self, backbone: Backbone, verify: bool) -> TableRows:
        """The mapped table; `verify` reads all of it to compare the checksum, which a map is there to avoid."""
        if self.path is None or self.table is None:
            place = self.path or "ADAPTER"
            raise AdapterError(
                f"adapter '{self.name}' has no table of token rows on disk; run `multitune fuse {place}` first, "
                f"or use aot_store='factors'"
            )
        file = self.path / tables.TABLE_FILE
        rows = tables.map_table(file)
        expected = (backbone.vocab_size, backbone.num_layers, backbone.hidden_size)
        if tuple(rows.table.shape) != expected:
            problem = f"has shape {tuple(rows.table.shape)} where {expected} is expected"
        elif verify and sha256(file) != self.table["sha256"]:
            problem = "is not the file that was fused (its checksum differs)"
        else:
            return rows
        raise AdapterError(f"{file} {problem}. Run `multitune fuse {self.path}` again")

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> Adapter:
        """Write the adapter folder atomically and return the adapter with its path.

        Where the folder holds the same tensors already, such as when scores are added to a trained adapter, what the
        training run left beside them (`history.json`, `curve.png`) stays. A table is not carried over.

        Raises:
            ConfigError: the path is a file, or a folder that holds other files, which would be lost.
        """
        folder = Path(path).absolute()
        digests: list[str] = []

        def write(temporary: Path) -> None:
            digests.append(self.write_into(temporary))
            tensors = folder / TENSOR_FILE
            if tensors.exists() and sha256(tensors) == digests[0]:
                for file in (folder / name for name in _OF_THE_RUN if (folder / name).exists()):
                    shutil.copy2(file, temporary / file.name)

        replace_folder(folder, write, ours=FILES)
        return replace(self, path=folder, table=None, digest=digests[0])

    def write_into(self, folder: Path) -> str:
        """Write the adapter's two files into a folder that exists and may hold others, and return the tensors' sha256.

        Each file is replaced atomically, the tensors first.
        """
        tensors = {f"method.{k}": t.detach().cpu().contiguous() for k, t in self.params.items()}
        tensors |= {f"head.{k}": t.detach().cpu().contiguous() for k, t in self.head_params.items()}
        replace_file(folder / TENSOR_FILE, lambda temporary: save_file(tensors, temporary))
        digest = sha256(folder / TENSOR_FILE)
        text = json.dumps(self._config(digest, table=None), indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / CONFIG_FILE, lambda temporary: temporary.write_text(text, "utf-8"))
        return digest

    def fuse(self, backbone: Backbone, dtype: torch.dtype = torch.float32) -> Adapter:
        """Compute the table of token rows once and write it into the adapter's folder.

        Args:
            dtype: float32, bfloat16, float16, or int8: whole numbers with a scale per row, each value off by a 254th
                of its row's largest at most. What it costs stands in the result's `table`: `max_error`, the largest
                difference, and `relative_error`, the norm of all differences by the norm of all rows.

        Raises:
            AdapterError: the method has nothing to fuse, or the adapter is not on disk.
            ConfigError: another dtype.
        """
        if dtype not in tables.DTYPES.values():
            raise ConfigError(f"a table cannot have dtype {dtype}; choose {', '.join(tables.DTYPES)}")
        if not self.method.fuses_to_table:
            raise AdapterError(
                f"adapter '{self.name}' uses {self.method.title}, whose trained tensors are what is served: there is "
                f"nothing to fuse. `multitune merge` folds it into a checkpoint of its own where that is possible"
            )
        if self.path is None:
            raise AdapterError(f"adapter '{self.name}' is not on disk yet; save it first: adapter.save(FOLDER)")
        self.check_backbone(backbone)
        self._check_unchanged(sha256(self.path / TENSOR_FILE) if (self.path / TENSOR_FILE).exists() else None)
        (delta,) = self.method.deltas({k: t.to(backbone.device) for k, t in self.params.items()}, backbone)["layers"]
        assert isinstance(delta, TokenBias)
        file = self.path / tables.TABLE_FILE
        source = delta.source.served()
        rows = build_table(source, backbone.vocab_size, dtype)
        largest, relative = table_error(source, rows)
        tables.write_table(file, rows.table, rows.scale)
        table = {
            "dtype": str(dtype).removeprefix("torch."),
            "sha256": sha256(file),
            "max_error": largest,
            "relative_error": relative,
        }
        assert self.digest is not None
        config = self._config(self.digest, table)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        replace_file(self.path / CONFIG_FILE, lambda temporary: temporary.write_text(text, "utf-8"))
        return replace(self, table=table)

    def _config(self, digest: str, table: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "multitune": self.version,
            "name": self.name,
            "method": {"name": self.method.name, "settings": self.method.settings()},
            "head": self.head.settings(),
            "task": self.task.to_dict(),
            "max_length": self.max_length,
            "backbone": dict(self.backbone),
            "metrics": dict(self.metrics),
            "recipe": dict(self.recipe),
            "seed": self.seed,
            "parameters": {"method": self.num_method_parameters, "head": self.num_head_parameters},
            "tensors_sha256": digest,
            "table": None if table is None else dict(table),
        }

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | None = None) -> Adapter:
        """Read an adapter folder, strictly.

        Args:
            path: the folder.
            backbone: if given, the adapter must belong to it and its tensors must have exactly the expected
                names and shapes.

        Raises:
            AdapterError: a file is missing, damaged, of another format, holds a field of another type, a head that
                does not fit its task, or tensors that are not as expected; names the file and the field or tensor.
            BackboneError: the adapter belongs to another backbone.
        """
        folder = Path(path).absolute()
        config = _read_config(folder)
        try:
            check_config(config)
            adapter = cls(
                name=config["name"],
                method=make_method(config["method"]["name"], config["method"]["settings"]),
                params={},
                head=Head(**config["head"]),
                head_params={},
                task=Task.from_dict(config["task"]),
                backbone=config["backbone"],
                max_length=config["max_length"],
                metrics=config["metrics"],
                recipe=config["recipe"],
                seed=config["seed"],
                version=config["multitune"],
                path=folder,
                digest=config["tensors_sha256"],
                table=config["table"],
            )
            adapter.head.check_task(adapter.task)
        except (MultituneError, TypeError, KeyError) as error:
            mend = _unknown_method(config) or _MEND
            raise AdapterError(f"{folder / CONFIG_FILE}{_writer(config)}: {_ended(error)} {mend}") from error
        if backbone is not None:
            adapter.check_backbone(backbone)
        tensors = _read_tensors(folder / TENSOR_FILE, config["tensors_sha256"])
        params = {k.removeprefix("method."): t for k, t in tensors.items() if k.startswith("method.")}
        head_params = {k.removeprefix("head."): t for k, t in tensors.items() if k.startswith("head.")}
        adapter = replace(adapter, params=params, head_params=head_params)
        adapter._check_tensors(folder / TENSOR_FILE, tensors, backbone)
        return adapter

    def reload(self, backbone: Backbone) -> Adapter:
        """This adapter with its tensors read again from its folder.

        Raises:
            AdapterError: as `load`; or the folder holds another adapter by now.
        """
        assert self.path is not None
        fresh = Adapter.load(self.path, backbone)
        self._check_unchanged(fresh.digest if fresh.head == self.head else None)  # the same numbers in another unit
        return fresh

    def _check_unchanged(self, digest: str | None) -> None:
        if digest != self.digest:
            raise AdapterError(
                f"{self.path} was replaced since adapter '{self.name}' was loaded from it (its tensors differ); "
                f"load it again: Adapter.load({str(self.path)!r}), and in a bank remove and add it"
            )

    def _check_tensors(self, file: Path, tensors: Mapping[str, Tensor], backbone: Backbone | None) -> None:
        problems = [f"'{k}' holds values that are not finite" for k, t in tensors.items() if not _finite(t)]
        if backbone is not None:
            problems += self._differences(backbone, tensors)
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise AdapterError(f"{file} does not fit its configuration: {'; '.join(problems[:5])}{more}")

    def _expected(self, backbone: Backbone) -> dict[str, torch.Size]:
        shapes = {f"method.{k}": s for k, s in backbone.shapes_of(self.method).items()}
        return shapes | {f"head.{k}": s for k, s in self.head.shapes(backbone).items()}

    def _differences(self, backbone: Backbone, found: Mapping[str, Tensor]) -> list[str]:
        expected = self._expected(backbone)
        # Full fine-tuning saves the weights that changed; a head is whole in any case.
        needed = [k for k in expected if k.startswith("head.") or not self.method.changes_weights]
        problems = [f"'{k}' {tuple(expected[k])} is missing" for k in needed if k not in found]
        problems += [
            f"'{k}' {tuple(found[k].shape)} is not expected{suggest(k, expected)}" for k in found if k not in expected
        ]
        problems += [
            f"'{k}' has shape {tuple(found[k].shape)} where {tuple(expected[k])} is expected"
            for k in expected
            if k in found and found[k].shape != expected[k]
        ]
        return problems


def _unquantized(backbone: Mapping[str, Any]) -> str:
    """The fingerprint of a described backbone before it was quantised."""
    quantized = backbone.get("quantized")
    found: str = backbone["fingerprint"] if quantized is None else quantized["original"]
    return found


def _finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(torch.isfinite(t).all())


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.exists():
        if not folder.exists():
            old = left_aside(folder)
            if old is not None:
                raise AdapterError(
                    f"there is no folder {folder}: a process that was replacing it was killed, and what it held is in "
                    f"{old}. Take it back: mv {shlex.quote(str(old))} {shlex.quote(str(folder))}"
                )
            raise AdapterError(f"there is no folder {folder}.{suggest_file(folder)}")
        if (folder / UNFINISHED).exists():
            raise AdapterError(
                f"{folder} holds an unfinished training run and no adapter yet; give its train command again, which "
                f"goes on where it was"
            )
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
        hint = f" It holds the adapters {', '.join(inside)}: name one of those." if inside else ""
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}.{hint}")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file} is damaged: {_ended(error)} Copy the folder again") from error
    if not isinstance(config, dict) or "format" not in config:
        raise AdapterError(f"{file} is not a multitune adapter: it has no 'format'")
    if config["format"] != FORMAT:
        raise AdapterError(
            f"{file} has format {config['format']}, written by multitune {config.get('multitune')}; this is multitune "
            f"{__version__}, which reads format {FORMAT}. Install the version that wrote it or a later one"
        )
    missing, extra = [k for k in _KEYS if k not in config], [k for k in config if k not in _KEYS]
    if missing or extra:
        parts = {"missing": missing, "unknown": extra}
        said = ", ".join(f"{what} keys {', '.join(map(repr, keys))}" for what, keys in parts.items() if keys)
        raise AdapterError(f"{file}{_writer(config)}: {said}. {_MEND}")
    return config


def _writer(config: dict[str, Any]) -> str:
    """Which version wrote an adapter, where it is another one: what is wrong may then be no damage."""
    if config.get("multitune", __version__) == __version__:
        return ""
    return f" (written by multitune {config['multitune']}, this is {__version__})"


def _unknown_method(config: dict[str, Any]) -> str | None:
    """What to do about a method that is not registered, or `None` where that is not what is wrong."""
    named = config["method"].get("name") if isinstance(config["method"], dict) else None
    if not isinstance(named, str) or set(named.split("+")) <= set(method_names()):
        return None
    return (
        "If it is a method of your own, import the module that defines it first; for the command line register it by "
        "an entry point, as CONTRIBUTING.md says. If not, a version that has more methods wrote the folder, or it is "
        "damaged"
    )


def _ended(error: Exception) -> str:
    """A message as a sentence, for another to follow it."""
    said = str(error)
    return said if said.endswith((".", "?", "!")) else f"{said}."


def _read_tensors(file: Path, digest: str) -> dict[str, Tensor]:
    if not file.exists():
        raise AdapterError(f"{file} is missing: the adapter's tensors are lost; copy the folder again")
    try:
        with safe_open(file, framework="pt") as opened:
            # Copies: what `get_tensor` gives is a view of the mapped file, which one small tensor would keep in memory.
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged or truncated: {_ended(error)} Copy the folder again") from error
    if sha256(file) != digest:
        raise AdapterError(f"{file} is not the file that was saved (its checksum differs); copy the folder again")
    return tensors
