"""Checkpoints of an unfinished run: safetensors and JSON only, each folder whole or absent.

OUTPUT/checkpoints/run.json              the settings that a resumed run must share
OUTPUT/checkpoints/step-00000012/        tensors, optimizer, random state; scheduler and history
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multitune.errors import AdapterError, ConfigError
from multitune.files import replace_file, replace_folder, sha256

FOLDER = "checkpoints"
RUN_FILE = "run.json"
TENSOR_FILE = "state.safetensors"
STATE_FILE = "state.json"
TRAINER_FILE = "trainer_state.json"

_MISSING = "(nothing)"


class Checkpoints:
    """The checkpoints of one run, in one folder: the last one and the best one."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / FOLDER

    def open(self, settings: Mapping[str, Any], *, restart: bool) -> None:
        """Prepare the folder for a run of these settings, new or resumed.

        Args:
            settings: JSON values, flat; what must be equal for a resumed run to end where this one would.
            restart: throw away an unfinished run of other settings, and checkpoints kept of a finished one.

        Raises:
            ConfigError: the folder holds an unfinished run of other settings; names them.
        """
        run = self._read_run()
        if run is not None:
            differing = differences(run["settings"], settings)
            if not differing and not run["finished"]:
                for stray in self.folder.glob(".*"):  # left by a kill while a checkpoint was written
                    shutil.rmtree(stray, ignore_errors=True)
                return
            if differing and not restart:
                raise ConfigError(
                    f"{self.folder.parent} holds an unfinished run with other settings: {'; '.join(differing)}. Train "
                    f"with those settings to resume it, give another output_dir (--out), or overwrite=True "
                    f"(--overwrite) to start anew"
                )
        self._remove()
        self._write_run(settings, finished=False)

    def finish(self, *, keep: bool) -> None:
        """Note that the run has ended, and remove the folder unless `keep`."""
        run = self._read_run()
        if keep and run is not None:
            self._write_run(run["settings"], finished=True)
        else:
            self._remove()

    def _remove(self) -> None:
        # First what makes the rest a run: a kill in between must not leave half a checkpoint that looks whole.
        (self.folder / RUN_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of one step."""
        return self.folder / f"step-{step:08d}"

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        return sorted(int(p.name.removeprefix("step-")) for p in self.folder.glob("step-*"))

    def save(self, step: int, best_step: int | None, tensors: Mapping[str, Tensor], state: Any, trainer: Any) -> None:
        """Write one checkpoint, then remove all but it and the best."""

        def write(temporary: Path) -> None:
            save_file({k: t.contiguous() for k, t in tensors.items()}, temporary / TENSOR_FILE)
            whole = {**state, "tensors_sha256": sha256(temporary / TENSOR_FILE)}
            (temporary / STATE_FILE).write_text(json.dumps(whole), "utf-8")
            trainer.save_to_json(str(temporary / TRAINER_FILE))

        replace_folder(self.path(step), write)
        for other in self.steps:
            if other not in (step, best_step):
                shutil.rmtree(self.path(other), ignore_errors=True)

    def load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and state of one checkpoint.

        Raises:
            AdapterError: a file is missing or damaged.
        """
        fix = f"remove {path} to resume from the checkpoint before it, or {self.folder} to start anew"
        try:
            state = json.loads((path / STATE_FILE).read_text("utf-8"))
            with safe_open(path / TENSOR_FILE, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, ValueError, SafetensorError) as error:
            raise AdapterError(f"checkpoint {path} is damaged: {error}; {fix}") from error
        if sha256(path / TENSOR_FILE) != state.get("tensors_sha256"):
            raise AdapterError(f"checkpoint {path / TENSOR_FILE} is not the file that was saved; {fix}")
        return tensors, state

    def _read_run(self) -> dict[str, Any] | None:
        file = self.folder / RUN_FILE
        if not file.exists():
            return None
        try:
            run: dict[str, Any] = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise AdapterError(f"{file} is damaged: {error}; remove {self.folder} to start anew") from error
        return run

    def _write_run(self, settings: Mapping[str, Any], *, finished: bool) -> None:
        text = json.dumps({"finished": finished, "settings": dict(settings)}, indent=2) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self.folder / RUN_FILE, lambda temporary: temporary.write_text(text, "utf-8"))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings in which two runs differ, in words."""
    here = json.loads(json.dumps(here))
    return [
        f"{key} is {there.get(key, _MISSING)!r} there and {here.get(key, _MISSING)!r} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key, _MISSING) != here.get(key, _MISSING)
    ]


def random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every global random state that training draws from, as tensors and as JSON values."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy = [kind, np.asarray(keys).tolist(), position, has_gauss, cached]
    return tensors, {"python": [version, list(words), gauss], "numpy": numpy}


def set_random_state(device: torch.device, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Undo what has been drawn since `random_state`."""
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
