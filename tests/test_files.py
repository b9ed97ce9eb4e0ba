"""Atomic writes: a path holds the old content or the whole new one, whatever happens in between."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from multitune import Adapter, AdapterError, files
from multitune.files import replace_file, replace_folder, sha256
from multitune.tables import map_table, write_table


class Stop(Exception):
    pass


def content(folder):
    return {p.name: p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "deep" / "a"
    replace_file(file, lambda t: t.write_text("old"))
    replace_file(file, lambda t: t.write_text("new"))
    assert file.read_text() == "new"

    def half(temporary):
        temporary.write_text("ha")
        raise Stop

    with pytest.raises(Stop):
        replace_file(file, half)
    assert content(tmp_path) == {"a": "new"}


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:  # as on a file system that cannot
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    folder = tmp_path / "deep" / "a"

    def fill(**files):
        def write(temporary):
            for name, text in files.items():
                (temporary / name).write_text(text)

        return write

    replace_folder(folder, fill(one="1", two="2"))
    assert content(tmp_path) == {"one": "1", "two": "2"}
    replace_folder(folder, fill(one="3"))
    assert content(tmp_path) == {"one": "3"}
    assert folder.stat().st_mode & 0o777 == 0o755

    def half(temporary):
        fill(one="ha")(temporary)
        raise Stop

    with pytest.raises(Stop):
        replace_folder(folder, half)
    assert content(tmp_path) == {"one": "3"}
    with pytest.raises(Stop):
        replace_folder(tmp_path / "new", half)
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in folder.parent.iterdir()] == ["a"]


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    program = f"""
import pathlib, sys, types
package = types.ModuleType("multitune")  # the file alone: the package around it loads slowly
package.__path__ = [{str(Path(files.__file__).parent)!r}]
sys.modules["multitune"] = package
from multitune.files import replace_file
i = 0
while True:
    i += 1
    replace_file(pathlib.Path({str(tmp_path / "a")!r}), lambda t: t.write_text(str(i) * 200_000))
    if i == 1:
        print("ready", flush=True)
"""
    for delay in (0.0, 0.02, 0.05, 0.11):
        writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        text = (tmp_path / "a").read_text()
        number = text[: len(text) // 200_000]
        assert text == number * 200_000


def killed_between_renames(folder, more=""):
    """Replace a folder's content, in a process that is killed behind the first rename of its second save."""
    program = f"""
import os, pathlib, signal, sys, types
package = types.ModuleType("multitune")  # the file alone: the package around it loads slowly
package.__path__ = [{str(Path(files.__file__).parent)!r}]
sys.modules["multitune"] = package
from multitune import files
rename = os.replace
def renamed(*paths):
    rename(*paths)
    os.kill(os.getpid(), signal.SIGKILL)
folder = pathlib.Path({str(folder)!r})
files.replace_folder(folder, lambda t: (t / "a").write_text("old"))
os.replace = renamed
{more}
files.replace_folder(folder, lambda t: (t / "a").write_text("new"))
"""
    return subprocess.run([sys.executable, "-c", program], check=False).returncode


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="the system has no exchange of folders")
def test_a_folder_is_there_at_every_instant_of_its_replacement(tmp_path):
    assert killed_between_renames(tmp_path / "a") == 0  # one step: there is nothing to be killed between
    assert content(tmp_path / "a") == {"a": "new"} and files.left_aside(tmp_path / "a") is None


def test_what_a_kill_between_two_renames_left_is_named(tmp_path):
    folder = tmp_path / "it's [a]"
    assert killed_between_renames(folder, "files._exchange = lambda one, other: False") == -signal.SIGKILL
    assert not folder.exists()
    with pytest.raises(AdapterError, match="a process that was replacing it was killed") as error:
        Adapter.load(folder)
    subprocess.run(str(error.value).rpartition("Take it back: ")[2], shell=True, check=True)
    assert content(folder) == {"a": "old"}
    with pytest.raises(AdapterError, match="there is no folder .*/it's.$"):
        Adapter.load(tmp_path / "it's")


def test_sha256(tmp_path):
    data = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(data)
    assert sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_comes_back_mapped_and_to_the_bit(tmp_path, dtype):
    table = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_table(tmp_path / "t", table.transpose(0, 1).contiguous().transpose(0, 1))
    rows = map_table(tmp_path / "t")
    assert rows.mapped and rows.table.dtype == dtype
    assert torch.equal(rows.table, table)
    assert isinstance(np.asarray(rows.table.view(torch.int8)), np.ndarray)
    ids = torch.tensor([6, 0, 6])
    assert torch.equal(rows.rows(ids), table[ids])
    before = sha256(tmp_path / "t")
    rows.table.zero_()  # a private map: the file is safe even from a mistake
    assert sha256(tmp_path / "t") == before


@pytest.mark.parametrize("data", [b"", b"\x00" * 8, b"\xff" * 64, (10).to_bytes(8, "little") + b'{"a": {}} '])
def test_what_is_no_table_is_named(tmp_path, data):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(AdapterError, match=r"is not a table of token rows: .*multitune fuse"):
        map_table(tmp_path / "t")
    with pytest.raises(AdapterError, match=r"is not a table of token rows"):
        map_table(tmp_path / "nothing")
