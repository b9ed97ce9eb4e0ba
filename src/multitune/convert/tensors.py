"""A checkpoint's file of tensors: safetensors are read, pickles never."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from multitune.errors import AdapterError
from multitune.files import refusal_of_pickle


def read_tensors(file: Path, pickled: Path) -> dict[str, Tensor]:
    """The tensors of `file`.

    Args:
        pickled: where the same library writes a pickle instead.

    Raises:
        AdapterError: the file is missing or damaged, or there is only the pickle; says how to convert it.
    """
    if not file.is_file() and pickled.is_file():
        raise AdapterError(refusal_of_pickle(pickled, file))
    if not file.is_file():
        raise AdapterError(f"{file} is missing: the checkpoint's tensors are lost")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is damaged or truncated: {error}; copy it again") from error
