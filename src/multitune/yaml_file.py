"""Reading a file of YAML that somebody wrote by hand, and what its values may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from multitune.errors import ConfigError, suggest_file


def read_yaml(path: Path, what: str) -> Any:
    """The values in a file.

    Args:
        what: what messages call it, such as "recipe".

    Raises:
        ConfigError: it is not there, which names the nearest, cannot be read, or is not YAML.
    """
    if not path.exists():
        raise ConfigError(f"there is no {what} {path}.{suggest_file(path)}")
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} {path} is not YAML: {error}") from error


def read_names(given: Any, what: str) -> list[str]:
    """Labels or columns: a list of them, or a text with commas between them, where it is no template.

    Args:
        given: the value in the file.
        what: what messages call it, such as "'labels' in the recipe".

    Raises:
        ConfigError: neither, or a list that does not hold texts or whole numbers.
    """
    if isinstance(given, str):
        return [given] if "{" in given else [name.strip() for name in given.split(",")]
    if not isinstance(given, list):
        raise ConfigError(f"{what} is a list of names, such as [a, b], not {given!r}")
    for name in given:
        if isinstance(name, bool) or not isinstance(name, (str, int)):  # what YAML makes of yes, no, true and false
            raise ConfigError(f"{what}: {name!r} is no name; put quotes around it")
    return list(map(str, given))
