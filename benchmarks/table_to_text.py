"""E2E restaurant facts to sentences: tuning methods at one budget of parameters, beside prompting without training.

    export MULTITUNE_DATA=/path/to/data
    python benchmarks/table_to_text.py --shard 1/2 & python benchmarks/table_to_text.py --shard 2/2 & wait
    python benchmarks/table_to_text.py --table --write docs/instructions.md

Each finished run is kept in a store, so a killed benchmark goes on when the command is given again. All trained
methods see the same rows in the same order for one epoch and are judged on the same test prompts, greedily, each by all
of its references. Prompting reads the same training rows as its pool of examples.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

from _cells import about, draw, go, parser
from _store import Row

import multitune
from multitune.generation import evaluate_texts
from multitune.prompting import with_examples
from multitune.tasks import TaskData, Template

NAME = "table_to_text"
TASK, BACKBONE = "nlg/e2e_nlg", "smollm2"
TRAIN_ROWS, VALIDATION_ROWS, TEST_PROMPTS, NEW_TOKENS = 1000, 64, 150, 60
EXAMPLES = 4

#: Methods with settings that give each about the 460,800 parameters of LoRA with its defaults, where it can have as
#: many. The network that makes a prefix in training is dropped after it, so that the prefix alone is kept.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "prefix": ("prefix", {"length": 40}),
    "prefix-direct": ("prefix", {"length": 40, "reparametrise": False}),
    "ptuning_v2": ("ptuning_v2", {"length": 40}),
    "pfeiffer": ("pfeiffer", {"reduction_factor": 44}),
    "aot_fc": ("aot_fc", {"r": 13}),
    "prompt": ("prompt", {"length": 20}),
    "full": ("full", {}),
}
PROMPTED = ("zero-shot", "few-shot")
INSTRUCTION = "Write one sentence that recommends or describes the restaurant, with all of these facts:\n"


def data_of(cell: Row) -> TaskData:
    """The task with the cell's rows; the test rows are those of the first so many prompts."""
    data = multitune.load_task(TASK)
    assert data.test is not None
    prompts = set(list(dict.fromkeys(data.test["meaning_representation"]))[: cell["test_prompts"]])
    test = data.test.select([i for i, mr in enumerate(data.test["meaning_representation"]) if mr in prompts])
    train, validation = draw(data.train, cell["train_rows"]), draw(data.validation, cell["validation_rows"])
    return replace(data, train=train, validation=validation, test=test)


def run(cell: Row) -> Row:
    """Train and write, or only write."""
    backbone = multitune.Backbone.load(cell["backbone"])
    data = data_of(cell)
    bank = multitune.Bank(backbone)
    start, name, task, table = time.perf_counter(), None, None, data.test
    parameters, kept, training = 0, 0, 0.0
    if cell["method"] in PROMPTED:
        task, table = prompted(cell, data)
    else:
        method = multitune.make_method(cell["method"], cell["settings"])
        result = multitune.train(backbone, data, method, **cell["training"])
        bank.add("it", result.adapter)
        name, parameters, training = "it", result.num_method_parameters, time.perf_counter() - start
        kept = sum(tensor.numel() for tensor in result.adapter.params.values())
    done = evaluate_texts(bank, name, table, cell["writing"], task=task)
    assert done.interval is not None
    interval = {"low": done.interval.low, "high": done.interval.high}
    return {
        "scores": {**done.scores, **interval},
        "parameters": parameters,
        "kept": kept,
        "training_seconds": training,
        "writing_seconds": done.seconds,
        "num_tokens": done.num_tokens,
        "texts": [{"prompt": r.prompt, "text": r.text} for r in done.rows[:5]],
    }


def prompted(cell: Row, data: TaskData) -> tuple[Any, Any]:
    """The task and the rows of prompting: an instruction alone, or the most similar training rows in front."""
    if cell["method"] == "zero-shot":
        template = Template((INSTRUCTION + "{meaning_representation}",))
        return replace(data.task, template=template, format="chat"), data.test
    shown = with_examples(data, cell["examples"])
    return shown.task, shown.test


def cells_of(args: argparse.Namespace) -> list[Row]:
    """Every run asked for; the long ones first."""
    rows = (16, 4, 3) if args.quick else (args.train_rows, VALIDATION_ROWS, args.test_prompts)
    common = {
        "backbone": BACKBONE,
        **dict(zip(("train_rows", "validation_rows", "test_prompts"), rows, strict=True)),
    }
    writing = {"max_new_tokens": 8 if args.quick else NEW_TOKENS}
    cells = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        for name, settings in (METHODS[label] for label in args.methods):
            method = multitune.make_method(name, settings)
            training = {
                "learning_rate": method.recipe.learning_rate,
                "weight_decay": method.recipe.weight_decay,
                "warmup_ratio": method.recipe.warmup_ratio,
                "epochs": 1.0,
                "batch_size": 8,
                "max_length": 160,
                "seed": seed,
                "progress": False,
            }
            cells.append({"method": name, "settings": settings, "training": training, "writing": writing, **common})
    few = {**writing, "stop": ["\n"]}
    cells.append({"method": "few-shot", "examples": EXAMPLES, "writing": few, **common})
    cells.append({"method": "zero-shot", "writing": writing, **common})
    return cells


def describe(row: Row) -> str:
    """One line about a run."""
    s = row["scores"]
    return f"{row['cell']['method']:10s} BLEU {s['bleu']:.1f} ({s['low']:.1f} to {s['high']:.1f})"


def render(done: list[Row], missing: int) -> str:
    """The table."""
    lines = [
        "| method | trained parameters | kept | BLEU (95 % interval) | chrF | training s | writing s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in done:
        cell, s = row["cell"], row["scores"]
        trained = cell["method"] not in PROMPTED
        title = multitune.get_method(cell["method"]).title if trained else _prompting(cell)
        title += ", trained without the network" if cell.get("settings", {}).get("reparametrise") is False else ""
        more = f" (seed {cell['training']['seed']})" if trained and cell["training"]["seed"] else ""
        parameters = f"{row['parameters']:,} | {row.get('kept', row['parameters']):,}"
        lines.append(
            f"| {title}{more} | {parameters} | {s['bleu']:.1f} ({s['low']:.1f} to {s['high']:.1f}) "
            f"| {s['chrf']:.1f} | {row['training_seconds']:.0f} | {row['writing_seconds']:.0f} |"
        )
    cell = done[0]["cell"]
    notes = [
        f"- `{cell['backbone']}`; {cell['train_rows']:,} of 42,061 training rows, one epoch in batches of 8, each "
        f"method's own learning rate; {cell['test_prompts']} test prompts with all of their references, greedy.",
        "- In training a network makes the prefix, and is dropped afterwards. The row trained without it keeps the "
        "learning rate that suits the network, a tenth of that of P-tuning v2, which trains such a prefix directly.",
        "- Prompt tuning has 20 vectors: as many parameters as the others would be 800 of them, ten times a row's "
        "length. The interval is sacreBLEU's bootstrap over prompts.",
    ]
    return "\n".join([*lines, "", *notes, *about(done, missing, "python benchmarks/table_to_text.py")])


def _prompting(cell: Row) -> str:
    if cell["method"] == "zero-shot":
        return "no training: an instruction"
    return f"no training: the {cell['examples']} most similar rows (BM25)"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="default: all")
    options.add_argument("--train-rows", type=int, default=TRAIN_ROWS, metavar="N")
    options.add_argument("--test-prompts", type=int, default=TEST_PROMPTS, metavar="N")
    args = options.parse_args()
    go(NAME, args, cells_of(args), run, describe, render)


if __name__ == "__main__":
    main()
