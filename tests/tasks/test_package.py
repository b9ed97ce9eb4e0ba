import ast
from pathlib import Path

import pytest

from multitune import errors, tasks

ROOT = Path(tasks.__file__).parent


def test_public_names():
    assert (
        sorted(tasks.__all__)
        == tasks.__all__
        == [
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
    )
    assert all(hasattr(tasks, name) for name in tasks.__all__)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_no_tensors_and_no_models(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    tops = {name.split(".")[0] for name in imported}
    assert not tops & {"torch", "transformers", "pickle"}
    inside = {name for name in imported if name.startswith("multitune")}
    assert all(name == "multitune.errors" or name.startswith("multitune.tasks") for name in inside)


def test_every_error_is_a_value_error_of_one_tree():
    names = [
        "DataError",
        "TaskError",
        "ConfigError",
        "AdapterError",
        "MixError",
        "BackboneError",
        "PlanError",
    ]
    for name in names:
        assert issubclass(getattr(errors, name), errors.MultituneError)
        assert name in errors.__doc__
    assert issubclass(errors.MultituneError, ValueError)


@pytest.mark.parametrize(
    ("asked", "exist", "end"),
    [
        ("lable", ["text", "label"], " Did you mean 'label'?"),
        ("LABEL", ["Label"], " Did you mean 'Label'?"),
        ("x", ["label"], ""),
        ("x", [], ""),
    ],
)
def test_suggest(asked, exist, end):
    assert errors.suggest(asked, exist) == end
