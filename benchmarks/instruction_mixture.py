"""Instruction tuning on a mixture of tasks: the zero-shot score of whole tasks held out, before and after.

    export MULTITUNE_DATA=/path/to/data
    python benchmarks/instruction_mixture.py --shard 1/2 & python benchmarks/instruction_mixture.py --shard 2/2 & wait
    python benchmarks/instruction_mixture.py --table --write docs/instructions.md

Each finished run is kept in a store, so a killed benchmark goes on when the command is given again. A run trains one
adapter on the mixture, or none, and judges every held-out task on the same rows: by the likeliest of the options, or by
what is written. Clusters of tasks are held out whole, and training rows that share a text with a row to judge by are
left out.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

from _cells import about, by_chance, go, parser
from _store import Row

import multitune
from multitune.errors import DataWarning
from multitune.prompting import Mixture, score_tasks

NAME = "instruction_mixture"
BACKBONE = "smollm2"

LEARNT = (
    *("glue/mrpc", "glue/qqp", "glue/cola", "glue/sst2"),
    *("text_classification/rotten_tomatoes", "text_classification/subj", "text_classification/trec"),
    *("text_classification/ag_news", "tweet_eval/hate", "tweet_eval/offensive"),
    *("text_classification/dbpedia_14", "intent/banking77", "super_glue/boolq", "super_glue/wic"),
    *("instruction/alpaca", "instruction/self_instruct_seed"),
    *("nlg/e2e_nlg", "summarization/dialogsum"),
    "super_natural_instructions/task181_outcome_extraction",
    "super_natural_instructions/task591_sciq_answer_generation",
    "super_natural_instructions/task1510_evalution_relation_extraction",
    "super_natural_instructions/task875_emotion_classification",
)
#: No cluster of theirs (`prompting.instructions.cluster_of`) is one of the learnt.
HELD_OUT = (
    *("glue/rte", "super_glue/cb", "super_glue/wsc", "super_glue/copa", "reasoning/commonsense_qa"),
    *("bbh/navigate", "bbh/hyperbaton", "bbh/sports_understanding"),
    *("instruction_induction/num_to_verbal", "instruction_induction/negation"),
)
MIXTURE = {"rows": 600, "cap": 500, "validation_rows": 48, "seed": 0}
TEST_ROWS, WORDINGS, MAX_LENGTH = 40, 1, 256
METHODS: dict[str, dict[str, Any]] = {"lora": {"r": 16, "targets": ("query", "key", "value", "ffn_in")}, "full": {}}


def mixture_of(cell: Row) -> Mixture:
    """The mixture of a cell."""
    return Mixture.read(
        {**cell["mixture"], "tasks": [*cell["learnt"], *cell["held_out"]], "held_out": cell["held_out"]}
    )


def run(cell: Row) -> Row:
    """Train, unless the cell is the bare backbone, and judge the held-out tasks."""
    warnings.filterwarnings("ignore", category=DataWarning)  # of prompts that are cut at their front
    backbone = multitune.Backbone.load(cell["backbone"])
    mixture = mixture_of(cell)
    start, adapter, found = time.perf_counter(), None, {}
    if cell["method"] != "none":
        method = multitune.make_method(cell["method"], cell["settings"])
        result = multitune.train(backbone, mixture.data(), method, **cell["training"])
        adapter = result.adapter
        found = {"parameters": result.num_method_parameters, "perplexity": result.best_metric}
    training = time.perf_counter() - start
    scores = score_tasks(
        backbone,
        mixture.held,
        adapter,
        num_rows=cell["test_rows"],
        num_wordings=cell["wordings"],
        settings={"max_new_tokens": 24},
        max_length=MAX_LENGTH,
    )
    by_task = {
        s.task: {
            "metric": s.metric,
            "score": s.score,
            "by_wording": s.by_wording,
            "rows": s.num_rows,
            "chance": s.chance,
        }
        for s in scores
    }
    seconds = {"training_seconds": training, "judging_seconds": time.perf_counter() - start - training}
    return {"scores": by_task, "shares": mixture.shares, **found, **seconds}


def cells_of(args: argparse.Namespace) -> list[Row]:
    """Every run asked for: the bare backbone first, then the methods."""
    quick = {"rows": 16, "validation_rows": 8} if args.quick else {}
    common = {
        "backbone": BACKBONE,
        "learnt": list(LEARNT[:4] if args.quick else LEARNT),
        "held_out": list(HELD_OUT[4:7] if args.quick else HELD_OUT),
        "mixture": {**MIXTURE, "rows": args.rows, **quick},
        "test_rows": 2 if args.quick else args.test_rows,
        "wordings": args.wordings,
    }
    cells: list[Row] = [{"method": "none", **common}]
    for seed in args.seeds[:1] if args.quick else args.seeds:
        for name in args.methods:
            method = multitune.make_method(name, METHODS[name])
            training = {
                "learning_rate": method.recipe.learning_rate,
                "weight_decay": method.recipe.weight_decay,
                "warmup_ratio": method.recipe.warmup_ratio,
                "epochs": 1.0,
                "batch_size": 8,
                "eval_batch_size": 16,
                "max_length": MAX_LENGTH,
                "seed": seed,
                "progress": False,
            }
            cells.append({"method": name, "settings": method.settings(), "training": training, **common})
    return cells


def describe(row: Row) -> str:
    """One line about a run."""
    scores = [s["score"] for s in row["scores"].values()]
    return f"{row['cell']['method']:8s} mean over {len(scores)} held-out tasks {sum(scores) / len(scores):.3f}"


def render(done: list[Row], missing: int) -> str:
    """The table: a line per held-out task, a column per run."""
    titles = [_title(row["cell"]) for row in done]
    lines = [f"| held-out task | judged by | chance | {' | '.join(titles)} |", f"|---|---|---:|{'---:|' * len(done)}"]
    for task, first in done[0]["scores"].items():
        chance = "" if first["chance"] is None else f"{100 * first['chance']:.0f}"
        cells = [f"{_percent(row['scores'][task])}" for row in done]
        lines.append(f"| {task} | {first['metric']} | {chance} | {' | '.join(cells)} |")
    for what, ranked in (("mean of the ranked", True), ("mean of the written", False)):
        names = [t for t, s in done[0]["scores"].items() if (s["chance"] is not None) is ranked]
        if names:
            means = [sum(_value(row["scores"][t]) for t in names) / len(names) for row in done]
            lines.append(f"| {what} | | | {' | '.join(f'{m:.1f}' for m in means)} |")
    cell = done[0]["cell"]
    shown = [s["rows"] for s in done[0]["scores"].values()]
    seconds = ", ".join(f"{_title(r['cell'])} {r['training_seconds']:.0f} + {r['judging_seconds']:.0f} s" for r in done)
    notes = [
        f"- `{cell['backbone']}`; {cell['mixture']['rows']} training rows of {len(done[0]['shares'])} tasks, one "
        f"epoch, examples-proportional with a cap of {cell['mixture']['cap']}; {_span(shown)} rows of each "
        f"held-out task, each put in {cell['wordings']} way{'s' * (cell['wordings'] > 1)}, in percent. On so few rows "
        f"two models may differ by up to {by_chance(min(shown))} points by chance alone.",
        "- The column chance is one over the number of options. Most of WSC's rows have the answer no, so that a model "
        "which always says no stands above it.",
        f"- Trained: {', '.join(done[0]['shares'])}.",
        f"- Training and judging took {seconds}.",
    ]
    return "\n".join([*lines, "", *notes, *about(done, missing, "python benchmarks/instruction_mixture.py")])


def _title(cell: Row) -> str:
    if cell["method"] == "none":
        return "before"
    seed = cell["training"]["seed"]
    return f"after, {multitune.get_method(cell['method']).title}" + (f" (seed {seed})" if seed else "")


def _percent(score: Row) -> str:
    return f"{_value(score):.1f}"


def _value(score: Row) -> float:
    """In percent; BLEU and chrF are already, and NIST is none."""
    return float(score["score"]) * (1 if score["metric"] in ("bleu", "chrf", "nist") else 100)


def _span(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="default: all")
    options.add_argument("--rows", type=int, default=MIXTURE["rows"], metavar="N", help="training rows")
    options.add_argument("--test-rows", type=int, default=TEST_ROWS, metavar="N", help="rows of each held-out task")
    options.add_argument("--wordings", type=int, default=WORDINGS, metavar="N", help="wordings of each held-out task")
    args = options.parse_args()
    go(NAME, args, cells_of(args), run, describe, render)


if __name__ == "__main__":
    main()
