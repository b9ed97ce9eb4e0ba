"""Shared by the tests of devices: a pretended GPU, which stands in a module of its own beside this file."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from pretended_gpu import PretendedGPU


@pytest.fixture
def gpu(monkeypatch):
    """While a test runs there is a GPU, if only a pretended one."""
    fakes = {
        "get_rng_state": lambda device: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda state, device: None,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 1,
        "current_stream": lambda device: SimpleNamespace(cuda_stream=0, synchronize=lambda: None),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
    with PretendedGPU() as pretended:
        yield pretended


@pytest.fixture
def on_gpu():
    """`on_gpu(backbone)`: the backbone, moved there as loading moves it."""

    def move(backbone):
        backbone.model.to("cuda")
        if backbone.lm_linear is not None:
            backbone.lm_linear.to("cuda")
        return backbone

    return move
