"""multitune: one frozen backbone, every tuning method, any mix of tasks in one batch.

A public name is imported when it is first used; exports.py says where each is defined.
"""

from typing import Any

from multitune import exports as _exports
from multitune.version import __version__ as __version__


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return list(_exports.homes())
    return globals().setdefault(name, _exports.find(name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_exports.homes()})
