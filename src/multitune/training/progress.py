"""Bars for many jobs on standard error, if that is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console


class Progress:
    """A bar for all jobs and one for each that runs."""

    def __init__(self, wanted: bool) -> None:
        console = Console(stderr=True)
        self.shown = wanted and console.is_terminal
        """Whether anything is to be seen."""
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),  # a name may hold brackets
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self.shown,
        )
        self._all: progress.TaskID | None = None
        self._of_job: dict[str, progress.TaskID] = {}
        self._failed = 0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def expect(self, count: int) -> None:
        """So many jobs will end."""
        self._all = self._bars.add_task("jobs", total=count)

    def begin(self, name: str, num_steps: int) -> None:
        """A job enters."""
        self._of_job[name] = self._bars.add_task(name, total=num_steps)

    def at(self, name: str, step: int) -> None:
        """A job has taken so many steps."""
        self._bars.update(self._of_job[name], completed=step)

    def end(self, name: str, failed: bool) -> None:
        """A job leaves, or never entered."""
        if name in self._of_job:
            self._bars.remove_task(self._of_job.pop(name))
        self._failed += failed
        if self._all is not None:
            self._bars.update(self._all, advance=1, description=f"jobs ({self._failed} failed)" if failed else None)
