"""What a training run is told: a recipe, and what the command line says instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multitune.cli.options import LISTS, OPTIONS, OWN_DATA
from multitune.errors import ConfigError, suggest
from multitune.methods.combined import part_names
from multitune.training.config import ALSO_CALLED
from multitune.yaml_file import read_names, read_yaml


def chosen_options(recipe: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what the command line says instead, checked as far as that goes without loading anything."""
    flags = {key: value for key, value in options.items() if value is not None}
    if "set" in flags:
        flags["set"] = parse_settings(flags["set"])
    if "verbalizer" in flags:
        flags["verbalizer"] = _verbalizer(flags["verbalizer"])
    for key in LISTS:
        if key in flags:
            flags[key] = [name for each in flags[key] for name in read_names(each, key)]
    chosen = override(read_recipe(recipe) if recipe else {}, flags)
    for key, example in (("method", "lora"), ("out", "adapters/mine")):
        if key not in chosen:
            raise ConfigError(f"train needs --{key}, or '{key}' in the recipe; for example --{key} {example}")
    return chosen


def parse_settings(
    pairs: Sequence[str], option: str = "set", form: str = "NAME=VALUE", example: str = "r=16"
) -> dict[str, str]:
    """`["r=16"]` as a mapping; messages name the option that takes it."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--{option} takes {form}, such as --{option} {example}, not '{pair}'")
        found[key.strip()] = value.strip()
    return found


def read_method(given: Any) -> tuple[str, dict[str, Any]]:
    """A recipe's `method` as a name for `make_method` and the settings it brings.

    Args:
        given: a name, `lora+bitfit`, or a list of names, or of one-entry mappings of a name to its settings.
    """
    if not isinstance(given, list):
        return str(given), {}
    entries = [dict(e) if isinstance(e, Mapping) else {str(e): {}} for e in given]
    if not entries or any(len(e) != 1 or not isinstance(next(iter(e.values())), Mapping | None) for e in entries):
        raise ConfigError(
            f"'method' in the recipe is a name, or a list of names or of names with settings, such as "
            f"[lora: {{r: 4}}, bitfit], not {given!r}"
        )
    names = [str(name) for e in entries for name in e]
    own = [dict(settings or {}) for e in entries for settings in e.values()]
    if len(names) == 1:
        return names[0], own[0]
    by_part = zip(part_names(names), own, strict=True)
    return "+".join(names), {f"{part}.{key}": value for part, settings in by_part for key, value in settings.items()}


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose values may be mappings, `{lora: {r: 4}}`, as `{"lora.r": 4}`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def read_recipe(path: Path, known: Sequence[str] = tuple(OPTIONS)) -> dict[str, Any]:
    """The options in a YAML file, by name.

    Args:
        known: the keys it may have.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, a key that is no option, or a value of another form.
    """
    read = read_yaml(path, "recipe")
    if not isinstance(read, dict):
        raise ConfigError(f"recipe {path} is no mapping of options to values, such as 'method: lora'")
    named = {str(key).replace("-", "_"): value for key, value in read.items()}
    for key in named:
        if key not in known:
            keys = ", ".join(known)
            near = suggest(ALSO_CALLED.get(key, key), known)
            raise ConfigError(f"recipe {path} has the unknown key '{key}'.{near} Keys: {keys}")
    found = {key: value for key, value in named.items() if value is not None}
    check_forms(found)
    return found


def check_forms(options: Mapping[str, Any]) -> None:
    """See that a recipe's values have the form that is read later; what they say is checked where it is used.

    Raises:
        ConfigError: settings that are no mapping, `overwrite` that is no truth value, or rows that are no file's name.
    """
    if not isinstance(options.get("set", {}), Mapping):
        raise ConfigError(
            f"'set' in the recipe is a mapping of settings to values, such as {{r: 16}}, not {options['set']!r}"
        )
    if not isinstance(options.get("overwrite", False), bool):
        raise ConfigError(f"'overwrite' in the recipe is true or false, not {options['overwrite']!r}")
    for key in ("train", "validation"):
        if not isinstance(options.get(key, ""), (str, float) if key == "validation" else str):
            more = ", or the share of the rows to hold out, such as 0.3" if key == "validation" else ""
            raise ConfigError(
                f"'{key}' in the recipe is a file, a folder or a hub data set{more}, not {options[key]!r}"
            )


def override(recipe: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with what the command line says instead; another task or table there replaces the recipe's."""
    kept = dict(recipe)
    if "task" in flags or "mixture" in flags:
        kept = {k: v for k, v in kept.items() if k not in (*OWN_DATA, "task", "mixture")}
    if "train" in flags:
        kept = {k: v for k, v in kept.items() if k not in ("task", "mixture")}
    if isinstance(kept.get("set"), Mapping) and "set" in flags:
        flags = {**flags, "set": {**flat_settings(kept["set"]), **flags["set"]}}
    return {**kept, **flags}


def _verbalizer(pairs: Sequence[str]) -> dict[str, Any]:
    """`["good=great"]` as a mapping; a label that is there several times has a list of texts."""
    found: dict[str, Any] = {}
    for pair in pairs:
        ((label, text),) = parse_settings([pair], "verbalizer", "LABEL=TEXT", "entailment=True").items()
        found.setdefault(label, []).append(text)
    return {label: texts if len(texts) > 1 else texts[0] for label, texts in found.items()}
