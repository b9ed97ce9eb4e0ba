"""What a checkpoint of `adapters` computes, by that library, which usually has an environment of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from multitune.convert.adapterhub import reference
from multitune.convert.probe import Check, compare
from multitune.errors import ConfigError

if TYPE_CHECKING:
    from multitune.adapter import Adapter
    from multitune.backbone import Backbone

#: Why nothing was compared, and how to.
UNCHECKED = (
    "the library adapters is not installed here, and it needs an older transformers than this one. To compare, install "
    "it in an environment of its own (pip install adapters) and give that environment's Python: "
    "check_with=PYTHON (--check-with PYTHON)"
)


def check_adapterhub(
    adapter: Adapter, backbone: Backbone, folder: Path, *, head: bool, python: str | Path | None
) -> Check | None:
    """Compare an adapter with the checkpoint in a folder.

    Args:
        head: whether to compare logits; hidden states otherwise.
        python: the Python of an environment with the library; `None` for this one, if it has it.

    Returns:
        What was found; `None` where the library is not at hand.

    Raises:
        AdapterError: they do not compute the same.
        ConfigError: that Python does not run the library.
    """
    if python is None:
        try:
            importlib.metadata.version("adapters")  # a folder of that name is no library
        except importlib.metadata.PackageNotFoundError:
            return None
        python = sys.executable
    with tempfile.TemporaryDirectory() as temporary:
        job = Path(temporary)
        _write_job(job, backbone, folder, head)
        by: list[str] = []

        def theirs(ids: Tensor, mask: Tensor) -> Tensor:
            save_file({"input_ids": ids.cpu(), "attention_mask": mask.cpu()}, job / "rows.safetensors")
            _run(python, job)
            with safe_open(job / "outputs.safetensors", framework="pt") as opened:
                by.append(f"adapters {opened.metadata()['version']}")
            return load_file(job / "outputs.safetensors")["outputs"].to(ids.device)

        return compare(adapter, backbone, theirs, by=lambda: by[0], hidden=not head)


def _write_job(job: Path, backbone: Backbone, folder: Path, head: bool) -> None:
    bare = backbone.clone()
    bare.detach()
    bare.model.save_pretrained(job / "backbone")
    file = job / "backbone" / "config.json"
    file.write_text(json.dumps(_older(json.loads(file.read_text("utf-8")))), "utf-8")
    settings = {
        "backbone": str(job / "backbone"),
        "adapter": str(folder.resolve()),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "pad_id": backbone.pad_id,
        "head": head,
    }
    (job / "job.json").write_text(json.dumps(settings), "utf-8")


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as transformers 4 reads it, which keeps the settings of rotary positions in two places."""
    rotary = config.pop("rope_parameters", None)
    if rotary:
        config["rope_theta"] = rotary["rope_theta"]
        if rotary.get("rope_type", "default") != "default":
            config["rope_scaling"] = {k: v for k, v in rotary.items() if k != "rope_theta"}
    return config


def _run(python: str | Path, job: Path) -> None:
    """Run the library. It sees none of this process's paths, and no network."""
    command = [str(python), "-I", reference.__file__, str(job)]
    try:
        done = subprocess.run(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"check_with={str(python)!r} cannot be run: {error}; give a path such as env/bin/python"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ConfigError(
            f"check_with={str(python)!r} cannot run the checkpoint with the library adapters: {last}. Leave it out to "
            f"import without comparing, or repair that environment: pip install adapters"
        )
