"""Writes the demo's table-to-text rows, src/multitune/tasks/demo/trails.jsonl: facts of walks, and a sentence of them.

`python scripts/trails.py` writes; `--check` only compares, and fails when the file is out of date. The rows are drawn
with a fixed seed from the names, values and sentence patterns below.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "src" / "multitune" / "tasks" / "demo" / "trails.jsonl"
NUM_ROWS = 240

FIRST = ("Alder", "Beacon", "Cinder", "Dipper", "Elm", "Falcon", "Granite", "Heron", "Iris", "Juniper", "Kestrel",
         "Larch", "Marten", "Nettle", "Otter", "Plover", "Quarry", "Rowan", "Sorrel", "Thistle")  # fmt: skip
SECOND = ("Path", "Loop", "Ridge Walk", "Trail", "Way", "Circuit")
LENGTH = (2, 3, 4, 5, 6, 8, 10, 12, 15)
GRADE = ("easy", "moderate", "hard")
SIGHT = {"lake": "a lake", "waterfall": "a waterfall", "old mill": "an old mill", "viewpoint": "a viewpoint",
         "stone bridge": "a stone bridge", "castle ruin": "a castle ruin"}  # fmt: skip
DOGS = {"yes": ("dogs are welcome", "you may bring a dog"), "no": ("dogs must stay at home", "dogs are not allowed")}
SEASON = ("spring", "summer", "autumn", "winter")

OPENINGS = (
    "{name} is {a_grade} walk of {length} km",
    "At {length} km, {name} is {a_grade} walk",
    "{name} is {length} km long and {grade}",
)
SIGHTS = (" past {sight}", " that leads to {sight}", " with {sight} on the way")


def draw(rng: random.Random, name: str) -> dict[str, str]:
    """Facts of one walk, and a sentence or two that say all of them and nothing else."""
    length, grade = rng.choice(LENGTH), rng.choice(GRADE)
    facts = [f"name: {name}", f"length: {length} km", f"grade: {grade}"]
    opening = rng.choice(OPENINGS)
    a_grade = f"an {grade}" if grade == "easy" else f"a {grade}"
    text = opening.format(name=name, length=length, grade=grade, a_grade=a_grade)
    if rng.random() < 0.7:
        sight = rng.choice(list(SIGHT))
        facts.append(f"sight: {sight}")
        text += (", with {sight} on the way" if opening == OPENINGS[2] else rng.choice(SIGHTS)).format(
            sight=SIGHT[sight]
        )
    text += "."
    rest = []
    if rng.random() < 0.5:
        dogs = rng.choice(list(DOGS))
        facts.append(f"dogs: {dogs}")
        rest.append(rng.choice(DOGS[dogs]))
    if rng.random() < 0.5:
        season = rng.choice(SEASON)
        facts.append(f"best in: {season}")
        rest.append(f"it is at its best in {season}")
    if rest:
        said = " and ".join(rest)
        text += f" {said[0].upper()}{said[1:]}."
    return {"facts": "; ".join(facts), "text": text}


def rows() -> list[dict[str, str]]:
    """All rows: no two have the same facts."""
    rng = random.Random(2024)
    names = [f"{first} {second}" for first in FIRST for second in SECOND] * 2
    rng.shuffle(names)
    made: dict[str, dict[str, str]] = {}
    for name in names:
        row = draw(rng, name)
        made[row["facts"]] = row
    return list(made.values())[:NUM_ROWS]


def main() -> None:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
    if not parser.parse_args().check:
        FILE.write_text(text, "utf-8")
    elif FILE.read_text("utf-8") != text:
        sys.exit(f"{FILE} is out of date; run scripts/trails.py")


if __name__ == "__main__":
    main()
