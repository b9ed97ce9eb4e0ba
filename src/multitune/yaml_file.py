"""Reading a file of YAML that somebody wrote by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from multitune.errors import ConfigError


def read_yaml(path: Path, what: str) -> Any:
    """The values in a file.

    Args:
        what: what messages call it, such as "recipe".

    Raises:
        ConfigError: it cannot be read, or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} {path} is not YAML: {error}") from error
