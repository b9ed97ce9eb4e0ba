"""Tasks: what is read from a row of a table, what is predicted from it, and how that is judged.

    from multitune.tasks import load_task, compute
    data = load_task("demo/sentiment")
    examples = data.task.examples(data.train)

Knows tables and texts, never tensors or models.
"""

from multitune.tasks.infer import infer_task
from multitune.tasks.judging import judge
from multitune.tasks.metrics import compute, higher_is_better
from multitune.tasks.own import any_split, load_table
from multitune.tasks.pattern import Pattern
from multitune.tasks.readers import list_splits, read_table
from multitune.tasks.schema import Example, Task
from multitune.tasks.splits import split_table
from multitune.tasks.suites import TaskData, list_tasks, load_task
from multitune.tasks.templates import Template

__all__ = [
    "Example",
    "Pattern",
    "Task",
    "TaskData",
    "Template",
    "any_split",
    "compute",
    "higher_is_better",
    "infer_task",
    "judge",
    "list_splits",
    "list_tasks",
    "load_table",
    "load_task",
    "read_table",
    "split_table",
]
