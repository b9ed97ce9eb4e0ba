"""Tables of token rows on disk: one safetensors file with one tensor `[V, L, D]`, read by memory map."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from multitune.deltas import TableRows
from multitune.errors import AdapterError
from multitune.files import replace_file

TABLE_FILE = "table.safetensors"

_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_table(path: Path, table: Tensor) -> None:
    """Write a table `[V, L, D]` so that `path` holds either the old file or the whole new one."""
    replace_file(path, lambda temporary: save_file({"table": table.contiguous()}, temporary))


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
            entry = json.loads(file.read(header_length))["table"]
        shape, (start, stop), dtype = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
        if size != 8 + header_length + stop:
            raise ValueError(f"it has {size} bytes where its header promises {8 + header_length + stop}")
        raw = np.memmap(path, dtype=_NUMPY[dtype], mode="c", offset=8 + header_length + start, shape=shape)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise AdapterError(
            f"{path} is not a table of token rows: {error}. Run `multitune fuse {path.parent}` again"
        ) from error
    return TableRows(table=torch.from_numpy(raw).view(_TORCH[dtype]), mapped=True)
