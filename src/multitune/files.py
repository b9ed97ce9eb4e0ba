"""Atomic writes: at every instant a path holds the old content or the whole new one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from multitune.errors import ConfigError

# The only way to read the mask is to set it, which must not happen while other threads create files.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        _share(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def replace_folder(path: Path, write: Callable[[Path], object], *, ours: Iterable[str] | None = None) -> None:
    """Let `write` fill a temporary folder beside `path`, then move it into place, replacing what is there.

    Args:
        ours: names of the files that may be replaced; `None` replaces whatever is there.

    Raises:
        ConfigError: `path` is a file, or a folder that holds anything else.
    """
    if path.is_file():
        raise ConfigError(f"{path} is a file; give a folder")
    inside = [p.name for p in path.iterdir()] if path.exists() and ours is not None else []
    foreign = sorted(set(inside) - set(ours or ()))
    if foreign:
        raise ConfigError(
            f"{path} holds other files ({', '.join(foreign[:3])}), which would be lost; give a new folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        temporary.chmod(0o777 & ~_UMASK)
        write(temporary)
        for file in temporary.iterdir():
            if file.is_file():
                _share(file)
                _sync(file)
        if path.exists():
            # A folder cannot be exchanged in one step everywhere; a kill between these two lines leaves the old
            # content under a name that starts with a dot, and nothing half-written under `path`.
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.replace(old, path)
    _sync(path.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _share(path: Path) -> None:
    """Give a file the mode of an ordinary new one: temporary files are private, and a server must read these."""
    path.chmod(0o666 & ~_UMASK)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
