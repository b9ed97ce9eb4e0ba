"""What the fields of an `adapter.json` hold, checked before anything computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from multitune.errors import AdapterError

_WORDS = {str: "a text", int: "a whole number", float: "a number", dict: "a mapping", NoneType: "none"}

#: Field, dots between the levels; what it holds. Settings of methods, tasks and heads are checked by their classes.
_NEEDED: dict[str, tuple[type, ...]] = {
    "multitune": (str,),
    "name": (str,),
    "method": (dict,),
    "method.name": (str,),
    "method.settings": (dict,),
    "head": (dict,),
    "head.kind": (str,),
    "head.num_outputs": (int,),
    "task": (dict,),
    "max_length": (int,),
    "backbone": (dict,),
    "backbone.name": (str,),
    "backbone.architecture": (str,),
    "backbone.fingerprint": (str,),
    "metrics": (dict,),
    "recipe": (dict,),
    "seed": (int,),
    "parameters": (dict,),
    "tensors_sha256": (str,),
    "table": (dict, NoneType),
}
#: The same for what not every adapter has.
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "head.pooling": (str,),
    "head.dropout": (float,),
    "head.dense": (str,),
    "head.norm_eps": (float, NoneType),
    "head.target_mean": (float,),
    "head.target_std": (float,),
    "backbone.quantized": (dict, NoneType),
    "backbone.quantized.original": (str,),
    "table.dtype": (str,),
    "table.sha256": (str,),
    "table.max_error": (float,),
    "table.relative_error": (float,),
}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise `AdapterError`, which names the field, unless every field holds what adapters are written with."""
    for field, kinds in _NEEDED.items():
        above, key = _holder(config, field)
        if key not in above:
            raise AdapterError(f"'{field.rpartition('.')[0]}' does not say '{key}'")
        _check(field, above[key], kinds)
    for field, kinds in _OPTIONAL.items():
        above, key = _holder(config, field)
        if key in above:
            _check(field, above[key], kinds)
    for name, value in config["metrics"].items():
        _check(f"metrics.{name}", value, (float,))
    if config["table"] is not None and not {"dtype", "sha256"} <= config["table"].keys():
        raise AdapterError("'table' does not say 'dtype' and 'sha256'")
    if config["max_length"] < 1:
        raise AdapterError(f"'max_length' is {config['max_length']}, where at least 1 is expected")


def _holder(config: Mapping[str, Any], field: str) -> tuple[Mapping[str, Any], str]:
    """What holds a field, empty where there is no such thing, and what it is called there."""
    *above, key = field.split(".")
    for name in above:
        config = config.get(name) or {}
    return config, key


def _check(field: str, value: Any, kinds: tuple[type, ...]) -> None:
    accepted = (*kinds, int) if float in kinds else kinds
    if isinstance(value, bool) or not isinstance(value, accepted):
        words = " or ".join(_WORDS[kind] for kind in kinds)
        raise AdapterError(f"'{field}' is {value!r}, where {words} is expected")
