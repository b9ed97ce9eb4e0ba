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

from multitune import AdapterError, files
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


def test_a_folder_is_replaced_whole(tmp_path):
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
