"""Tables of token rows on disk: one safetensors file with one tensor `[V, L, D]`, read by memory map."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from multitune.deltas import TableRows
from multitune.errors import AdapterError
from multitune.files import replace_file

TABLE_FILE = "table.safetensors"

_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.int16, "I8": np.int8}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}

#: Number types that a table can have.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def write_table(path: Path, table: Tensor, scale: Tensor | None = None) -> None:
    """Write a table `[V, L, D]`, and the scale `[V, L, 1]` of one in int8, as `path`: the old file or the whole new."""
    tensors = {"table": table} if scale is None else {"table": table, "scale": scale}
    replace_file(path, lambda temporary: save_file({k: t.contiguous() for k, t in tensors.items()}, temporary))


def map_table(path: Path) -> TableRows:
    """The table in `path`, memory-mapped: nothing is read until a row is asked for.

    Raises:
        AdapterError: the file is missing, truncated, or no table.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            if header_length > min(size, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(header_length))
        entries = {name: header[name] for name in ("table", "scale") if name == "table" or name in header}
        promised = 8 + header_length + max(entry["data_offsets"][1] for entry in entries.values())
        if size != promised:
            raise ValueError(f"it has {size} bytes where its header promises {promised}")
        found = {name: _map(path, entry, 8 + header_length) for name, entry in entries.items()}
        if ("scale" in found) != (found["table"].dtype == torch.int8):
            raise ValueError("a table in int8 has a scale, and no other has one")
        if "scale" in found and found["scale"].shape != (*found["table"].shape[:-1], 1):
            raise ValueError(f"its scale has shape {tuple(found['scale'].shape)}")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise AdapterError(
            f"{path} is not a table of token rows: {error}. Run `multitune fuse {path.parent}` again"
        ) from error
    return TableRows(table=found["table"], scale=found.get("scale"), mapped=True)


def _map(path: Path, entry: dict[str, Any], first: int) -> Tensor:
    dtype, start = entry["dtype"], entry["data_offsets"][0]
    raw = np.memmap(path, dtype=_NUMPY[dtype], mode="c", offset=first + start, shape=tuple(entry["shape"]))
    return torch.from_numpy(raw).view(_TORCH[dtype])
