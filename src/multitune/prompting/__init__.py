"""Prompting: a frozen language model answers by which choice it finds likeliest, from a pattern and some examples.

    from multitune.prompting import BM25Examples, Pattern, rank
    pattern = Pattern("{premise}\\n{hypothesis} True, false or neither?\\nAnswer:", {"entailment": "true", ...})
    found = rank(backbone, data.task, pattern, data.validation, examples=BM25Examples(data.train, k=4))
    found.metrics

Nothing is trained.
"""

from multitune.prompting.chains import (
    Answers,
    answer,
    chain_data,
    cot_rows,
    dcot_rows,
    sample_chains,
    vote,
)
from multitune.prompting.exemplars import ExemplarPrompts, as_generation, with_examples
from multitune.prompting.instructions import InstructedTask, by_pattern, by_template, instructed
from multitune.prompting.judged import JudgedRow
from multitune.prompting.mixture import Mixture
from multitune.prompting.ranking import Ranking, rank
from multitune.prompting.selection import BM25Examples, Examples, NeighbourExamples, RandomExamples
from multitune.prompting.transfer import TaskScore, save_scores, score_tasks
from multitune.tasks.pattern import Pattern

__all__ = [
    "Answers",
    "BM25Examples",
    "Examples",
    "ExemplarPrompts",
    "InstructedTask",
    "JudgedRow",
    "Mixture",
    "NeighbourExamples",
    "Pattern",
    "RandomExamples",
    "Ranking",
    "TaskScore",
    "answer",
    "as_generation",
    "by_pattern",
    "by_template",
    "chain_data",
    "cot_rows",
    "dcot_rows",
    "instructed",
    "rank",
    "sample_chains",
    "save_scores",
    "score_tasks",
    "vote",
    "with_examples",
]
