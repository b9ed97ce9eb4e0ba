"""Every exception that multitune raises for its user, in one small tree:

    MultituneError (a ValueError)
    ├── ConfigError     a setting that is unknown, out of range, or at odds with another
    ├── DataError       a file, table, row or label that cannot be used
    ├── TaskError       a task, template or metric that is malformed or unknown
    ├── BackboneError   a model that is not supported, or not the one an adapter was trained on
    ├── AdapterError    an adapter that is damaged, of another format, or not loaded
    ├── MixError        tasks or methods that cannot share one batch
    └── PlanError       a plan that does not fit the batch or the bank it is applied to

`DataWarning` (a UserWarning) is the one warning: rows that can be used, but are hardly meant as they are.

A message carries what was asked, what exists, the nearest match, and the line that fixes it. Our own bugs
are assertions, never one of these.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


class MultituneError(ValueError):
    """Root of the tree; catch it to catch every error that multitune raises for its user."""


class ConfigError(MultituneError):
    """A setting is unknown, out of range, or at odds with another."""


class DataError(MultituneError):
    """A file, table, row or label cannot be used."""


class TaskError(MultituneError):
    """A task, template or metric is malformed or unknown."""


class BackboneError(MultituneError):
    """A model is not supported, or is not the one an adapter was trained on."""


class AdapterError(MultituneError):
    """An adapter is damaged, of another format, or not loaded."""


class MixError(MultituneError):
    """Tasks or methods cannot share one batch."""


class PlanError(MultituneError):
    """A plan does not fit the batch or the bank it is applied to."""


class DataWarning(UserWarning):
    """Rows that can be used, but are hardly meant as they are."""


def suggest(asked: str, exist: Iterable[str]) -> str:
    """The end of an error message: " Did you mean 'x'?", or "" when nothing in `exist` is near `asked`.

    Case is ignored in the comparison; the name comes back as it is spelled in `exist`.
    """
    spelled = {name.lower(): name for name in exist}
    near = difflib.get_close_matches(asked.lower(), spelled, n=1)
    return f" Did you mean {spelled[near[0]]!r}?" if near else ""


def suggest_file(asked: Path) -> str:
    """`suggest` among what stands beside a path that does not exist.

    The ending, which all files of a kind share, brings none of them nearer.
    """
    beside = sorted(p.name for p in asked.parent.iterdir()) if asked.parent.is_dir() else []
    stems = difflib.get_close_matches(asked.stem.lower(), {Path(name).stem.lower() for name in beside}, cutoff=0.7)
    return suggest(asked.name, [name for name in beside if Path(name).stem.lower() in stems])
