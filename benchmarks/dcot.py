"""Several chains of thought in one response (DCoT) against one chain, and against votes over samples at equal cost.

    export MULTITUNE_DATA=/path/to/data
    python benchmarks/dcot.py --shard 1/2 & python benchmarks/dcot.py --shard 2/2 & wait
    python benchmarks/dcot.py --table --write docs/instructions.md

Each finished run is kept in a store, so a killed benchmark goes on when the command is given again. Both adapters see
the same questions and chains in as many rows (Puerto et al. 2024, arXiv 2407.03181); the one learns to give up to three
chains in a response, the other one at a time. The first is asked for k = 1, 2 and 3 chains, the second draws k samples
and votes. Two sets have no training rows and are new to both.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

from _cells import SUBSET_SEED, about, by_chance, go, parser
from _store import Row

import multitune
from multitune.prompting import answer, chain_data, cot_rows, dcot_rows
from multitune.tasks.reasoning import Question, load_questions

NAME = "dcot"
BACKBONE = "smollm2"
LEARNT = ("gsm8k", "coin_flip", "last_letters")
TESTED = ("gsm8k", "multiarith", "singleeq", "coin_flip", "last_letters")
QUESTIONS, VALIDATION_QUESTIONS, TEST_QUESTIONS, CHAINS = 50, 8, 20, 3
TEMPERATURE = 0.7
NEW_TOKENS = {1: 120, 2: 220, 3: 320}


def drawn(name: str, split: str, count: int, *, solved: bool) -> list[Question]:
    """Some questions of a set, the same ones every time; `solved` ones have as many chains as are asked for."""
    found = [q for q in load_questions(name, split) if not solved or len(q.chains) >= CHAINS]
    return random.Random(SUBSET_SEED).sample(found, min(count, len(found)))


def run(cell: Row) -> Row:
    """Train on chains, then answer the test questions at every k."""
    backbone = multitune.Backbone.load(cell["backbone"])
    rows_of = {"dcot": dcot_rows, "cot": cot_rows}[cell["training_rows"]]
    count = cell["questions"]
    learnt: list[Question] = []
    held: list[Question] = []
    for name in cell["learnt"]:
        questions = drawn(name, "train", count + cell["validation_questions"], solved=True)
        learnt += questions[:count]
        held += questions[count:]
    seed = cell["training"]["seed"]
    train, validation = (rows_of(questions, most=CHAINS, seed=seed) for questions in (learnt, held))
    data = chain_data(cell["training_rows"], train, validation)
    start = time.perf_counter()
    result = multitune.train(backbone, data, multitune.make_method("lora", cell["settings"]), **cell["training"])
    seconds = time.perf_counter() - start
    bank = multitune.Bank(backbone)
    bank.add("it", result.adapter)
    scores = {name: {str(k): _judged(bank, cell, name, k) for k in cell["k"]} for name in cell["tested"]}
    return {
        "scores": scores,
        "num_rows": len(data.train),
        "parameters": result.num_method_parameters,
        "perplexity": result.best_metric,
        "training_seconds": seconds,
    }


def _judged(bank: multitune.Bank, cell: Row, name: str, k: int) -> Row:
    """One set of questions answered by k chains in one response, or by votes over k samples."""
    questions = drawn(name, "test", cell["test_questions"], solved=False)
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS[k if cell["training_rows"] == "dcot" else 1]}
    if cell["training_rows"] == "dcot":
        done = answer(bank, "it", questions, k=k, settings=settings)
    else:
        samples = {**settings, "temperature": TEMPERATURE} if k > 1 else settings
        done = answer(bank, "it", questions, samples=k, settings=samples)
    return {
        "right": sum(done.right),
        "questions": len(questions),
        "tokens": done.num_tokens,
        "unfinished": done.num_unfinished,
        "seconds": done.seconds,
        "text": done.texts[0][0],
    }


def cells_of(args: argparse.Namespace) -> list[Row]:
    """Every run asked for."""
    method = multitune.make_method("lora", {"r": 16, "targets": ("query", "key", "value", "ffn_in")})
    cells = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        training = {
            "learning_rate": 1e-3,
            "epochs": 1.0,
            "batch_size": 8,
            "eval_batch_size": 8,
            "max_length": 512,
            "seed": seed,
            "progress": False,
        }
        for rows in ("dcot", "cot"):
            cells.append(
                {
                    "training_rows": rows,
                    "backbone": BACKBONE,
                    "settings": method.settings(),
                    "training": training | ({"max_steps": 2} if args.quick else {}),
                    "learnt": list(LEARNT[1:2] if args.quick else LEARNT),
                    "tested": list(TESTED[:2] if args.quick else TESTED),
                    "questions": 4 if args.quick else args.questions,
                    "validation_questions": 1 if args.quick else VALIDATION_QUESTIONS,
                    "test_questions": 2 if args.quick else args.test_questions,
                    "k": [1, 2] if args.quick else [1, 2, 3],
                }
            )
    return cells


def describe(row: Row) -> str:
    """One line about a run."""
    totals = {k: sum(s[k]["right"] for s in row["scores"].values()) for k in next(iter(row["scores"].values()))}
    asked = sum(next(iter(s.values()))["questions"] for s in row["scores"].values())
    return f"{row['cell']['training_rows']:5s} right of {asked}: " + ", ".join(f"k={k} {n}" for k, n in totals.items())


def render(done: list[Row], missing: int) -> str:
    """The table: a line per run and k, a column per set of questions."""
    tested = done[0]["cell"]["tested"]
    lines = [
        f"| training | answers | {' | '.join(tested)} | all | tokens per question | not finished |",
        f"|---|---|{'---:|' * (len(tested) + 3)}",
    ]
    for row in done:
        dcot = row["cell"]["training_rows"] == "dcot"
        for k in row["cell"]["k"]:
            of = [row["scores"][name][str(k)] for name in tested]
            right, asked = sum(s["right"] for s in of), sum(s["questions"] for s in of)
            tokens, cut = sum(s["tokens"] for s in of), sum(s["unfinished"] for s in of)
            how = f"{k} chain{'s' * (k > 1)} in a response" if dcot else _votes(k)
            seed = row["cell"]["training"]["seed"]
            title = ("DCoT" if dcot else "CoT") + (f" (seed {seed})" if seed else "")
            shares = " | ".join(f"{100 * s['right'] / s['questions']:.0f}" for s in of)
            lines.append(f"| {title} | {how} | {shares} | {100 * right / asked:.1f} | {tokens / asked:.0f} | {cut} |")
    cell, first = done[0]["cell"], done[0]["scores"]
    asked_of = [first[name][str(cell["k"][0])]["questions"] for name in tested]
    times = ", ".join(f"{r['cell']['training_rows']} {r['training_seconds']:.0f} s" for r in done)
    notes = [
        f"- `{cell['backbone']}`, LoRA, one epoch of {done[0]['num_rows']} rows of {cell['questions']} questions each "
        f"of {', '.join(cell['learnt'])}, chains made by rule; {cell['test_questions']} test questions of each set, "
        f"percent of right final answers. With so few questions two numbers may differ by chance alone: up to "
        f"{by_chance(cell['test_questions'])} points of a set, and {by_chance(sum(asked_of))} of all.",
        f"- Greedy, but for votes (temperature {TEMPERATURE}). Training took {times}.",
    ]
    return "\n".join([*lines, "", *notes, *about(done, missing, "python benchmarks/dcot.py")])


def _votes(k: int) -> str:
    return "one chain" if k == 1 else f"a vote over {k} samples"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--questions", type=int, default=QUESTIONS, metavar="N", help="training questions of each set")
    options.add_argument("--test-questions", type=int, default=TEST_QUESTIONS, metavar="N", help="of each set")
    args = options.parse_args()
    go(NAME, args, cells_of(args), run, describe, render)


if __name__ == "__main__":
    main()
