"""The files of a checkpoint of `adapters`: an adapter's, and its head's where one was saved with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from multitune.convert.tensors import read_tensors
from multitune.errors import AdapterError

CONFIG_FILE, TENSOR_FILE, PICKLE_FILE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG_FILE, HEAD_FILE = "head_config.json", "model_head.safetensors"
HEAD_PICKLE_FILE = "pytorch_model_head.bin"


@dataclass(frozen=True, kw_only=True)
class HeadCheckpoint:
    """A head as it is on disk."""

    file: Path
    config: Mapping[str, Any] | None
    """Its settings; `None` for the head of one of transformers' own models."""
    model_class: str
    """Class of the model that it was saved from."""
    name: str
    label_ids: Mapping[str, int]
    """Ids by label name; may be empty."""
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as it is on disk."""

    folder: Path
    name: str
    """What the adapter is called there; part of every tensor's name."""
    config: Mapping[str, Any]
    """Settings of its method."""
    version: str
    """Version of the library that wrote it."""
    tensors: Mapping[str, Tensor]


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} is damaged: it holds no settings")
    return config


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read an adapter. Nothing is ever unpickled.

    Raises:
        AdapterError: a file is missing or damaged, or the tensors are pickled; says how to convert them.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(
            f"{folder} is no checkpoint of adapters: it has no {CONFIG_FILE}. Give the folder that save_adapter wrote"
        )
    found = _read_config(file)
    if "peft_type" in found:
        raise AdapterError(f"{file} is of PEFT: it has a 'peft_type'. `--from peft` reads it")
    config, name = found.get("config"), found.get("name")
    if not isinstance(config, dict) or not isinstance(name, str):
        raise AdapterError(f"{file} is not of adapters: it lacks '{'name' if isinstance(config, dict) else 'config'}'")
    return Checkpoint(
        folder=folder,
        name=name,
        config=config,
        version=str(found.get("version", "")),
        tensors=read_tensors(folder / TENSOR_FILE, folder / PICKLE_FILE),
    )


def read_head_checkpoint(folder: Path) -> HeadCheckpoint | None:
    """Read the head in an adapter's folder; `None` where none was saved.

    Raises:
        AdapterError: as `read_checkpoint`.
    """
    file = folder / HEAD_CONFIG_FILE
    if not file.is_file():
        return None
    found = _read_config(file)
    own = found.get("config")
    labels = (own or {}).get("label2id") or found.get("label2id") or {}
    return HeadCheckpoint(
        file=file,
        config=own,
        model_class=str(found.get("model_class", "")),
        name=str(found.get("name")),
        label_ids={str(name): int(i) for name, i in labels.items()},
        tensors=read_tensors(folder / HEAD_FILE, folder / HEAD_PICKLE_FILE),
    )
