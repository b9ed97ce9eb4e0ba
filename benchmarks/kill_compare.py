"""Does a comparison that is killed at random instants end with the same store as one that is not?

    python benchmarks/kill_compare.py [--kills 20] [--seed 0]

A small comparison (a tiny model with random weights, a search and several seeds) runs once undisturbed. Then it runs
again and again in a process that gets SIGKILL at a random instant, until it is through; from there in a new folder,
until there were as many kills as asked for. Printed are the kills, how many of them fell between the first trial and
the last, and whether every store came to the same trials with the same outcomes (times, memory and date aside), no
finished trial having run twice. Linux and macOS.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

import multitune
from multitune.comparing import Store
from multitune.comparing.run import Progress, compare
from multitune.comparing.store import FILE

#: What differs between two runs of one trial.
_OF_A_RUN = ("seconds", "processor_seconds", "peak_memory", "together", "environment")
_LOG = "ran.txt"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the kills did."""

    kills: int
    within: int
    """Of them, those at which some trials were finished and others were not."""
    rounds: int
    """Folders that were filled."""
    trials: int
    """In each of them."""
    differing: tuple[str, ...]
    """Keys of trials that some store lacks or has with another outcome."""
    repeated: tuple[str, ...]
    """Keys of trials that ran again after they had been finished."""

    @property
    def good(self) -> bool:
        """Whether nothing was lost and nothing was done twice."""
        return not self.differing and not self.repeated


def recipe(backbone: Path) -> dict[str, Any]:
    """About twenty trials of a fraction of a second."""
    rows = {"train_rows": 24, "validation_rows": 12}
    return {
        "name": "kills",
        "backbone": str(backbone),
        "tasks": [{"task": "demo/topic", **rows}, {"task": "demo/urgency", **rows}],
        "methods": {"lora": {"r": [1, 2, 4], "learning_rate": [1e-3, 1e-2]}, "bitfit": {}, "ptuning_v2": {"length": 2}},
        "search": {"trials": 3},
        "seeds": 3,
        "training": {"max_steps": 4, "batch_size": 8, "max_length": 16},
    }


def tiny(folder: Path) -> Path:
    """A BERT with two layers of width 16, random weights, and minilm's tokenizer, as a folder."""
    tokenizer = multitune.Backbone.load("minilm").tokenizer
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.set_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def killed(values: dict[str, Any], folder: Path, kills: int, seed: int) -> Verdict:
    """Run the recipe undisturbed and then with kills, in folders below `folder`."""
    draw = random.Random(seed)
    _child(values, folder / "undisturbed").join()
    start = time.perf_counter()
    _child(values, folder / "timed").join()
    whole = time.perf_counter() - start
    wanted = contents(folder / "undisturbed")
    if not wanted:
        raise SystemExit("the undisturbed comparison did not finish; see above")
    trials = len({key[0] for key in wanted})
    done = within = rounds = 0
    differing: set[str] = set()
    repeated: set[str] = set()
    while done < kills:
        place = folder / f"killed-{rounds}"
        rounds += 1
        while True:
            process = _child(values, place)
            if done < kills:
                process.join(draw.uniform(0.0, 0.5 * whole))
            else:
                process.join()
            if process.exitcode is None:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                done += 1
                within += 0 < len({key[0] for key in contents(place)}) < trials
            elif process.exitcode == 0:
                break
            else:
                raise SystemExit(f"a comparison ended with code {process.exitcode}; see above")
        found = contents(place)
        differing |= {key[0] for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
        ran = Counter((place / _LOG).read_text("utf-8").split())
        repeated |= {key for key, times in ran.items() if times > 1}
    return Verdict(
        kills=done,
        within=within,
        rounds=rounds,
        trials=trials,
        differing=tuple(sorted(differing)),
        repeated=tuple(sorted(repeated)),
    )


def contents(folder: Path) -> dict[tuple[str, str, str | None], dict[str, Any]]:
    """What must be the same of a store."""
    found = {}
    for record in Store(folder / FILE).records():
        outcome = record.to_dict()["outcome"]
        kept = {name: value for name, value in outcome.items() if name not in _OF_A_RUN}
        found[record.trial.key, record.purpose, record.budget] = kept
    return found


def _child(values: dict[str, Any], folder: Path) -> Any:
    # forked: what takes seconds to load is there, so that the kills fall into the comparison itself
    for module in ("multitune.training.api", "multitune.training.many", "optuna", "sklearn.metrics"):
        importlib.import_module(module)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(values, folder))
    process.start()
    return process


def _run(values: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / _LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(progress: Progress) -> None:
        if progress.record is not None and not progress.known:
            os.write(log, f"{progress.record.trial.key}\n".encode())

    compare(values, folder, watch=watch)


def main() -> int:
    """Run, print, and end with 1 if anything was lost or done twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        verdict = killed(recipe(tiny(Path(scratch) / "tiny")), Path(scratch), given.kills, given.seed)
    print(
        f"{verdict.kills} kills, {verdict.within} of them between the first trial and the last, in {verdict.rounds} "
        f"comparisons of {verdict.trials} trials: "
        f"{len(verdict.differing)} trials differ from the undisturbed store, {len(verdict.repeated)} ran twice"
    )
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
