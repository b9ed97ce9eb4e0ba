"""The demo, quickly, end to end."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from multitune import ConfigError
from multitune.cli import app
from multitune.demo import LESSONS, TOLERANCE, DemoResult, DemoRow, run_demo


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder, stdout and stderr of `multitune demo --quick`."""
    out = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    return out, result.stdout, result.stderr


def test_the_lessons_are_eight_methods_and_all_demo_tasks() -> None:
    assert len({lesson.method for lesson in LESSONS}) == len(LESSONS) == 8
    assert {lesson.task for lesson in LESSONS} == {
        *("sentiment", "topic", "intent", "acceptability", "paraphrase", "urgency")
    }


def test_it_prints_both_tables_within_100_columns(printed: tuple[Path, str, str]) -> None:
    _, out, err = printed
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    for lesson in LESSONS:
        mine = [line for line in lines if f" {lesson.method} " in line and lesson.task in line]
        assert len(mine) == 3, "its line in the first table, and two rows in the second"
    assert sum("embedding" in line for line in lines) == 1
    notes = err.splitlines()
    # The scores that choose the epoch, and those of the table: each line says which rows it is about.
    assert sum(note.endswith(", both on the training rows") for note in notes) == len(LESSONS)
    assert sum(" on held-out rows, " in note for note in notes) == len(LESSONS)
    assert err.count("\n") == 2 * len(LESSONS) + 2, "for each one evaluation and its end; the backbone, the batch"


def test_the_adapters_are_on_disk(printed: tuple[Path, str, str]) -> None:
    folder, _, _ = printed
    for name in ("adapter.json", "history.json", "curve.png"):
        assert {file.parent.name for file in folder.glob(f"*/{name}")} == {lesson.name for lesson in LESSONS}, name


def test_a_second_demo_uses_what_the_first_has_trained_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("[2/2]") and "step" in line:
            raise KeyboardInterrupt

    lessons, lines = LESSONS[2:4], []
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, quick=True, lessons=lessons, report=stop)
    assert not (tmp_path / lessons[1].name / "adapter.json").exists()
    first, second = run_demo(tmp_path, quick=True, lessons=lessons, report=lines.append).adapters
    assert first.seconds is None and second.seconds is not None
    file = tmp_path / lessons[0].name / "adapter.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])  # a damaged adapter is trained anew
    result = run_demo(tmp_path, quick=True, lessons=lessons[:1])
    assert result.adapters[0].seconds is not None and file.read_bytes() == content
    assert result.agrees
    assert len(result.rows) == 3
    assert result.rows[0].expected != result.rows[1].expected
    assert result.bank_bytes < result.backbone_bytes


def test_it_replaces_adapters_only(tmp_path: Path) -> None:
    (tmp_path / LESSONS[-1].name).mkdir()
    with pytest.raises(ConfigError, match="is not an adapter"):
        run_demo(tmp_path, quick=True)


def test_a_disagreement_is_seen() -> None:
    row = DemoRow(text="x", adapter=None, answer=None, probability=None, expected=None, difference=TOLERANCE)
    result = DemoResult(adapters=(), rows=(row,), backbone_bytes=0, bank_bytes=0, seconds=0.0)
    assert result.agrees
    assert not replace(result, rows=(row, replace(row, difference=2 * TOLERANCE))).agrees
    assert not replace(result, rows=(row, replace(row, difference=float("nan")))).agrees
