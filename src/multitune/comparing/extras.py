"""Packages that only some comparisons need."""

from __future__ import annotations

import importlib
from typing import Any

from multitune.errors import ConfigError


def require(package: str, extra: str, what: str) -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed; gives the line that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(
            f"{what} needs {package}, which is not installed: pip install 'multitune[{extra}]'"
        ) from error
