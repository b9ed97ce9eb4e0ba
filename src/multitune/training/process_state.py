"""What transformers and accelerate change for the whole process, put back as it was."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def globals_kept() -> Iterator[None]:
    """Undo what transformers and accelerate change for the whole process."""
    verbosity = transformers_logging.get_verbosity()
    python, numpy = random.getstate(), np.random.get_state()
    shared = [(cls, dict(cls._shared_state)) for cls in (AcceleratorState, GradientState, PartialState)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        transformers_logging.set_verbosity(verbosity)
        for cls, before in shared:
            cls._shared_state.clear()
            cls._shared_state.update(before)
