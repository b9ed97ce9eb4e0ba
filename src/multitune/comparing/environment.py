"""What a score may depend on beside the trial, and what its times do: machine, versions, threads, date."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from multitune.backbone import Backbone
from multitune.version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "optuna", "ray")


def environment(backbone: Backbone) -> dict[str, Any]:
    """As JSON values."""
    device = backbone.device
    found: dict[str, Any] = {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": {"multitune": __version__} | {name: v for name in _PACKAGES if (v := _version(name))},
        "date": datetime.now(UTC).date().isoformat(),
    }
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
