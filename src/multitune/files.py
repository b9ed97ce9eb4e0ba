"""Atomic writes: at every instant a path holds the old content or the whole new one.

Folders change places in one step where the system can do that (Linux and macOS, on their usual file systems). Elsewhere
two renames do it, and a kill between them leaves nothing half-written: what was there stands beside the path, under the
name that `left_aside` finds.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
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
        if not (path.exists() and _exchange(temporary, path)):
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.replace(old, path)
    _sync(path.parent)


def left_aside(path: Path) -> Path | None:
    """Where the content of a folder is that was being replaced when a process was killed; `None` if nowhere."""
    left = path.parent.glob(f".{glob.escape(path.name)}.????????.old") if not path.exists() else ()  # mkdtemp's eight
    return max(left, key=lambda place: place.stat().st_mtime, default=None)


#: What the system calls the exchange of two paths in one step, and the number by which it is asked for it:
#: https://man7.org/linux/man-pages/man2/rename.2.html (RENAME_EXCHANGE), and macOS's renameatx_np (RENAME_SWAP).
_EXCHANGES = {"linux": ("renameat2", 2), "darwin": ("renameatx_np", 2)}
_HERE = {"linux": -100, "darwin": -2}
"""AT_FDCWD: paths are as the process sees them."""
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders of one file system change places in one step; False where the system cannot."""
    name, flag = _EXCHANGES.get(sys.platform, ("", 0))
    exchange = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if exchange is None:
        return False
    here = _HERE[sys.platform]
    if exchange(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:  # an old kernel, or a file system such as NFS
        return False
    raise OSError(code, os.strerror(code), str(other))


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


def refusal_of_pickle(pickled: Path, file: Path) -> str:
    """What to say of tensors that are there as a pickle alone, with the command that makes the safetensors `file`."""
    return (
        f"{pickled} is a pickle, which can run code when it is opened. Where you trust it, convert it: "
        f'python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.clone() for k, v in torch.load('{pickled}', weights_only=True).items()}}, "
        f"'{file}', {{'format': 'pt'}})\""
    )
