"""Training: one adapter for one task, on transformers' Trainer, with checkpoints that survive a kill; or many together.

from multitune.training import train, evaluate
result = train(Backbone.load("minilm"), load_task("demo/sentiment"), "lora", "adapters/sentiment")

A name is imported when it is first used, so that the settings can be read without the Trainer, which takes seconds to
load; exports.py says where each is defined.
"""

import importlib
from typing import Any

from multitune.exports import homes_in

_HOMES = homes_in(__name__)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return list(_HOMES)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(_HOMES[name]), name))
