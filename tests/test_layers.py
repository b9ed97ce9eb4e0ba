"""Dependencies point downward, nothing is unpickled, and no code asks for a model's name."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import multitune
from multitune import exports, training

ROOT = Path(multitune.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py"))

#: part of the engine -> the parts of multitune that it may import while it is itself imported
MAY_IMPORT = {
    "deltas": {"deltas", "errors"},
    "workspace": set(),
    "files": {"errors"},
    "tables": {"deltas", "errors", "files"},
    "architectures": {"errors"},
    "sites": {"architectures", "errors"},
    "frozen": {"quantized", "sites"},
    "plan": {"deltas", "workspace", "errors"},
    "inputs": set(),
    "batch_checks": {"errors", "inputs", "plan"},
    "positions": {"errors", "plan"},
    "inserted": {"deltas", "errors", "plan", "positions"},
    "token_biases": {"deltas", "plan"},
    "call": {"batch_checks", "errors", "inputs", "inserted", "plan", "positions", "token_biases"},
    "current": {"errors"},
    "hooks": {"call", "current", "deltas", "frozen", "plan", "sites"},
    "lsg": {"errors"},
    "lsg_sparse": set(),
    "lsg_attention": {"lsg", "lsg_sparse"},
    "joint": {"call", "current", "deltas", "inputs", "plan"},
    "attention": {"call", "cross_cache", "current", "deltas", "joint", "kv_cache", "lsg_attention", "plan"},
    "language_head": set(),
    "kv_cache": set(),
    "cross_cache": {"kv_cache"},
    "packaged": {"errors", "files"},
    "pruned": {"errors"},
    "quantized": {"errors", "sites"},
    "compiled": {"call", "current", "errors"},
    "backbone": {
        *("architectures", "copies", "errors", "fingerprint", "frozen", "hooks", "inputs", "instrument", "joint"),
        *("language_head", "loading", "lsg", "masked", "passes", "plan", "pruned", "quantized", "sites"),
    },
    "instrument": {"architectures", "attention", "current", "errors", "hooks", "lsg"},
    "fingerprint": set(),
    "copies": {"attention", "errors", "hooks", "instrument", "placing"},
    "masked": {"architectures", "errors", "language_head", "packaged"},
    "ranked": {"batching", "errors", "inputs", "language_head", "language_loss", "tasks"},
    "loading": {"architectures", "errors", "files", "lsg", "masked", "packaged", "placing", "pruned", "quantized"},
    "passes": {"batch_checks", "call", "current", "errors", "inputs", "joint", "plan"},
    "sharing": {"inputs", "passes", "plan", "workspace"},
    "generation": {
        "answers",
        "backbone",
        "batch_checks",
        "call",
        "cross_cache",
        "current",
        "deltas",
        "errors",
        "files",
        "generation",
        "inputs",
        "kv_cache",
        "plan",
        "tasks",
        "workspace",
    },
    "methods": {"deltas", "errors", "methods", "words"},
    "words": set(),
    "batching": {"errors", "inputs", "tasks"},
    "placing": set(),
    "pooling": set(),
    "heads": {"errors", "pooling", "tasks"},
    "exports": {"errors"},
}


def imports(tree, *, types_too=False):
    """(module, names) of every import that runs when the file is imported."""

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test) and not types_too:
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, ()) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module or "", tuple(alias.name for alias in child.names)
            yield from walk(child)

    return list(walk(tree))


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in FILES if part(p) in MAY_IMPORT], ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_downward(path):
    found = set()
    for module, names in imports(ast.parse(path.read_text("utf-8"))):
        top, _, rest = module.partition(".")
        if top == "multitune":
            found |= {rest.partition(".")[0]} if rest else set(names)
    assert found <= MAY_IMPORT[part(path)], found - MAY_IMPORT[part(path)]


def test_deltas_know_torch_only():
    outside = set()
    for path in (ROOT / "deltas").glob("*.py"):
        outside |= {module.partition(".")[0] for module, _ in imports(ast.parse(path.read_text("utf-8")))}
    assert outside == {"__future__", "collections", "dataclasses", "itertools", "math", "torch", "typing", "multitune"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_and_peft_only_checks_conversions(path):
    tree = ast.parse(path.read_text("utf-8"))
    found = {module.partition(".")[0] for module, _ in imports(tree, types_too=True)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), "torch.load unpickles"
    assert not found & {"pickle", "cPickle", "dill", "joblib", "shelve"}
    assert "peft" not in found or path.relative_to(ROOT).parts[:2] == ("convert", "peft")


@pytest.mark.parametrize(
    "path", [p for p in FILES if part(p) in MAY_IMPORT and p.name != "architectures.py"], ids=lambda p: p.name
)
def test_no_code_branches_on_a_models_name(path):
    """Architecture knowledge is the table in architectures.py."""
    known = {name for row in multitune.architectures.ARCHITECTURES for name in row.model_types}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in known


# ---- public names


def test_public_names():
    assert all(hasattr(multitune, name) for name in multitune.__all__)
    assert len(set(multitune.__all__)) == len(multitune.__all__)
    assert {"Adapter", "Backbone", "Bank", "DeltaSet", "Head", "Method", "Plan", "Task"} <= set(multitune.__all__)
    assert set(multitune.__all__) <= set(dir(multitune))


def test_every_method_of_the_package_is_a_public_name():
    classes = [multitune.get_method(name) for name in multitune.method_names()]
    assert len({cls.__name__ for cls in classes}) == len(classes)
    for cls in classes:
        assert getattr(multitune, cls.__name__) is cls and cls.__name__ in multitune.__all__


def test_no_public_name_is_a_submodules_too():
    """Importing the submodule would put the module where the function was."""
    modules = {module.name for module in pkgutil.iter_modules(multitune.__path__)}
    assert not modules & {*exports.homes()}
    assert not {name for name in exports.homes() if sum(name in names for names in exports.EXPORTS.values()) > 1}


@pytest.mark.parametrize("package", ["multitune", "multitune.training"])
def test_the_stub_for_type_checkers_is_up_to_date(package):
    stub = ROOT.parent.joinpath(*package.split("."), "__init__.pyi").read_text("utf-8")
    assert stub == exports.stub(package), f"the stub of {package} is out of date; run make docs"


def test_training_has_its_public_names_from_the_one_table():
    assert training.__all__ == [
        name for name, home in exports.homes().items() if home.startswith("multitune.training.")
    ]
    assert all(getattr(training, name) is getattr(multitune, name) for name in training.__all__)


def test_importing_the_package_and_the_training_settings_loads_no_torch():
    program = (
        "import sys, multitune, multitune.training.config\nheavy = {'torch', 'transformers', 'datasets', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not hasattr(multitune, '__wrapped__') and 'torch' not in sys.modules\n"
        "from multitune import AoTFC, ConfigError, train\nassert multitune.LoRA.name == 'lora'\n"
        "import multitune.merging\nassert callable(multitune.merge) and multitune.tasks.load_task"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'LorA'\. Did you mean 'LoRA'\?"):
        multitune.LorA  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'trainn'"):
        training.trainn  # noqa: B018
