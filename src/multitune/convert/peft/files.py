"""A PEFT checkpoint's two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from multitune.convert.tensors import read_tensors
from multitune.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

#: What PEFT writes for every method and what changes nothing that an adapter computes, or is read elsewhere.
_COMMON = frozenset(
    {
        "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
        "peft_version", "modules_to_save", "target_modules", "exclude_modules",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A PEFT checkpoint as it is on disk."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, such as `LORA`."""
        return str(self.config["peft_type"])

    def refuse_unknown(self, honoured: frozenset[str]) -> None:
        """Raise `AdapterError` if a setting is on that is not among those that are honoured."""
        for key, value in self.config.items():
            if value and key not in _COMMON and key not in honoured:
                raise AdapterError(
                    f"{self.folder / CONFIG_FILE}: {key}={value!r} changes what the adapter computes in a way that is "
                    f"not supported here, so it is not imported"
                )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint. Nothing is ever unpickled.

    Raises:
        AdapterError: a file is missing or damaged, or the tensors are pickled; says how to convert them.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise AdapterError(
            f"{folder} is not a PEFT checkpoint: it has no {CONFIG_FILE}. Give the folder that save_pretrained wrote"
        )
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(
            f"{file} is not of PEFT: it has no 'peft_type'. `--from adapters` reads checkpoints of AdapterHub's library"
        )
    return Checkpoint(folder=folder, config=config, tensors=read_tensors(folder / TENSOR_FILE, folder / PICKLE_FILE))


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a folder that exists."""
    text = json.dumps(dict(sorted(config.items())), indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, "utf-8")
    # One buffer per tensor: safetensors refuses views that share memory.
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(copies, folder / TENSOR_FILE, metadata={"format": "pt"})
