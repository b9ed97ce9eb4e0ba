"""Run a comparison: every trial of a recipe that the store does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multitune.comparing.execute import load_quietly
from multitune.comparing.recipe import Recipe
from multitune.comparing.records import Outcome, Record
from multitune.comparing.runners import Runner, make_runner
from multitune.comparing.search import Search, best_of
from multitune.comparing.sources import recipe_of
from multitune.comparing.store import FILE, RECIPE_FILE, Store
from multitune.comparing.trials import Job, Plan
from multitune.files import replace_file

Watch = Callable[["Progress"], None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What happened, for whoever watches."""

    done: int
    """Trials of this comparison that have ended, earlier runs included."""
    total: int
    """All that there will be."""
    failed: int
    record: Record | None = None
    """The trial that just ended."""
    known: bool = False
    """Whether an earlier run had ended it."""
    line: str | None = None
    """Or what is going on."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison gave."""

    folder: Path
    """Holds the store and the recipe."""
    recipe: Recipe
    records: tuple[Record, ...]
    """Those of this recipe that count for the report, in the order of the recipe."""
    searched: tuple[Record, ...]
    """Those that looked for settings."""
    left_out: tuple[str, ...]
    """What a budget was too small for, in sentences."""

    @property
    def failed(self) -> list[Record]:
        """Trials that ended without a score."""
        return [r for r in (*self.searched, *self.records) if r.outcome.status == "failed"]


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    runner: str = "packed",
    workers: int | None = None,
    max_jobs: int | None = None,
    token_budget: int | None = None,
    passes: int | None = None,
    retry_failed: bool = False,
    watch: Watch | None = None,
) -> Comparison:
    """Compare methods: run every trial of a recipe, and keep each in a store that a later call extends.

    The same call after a kill, at any instant, runs what is left. A trial of another comparison that stands in the
    store is not run again either.

    Args:
        recipe: a `Recipe`, the values of one, a YAML file, the name of a suite (`multitune compare --help` lists them)
            or a table of your own rows, which gets a recipe that suits it.
        out: folder for the store and the recipe.
        runner: "packed" (all in this process), "processes" (several on this machine), or "ray" (a Ray cluster).
        workers: processes of the last two; by default one for each core, or CPU of the cluster; on a GPU one, or one
            for each GPU of the cluster.
        max_jobs: packed: so many trials share passes. 1, the default, makes each bit-equal to `train` with the same
            settings, and its time and memory its own; more are equal to it up to rounding.
        token_budget: packed, several at a time: most tokens of a pass, 512 by default; see `train_many`.
        passes: packed, several at a time: how many passes run at a time; see `train_many`.
        retry_failed: run those trials again that failed in an earlier call, and keep what they give now.
        watch: called with every step of the progress.

    Raises:
        ConfigError: a recipe with a slip, found before anything runs; or a missing extra.
        DataError: rows that cannot be read, or a folder that is a file or holds another kind of store.
    """
    found = recipe_of(recipe)
    runs = load(found)
    place = make_runner(
        runner,
        runs.backbone,
        found.backbone,
        workers=workers,
        max_jobs=max_jobs,
        token_budget=token_budget,
        passes=passes,
    )
    try:
        return run_plan(runs, Path(out), place, watch, retry_failed=retry_failed)
    finally:
        place.close()


def load(recipe: Recipe) -> Plan:
    """The recipe on its backbone, checked; nothing is trained.

    Raises:
        MultituneError: a backbone or task that cannot be read, or a setting that does not fit them.
    """
    return Plan(recipe, load_quietly(recipe.backbone, recipe.device))


def run_plan(
    plan: Plan, folder: Path, runner: Runner, watch: Watch | None = None, *, retry_failed: bool = False
) -> Comparison:
    """Run all that the store in the folder does not have, and with `retry_failed` what it has as failed."""
    store = Store(folder / FILE)
    write_recipe(plan.recipe, folder / RECIPE_FILE)
    ledger = _Ledger(store, runner, watch, total=number_of_trials(plan), retry_failed=retry_failed)
    chosen = None
    if plan.recipe.search is not None:
        searches = {cell.name: Search(cell.name, cell.points, plan.recipe.search.trials) for cell in plan.cells}
        _look(plan, searches, ledger)
        chosen = best_of(searches)
    finals = plan.finals(chosen)
    ledger.expect(len(ledger.outcomes) + sum(job.trial.key not in ledger.outcomes for job in _each_once(finals)))
    ledger.run(finals)
    return Comparison(
        folder=folder,
        recipe=plan.recipe,
        records=tuple(ledger.record(job) for job in finals),
        searched=tuple(r for r in ledger.records if r.purpose == "search"),
        left_out=tuple(plan.left_out),
    )


def number_of_trials(plan: Plan) -> int:
    """How many trials a plan has; with a search the most that it can come to."""
    if plan.recipe.search is None:
        return len({job.trial.key for job in plan.finals()})
    most = plan.recipe.search.trials
    searched = sum(min(most, len(cell.points)) for cell in plan.cells if len(cell.points) > 1)
    single = {cell.name for cell in plan.cells if len(cell.points) == 1}
    # the best setting's trial with the first seed, on the first draw, has been run by the search
    finals = sum(len(plan.recipe.seeds) * len(cell.draws) - (cell.name not in single) for cell in plan.cells)
    return searched + finals


def number_known(plan: Plan, folder: Path, *, retry_failed: bool = False) -> int:
    """How many of a plan's trials need not be run, for an earlier run has ended them; makes no store where is none."""
    if not (folder / FILE).exists():
        return 0
    store = Store(folder / FILE)
    keys = {job.trial.key for job in plan.finals()}
    return min(number_of_trials(plan), sum(store.has(key, finished=retry_failed) for key in keys))


def _look(plan: Plan, searches: Mapping[str, Search], ledger: _Ledger) -> None:
    """Run all searches to their ends, a trial of each at a time; one with a single point has nothing to look for."""
    cells = {cell.name: cell for cell in plan.cells}
    for name, search in searches.items():
        if len(cells[name].points) == 1:
            search.propose()
            search.tell(0.0)
    while open_ones := [name for name, search in searches.items() if not search.finished]:
        jobs = {}
        for name in open_ones:
            cell = cells[name]
            jobs[name] = plan.job(cell, searches[name].propose(), cell.draws[0], plan.search_seed(), "search")
        ledger.run(list(jobs.values()))
        for name, job in jobs.items():
            searches[name].tell(ledger.outcomes[job.trial.key].score)


class _Ledger:
    """Which trials have ended; runs those that have not, and puts every one into the store at once."""

    def __init__(self, store: Store, runner: Runner, watch: Watch | None, *, total: int, retry_failed: bool) -> None:
        self._store, self._runner, self._watch, self._total = store, runner, watch, total
        self._retry_failed = retry_failed
        self.outcomes: dict[str, Outcome] = {}
        """By key of the trial."""
        self._kept: set[tuple[str, str, str | None]] = set()
        self.records: list[Record] = []

    def expect(self, total: int) -> None:
        """There will be so many trials."""
        self._total = total

    def run(self, jobs: Sequence[Job]) -> None:
        """See to it that all have ended."""
        left = []
        for job in _each_once(jobs):
            key = job.trial.key
            if key not in self.outcomes:
                known = self._store.outcome(key)
                if known is None or (self._retry_failed and known.status == "failed"):
                    left.append(job)
                    continue
                self.outcomes[key] = known
                self._tell(record=self._keep(job), known=True)
        if left:
            self._runner.run(left, self._ended, self._say)
        for job in jobs:  # of trials that serve several budgets or purposes, the other uses
            self._keep(job)

    def record(self, job: Job) -> Record:
        """A trial that has ended, for the job's purpose."""
        outcome = self.outcomes[job.trial.key]
        return Record(trial=job.trial, outcome=outcome, purpose=job.purpose, budget=job.budget)

    def _ended(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job.trial.key] = outcome
        self._tell(record=self._keep(job))

    def _keep(self, job: Job) -> Record:
        """Put a trial that has ended into the store, for the job's purpose."""
        record = self.record(job)
        use = (job.trial.key, job.purpose, job.budget)
        if use not in self._kept:
            self._store.add(record)
            self.records.append(record)
            self._kept.add(use)
        return record

    def _say(self, line: str) -> None:
        self._tell(line=line)

    def _tell(self, **what: Any) -> None:
        if self._watch is not None:
            failed = sum(o.status == "failed" for o in self.outcomes.values())
            self._watch(Progress(done=len(self.outcomes), total=self._total, failed=failed, **what))


def _each_once(jobs: Iterable[Job]) -> list[Job]:
    return list({job.trial.key: job for job in reversed(list(jobs))}.values())[::-1]


def write_recipe(recipe: Recipe, file: Path) -> None:
    """Write the recipe as YAML."""
    text = as_yaml(recipe)
    replace_file(file, lambda temporary: temporary.write_text(text, "utf-8"))


def as_yaml(recipe: Recipe) -> str:
    """The recipe as a YAML file has it."""
    import yaml

    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


def with_choices(
    recipe: Recipe,
    *,
    methods: Sequence[str] | None = None,
    budgets: Sequence[str | int] | None = None,
    seeds: int | Sequence[int] | None = None,
    trials: int | None = None,
) -> Recipe:
    """The recipe with other methods, budgets or seeds, or with a search, where they are given."""
    recipe = recipe if methods is None else recipe.with_methods(methods)
    recipe = recipe if budgets is None else recipe.with_budgets(budgets)
    recipe = recipe if trials is None else recipe.with_search(trials)
    return recipe if seeds is None else recipe.with_seeds(seeds)
