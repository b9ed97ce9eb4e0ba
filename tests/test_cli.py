"""The command line, run in process on real small trainings; once as a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import typer
from typer.testing import CliRunner

from multitune import Adapter, Bank, ConfigError, Pattern, Task, __version__, evaluate, get_method, method_names
from multitune.cli import app
from multitune.cli.data import task_data
from multitune.cli.fields import fields_of
from multitune.cli.options import OPTIONS
from multitune.cli.recipe import read_recipe
from multitune.cli.shared import COMMANDS, load_backbone, load_command, size
from multitune.cli.train_many import _with_names
from multitune.comparing.sources import suites
from multitune.heads import Head
from multitune.tasks import list_tasks, load_task
from multitune.training import TrainConfig, TrainJob

SHORT = (
    "--max-steps",
    "2",
    "--batch-size",
    "4",
    "--max-length",
    "16",
    "--eval-batch-size",
    "64",
    "--progress",
    "false",
)
LAYERS, WIDTH, INNER, VOCAB = 3, 32, 48, 97  # of the tiny BERT of conftest.py


class Answer:
    """What a command printed, and how it ended."""

    def __init__(self, *args: Any, input: str | bytes | None = None) -> None:
        result = CliRunner().invoke(app, [str(a) for a in args], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


def good(*args: Any, **more: Any) -> Answer:
    """Run a command that must succeed."""
    answer = Answer(*args, **more)
    assert answer.code == 0, answer.err
    return answer


def bad(*args: Any, **more: Any) -> str:
    """Run a command that must fail as expected: one line on stderr, exit code 1. Returns the line."""
    answer = Answer(*args, **more)
    assert answer.code == 1
    *notes, last = answer.err.splitlines()
    assert last.startswith("error: ")
    assert not any(line.startswith(("error", "Traceback")) for line in notes)
    return last


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, make_backbone: Any) -> tuple[str, ...]:
    """Options that train a tiny backbone, which is a folder, for two steps."""
    folder = tmp_path_factory.mktemp("backbone")
    tiny = make_backbone("bert")
    tiny.detach()
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return ("--backbone", str(folder), *SHORT)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, short: tuple[str, ...]) -> Path:
    """A folder with two adapters: a classification, and a regression that fuses to a table."""
    root = tmp_path_factory.mktemp("adapters")
    good("train", "--task", "demo/topic", "--method", "lora", "--set", "r=2", "--out", root / "topic", *short)
    good("train", "--task", "demo/urgency", "--method", "aot_fc", "--set", "r=2", "--out", root / "urgency", *short)
    return root


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, short: tuple[str, ...]) -> Path:
    """A fully tuned adapter for pairs of texts."""
    path = tmp_path_factory.mktemp("full") / "pair"
    good("train", "--task", "demo/paraphrase", "--method", "full", "--out", path, *short)
    return path


# -------------------------------------------------------------------- the application


def _commands() -> list[tuple[str, Any]]:
    return [(name, load_command(name)) for name in COMMANDS]


def test_the_commands_are_listed_in_their_order() -> None:
    assert typer.main.get_command(app).list_commands(None) == list(COMMANDS)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "command"), _commands())
def test_every_command_and_option_has_help(name: str, command: Any) -> None:
    assert command.help == COMMANDS[name][1]  # the list of commands shows it without importing the command
    assert [p.name for p in command.params if not (p.help or "").strip()] == []
    answer = good(name, "--help")
    assert answer.err == ""
    for option in (o for p in command.params for o in p.opts if o.startswith("--")):
        assert option in answer.out


def test_the_help_of_compare_lists_the_suites() -> None:
    (what,) = (p for p in load_command("compare").params if p.name == "what")
    assert [name for name in suites() if name not in str(what.help)] == []


def test_every_command_is_in_the_list() -> None:
    _commands()
    assert {c.name or c.callback.__name__ for c in app.registered_commands if c.callback} == set(COMMANDS)


def test_help_and_version_load_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\nfrom multitune.cli import main\n"
        "for sys.argv in (['multitune', '--help'], ['multitune', '--version'], ['multitune', 'trian']):\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert all(text.split()[0] in done.stdout for _, text in COMMANDS.values())
    assert "Did you mean" in done.stderr and "'train'" in done.stderr


def test_listings_and_reports_take_json() -> None:
    without = [name for name, command in _commands() if "as_json" not in [p.name for p in command.params]]
    assert without == []


def test_version() -> None:
    assert good("--version").out == f"multitune {__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "multitune", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"multitune {__version__}\n"


def test_as_a_process_data_and_errors_go_separate_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MULTITUNE_DATA", raising=False)  # more tasks are listed with it
    # one process that runs two commands, because importing torch takes longer than all else here
    program = (
        "import sys, subprocess\nfrom multitune.cli import main\n"
        "for sys.argv in (['multitune', 'tasks'], ['multitune', 'tasks', 'demo/topics']):\n"
        "    try: main()\n"
        "    except SystemExit as end: print('exit', end.code, flush=True)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "MULTITUNE_DATA"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.splitlines() == [*list_tasks(), "exit 0", "exit 1"]
    assert done.stderr.count("\n") == 1
    assert "demo/topic" in done.stderr


def test_an_unknown_command_and_option_are_refused() -> None:
    assert Answer("trian").code == 2
    assert Answer("methods", "--jsn").code == 2
    assert "--learning-rate" in Answer("train", "--lr", "1e-3").err
    assert "--scheduler" in Answer("train", "--lr-scheduler-type", "linear").err


def test_sizes() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3072.0 GiB",
    ]


# -------------------------------------------------------------------- methods, tasks


def test_methods_as_json_says_what_the_code_says() -> None:
    found = {m["name"]: m for m in good("methods", "--json").json}
    assert tuple(found) == method_names()
    assert found["lora"]["deltas"] == ["LowRank"]
    assert found["bitfit"]["deltas"] == ["Affine", "Bias"]
    assert found["lora"]["parameters"] == 6 * 2 * (384 * 8 + 8 * 384)
    assert found["full"]["percent"] == 100
    assert {name for name, m in found.items() if not m["mixes"]} == {"freeze", "full", "top_layers"}
    assert {"lora", "bitfit", "ia3", "layernorm", "full"} <= {name for name, m in found.items() if m["merges"]}
    assert not any(found[name]["merges"] for name in ("aot_fc", "prompt", "ptuning_v2", "houlsby"))
    assert found["ia3"]["learning_rate"] == get_method("ia3").recipe.learning_rate


def test_methods_as_a_table_has_one_line_per_method() -> None:
    lines = good("methods").out.splitlines()
    for name in method_names():
        assert len([line for line in lines if line.startswith(f"{name} ")]) == 2, "facts, and the paper"
    assert max(map(len, lines)) <= 110


def test_one_method_shows_its_settings_with_their_documentation() -> None:
    found = good("methods", "lora", "--json").json
    settings = {s["name"]: s for s in found["settings"]}
    assert settings["r"] == {"name": "r", "type": "whole number", "default": 8, "doc": "Rank of the update."}
    assert settings["layers"]["type"] == "list of whole numbers or semantic or none"
    out = good("methods", "lora").out
    assert "Rank of the update." in out
    assert "query,value" in out
    assert "It has no settings" in good("methods", "head").out


@pytest.mark.parametrize("name", method_names())
def test_every_setting_is_documented(name: str) -> None:
    found = fields_of(get_method(name))
    assert [f.name for f in found] == [f.name for f in fields(get_method(name))]
    assert [f.name for f in found if not f.doc] == []


def test_an_unknown_method_names_the_nearest() -> None:
    assert "Did you mean 'lora'?" in bad("methods", "lorra")


def test_tasks() -> None:
    assert good("tasks").out.split() == list(list_tasks())
    assert good("tasks", "--json").json == list(list_tasks())
    assert "demo/topic" in bad("tasks", "demo/topics")
    found = good("tasks", "demo/paraphrase", "--json").json
    assert found["template"] == ["sentence1", "sentence2"]
    assert found["rows"]["train"] > found["rows"]["validation"] > 0
    assert "different, paraphrase" in good("tasks", "demo/paraphrase").out


def test_a_task_for_judging_alone_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "reasoning/svamp"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"question": ["1 + 1?"], "answer": ["2"]}).to_parquet(folder / "test.parquet")
    assert "reasoning/svamp" in good("tasks", "--data", tmp_path).out.split()
    found = good("tasks", "reasoning/svamp", "--data", tmp_path, "--json").json
    assert found["rows"] == {"train": 0, "validation": 0, "test": 1} and found["first"]["answer"] == "2"


def test_tasks_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MULTITUNE_DATA", raising=False)  # more tasks are listed with it
    assert "data_dir" in bad("tasks", "--data", tmp_path / "none")
    assert good("tasks", "--data", tmp_path).out.split() == list(list_tasks())


# -------------------------------------------------------------------- train


def test_train_has_one_option_per_training_setting() -> None:
    command = dict(_commands())["train"]
    options = {p.name: p for p in command.params}
    for setting in fields_of(TrainConfig):
        assert setting.doc in options[setting.name].help
        assert options[setting.name].default is None
    assert set(options) == {*OPTIONS, "recipe", "as_json"}


def test_train_writes_an_adapter_and_prints_one_row(tmp_path: Path, short: tuple[str, ...]) -> None:
    answer = good("train", "--task", "demo/sentiment", "--method", "ia3", "--out", tmp_path / "a", *short)
    header, _, row = answer.out.splitlines()
    assert header.split() == ["method", "parameters", "with", "head", "accuracy", "kept", "seconds", "size", "adapter"]
    parameters = LAYERS * (2 * WIDTH + INNER)
    assert row.split()[:3] == ["ia3", str(parameters), str(parameters + 2 * WIDTH + 2)]
    assert row.endswith(str(tmp_path / "a"))
    assert "training ia3 for demo/sentiment" in answer.err
    assert "holds a finished adapter" in bad(
        "train", "--task", "demo/sentiment", "--method", "ia3", "--out", tmp_path / "a", *short
    )


def test_a_recipe_trains_and_options_override_it(tmp_path: Path, short: tuple[str, ...]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: demo/topic\nmethod: lora\nset: {r: 4, targets: [query, key]}\nlearning-rate: 2e-3\n"
        f"max_steps: 9\nhead_dropout: 0.3\nseed: 3\nprogress: false\nout: {tmp_path / 'a'}\n"
    )
    flags = ("--set", "r=2", "--pooling", "mean", *short)
    facts = good("train", "--recipe", recipe, *flags, "--json").json
    assert facts["parameters"] == LAYERS * 2 * (WIDTH * 2 + 2 * WIDTH)
    config = json.loads((tmp_path / "a" / "adapter.json").read_text("utf-8"))
    assert config["name"] == "a"
    assert config["method"]["settings"]["targets"] == ["query", "key"]
    assert config["recipe"] | {"learning_rate": 2e-3, "max_steps": 2, "head_dropout": 0.3} == config["recipe"]
    assert (config["seed"], config["head"]["pooling"]) == (3, "mean")
    again = good("train", "--recipe", recipe, *flags, "--overwrite", "--json").json
    assert again["score"] == facts["score"]


def test_several_methods_in_one_adapter(tmp_path: Path, short: tuple[str, ...]) -> None:
    task = ("--task", "demo/topic")
    flags = ("--method", "lora+bitfit", "--set", "lora.r=2", "--set", "bitfit.subset=key", *short)
    answer = good("train", *task, *flags, "--out", tmp_path / "a", "--json")
    assert "training lora+bitfit for demo/topic" in answer.err
    assert answer.json["parameters"] == LAYERS * (2 * 2 * (WIDTH * 2) + WIDTH)
    config = json.loads((tmp_path / "a" / "adapter.json").read_text("utf-8"))["method"]
    assert config["name"] == "lora+bitfit"
    assert (
        config["settings"] | {"methods": ["lora", "bitfit"], "lora.r": 2, "bitfit.subset": ["key"]}
        == config["settings"]
    )
    out = good("inspect", tmp_path / "a").out
    assert "LoRA + BitFit (lora+bitfit)" in out and "lora.r=2" in out
    assert good("evaluate", tmp_path / "a", "--json").json[0]["method"] == "lora+bitfit"
    assert good("merge", tmp_path / "a", "--out", tmp_path / "m", "--json").json["num_deltas"] == 3 * LAYERS


@pytest.mark.parametrize(
    "method",
    [
        "method: [lora: {r: 2, targets: [key]}, ia3]",
        "method: [lora: {r: 8}, ia3]\nset: {lora: {r: 2, targets: [key]}}",
        "method: lora+ia3\nset: {lora.r: 8, lora.targets: key}",
    ],
)
def test_a_recipe_lists_several_methods(tmp_path: Path, short: tuple[str, ...], method: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: demo/topic\n{method}\nout: {tmp_path / 'a'}\n")
    flags = ("--set", "lora.r=2") if "lora.r: 8" in method else ()
    facts = good("train", "--recipe", recipe, *flags, *short, "--json").json
    assert facts["method"] == "lora+ia3"
    assert facts["parameters"] == LAYERS * (2 * 2 * WIDTH + 2 * WIDTH + INNER)


def test_a_task_given_here_replaces_the_recipes_rows(tmp_path: Path, short: tuple[str, ...]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: nowhere.csv\ntext: t\nmethod: head\n")
    flags = ("--task", "demo/topic", "--out", tmp_path / "a")
    assert good("train", "--recipe", recipe, *flags, *short, "--json").json["method"] == "head"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("metod: lora", "Did you mean 'method'?"),
        ("epoch: 3", "Did you mean 'epochs'?"),
        ("[a, b]", "is no mapping of options"),
        ("a: [", "is not YAML"),
        ("task: demo/topic\nmethod: lora\nout: x\nset: r=2", "is a mapping of settings"),
        ("task: demo/topic\nmethod: lora\nout: x\noverwrite: perhaps", "is true or false"),
        (
            "train: rows.csv\nmethod: lora\nout: x\nvalidation: 2",
            "or the share of the rows to hold out, such as 0.3, not 2",
        ),
        ("task: demo/topic\nmethod: lora\nout: x\nepochs: many", "epochs='many'"),
        ("task: demo/topic\nmethod: []\nout: x", "'method' in the recipe is a name, or a list"),
        ("task: demo/topic\nmethod: [lora: 4]\nout: x", "'method' in the recipe is a name, or a list"),
        ("task: demo/topic\nmethod: [lora: {rr: 4}, bitfit]\nout: x", "Did you mean 'r'?"),
        ("task: demo/topic\nmethod: [lora: {r: 4}, full]\nout: x", "'full' changes the backbone's own weights"),
    ],
)
def test_a_recipe_that_cannot_be_honoured_is_refused(tmp_path: Path, text: str, says: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert says in bad("train", "--recipe", recipe)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "train needs --method"),
        (("--method", "lora"), "train needs --out"),
        (("--method", "lora", "--out", "x"), "--task NAME"),
        (("--method", "lorra", "--out", "x", "--task", "demo/topic"), "Did you mean 'lora'?"),
        (("--method", "lora", "--out", "x", "--task", "demo/topik"), "demo/topic"),
        (("--method", "lora", "--out", "x", "--task", "demo/topic", "--set", "rr=2"), "Did you mean 'r'?"),
        (("--method", "lora", "--out", "x", "--task", "demo/topic", "--set", "r=two"), "r='two'"),
        (("--method", "lora", "--out", "x", "--task", "demo/topic", "--set", "r"), "NAME=VALUE"),
        (("--method", "lora", "--out", "x", "--task", "demo/topic", "--train", "f.csv"), "--train cannot be honoured"),
        (("--method", "lora", "--out", "x", "--train", "nowhere.csv"), "nowhere.csv"),
        (("--method", "lora", "--out", "x", "--task", "demo/topic", "--pooling", "max"), "pooling='max'"),
        (("--method", "lora", "--out", "x", "--task", "demo/topic", "--epochs", "0"), "epochs=0"),
        (("--method", "lora", "--out", "x", "--task", "demo/topic", "--device", "cuda:99"), "cuda:99"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--method", "lora+bitfot", "--out", "x", "--task", "demo/topic"), "Did you mean 'bitfit'?"),
        (("--method", "lora+bitfit", "--out", "x", "--task", "demo/topic", "--set", "r=2"), "such as lora.r"),
        (
            ("--method", "lora+bitfit", "--out", "x", "--task", "demo/topic", "--set", "lorra.r=2"),
            "Did you mean 'lora'?",
        ),
    ],
)
def test_train_refuses_what_it_cannot_honour(args: tuple[str, ...], says: str) -> None:
    assert says in bad("train", *args)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    body = "".join(f"{i},{'good' if i % 2 else 'bad'} thing number {i},{'yes' if i % 2 else 'no'}\n" for i in range(30))
    path.write_text("id,note,liked\n" + body)
    return path


def test_own_rows_with_a_tenth_held_out(tmp_path: Path, rows_file: Path, short: tuple[str, ...]) -> None:
    columns = ("--text", "note", "--label", "liked", "--metric", "macro_f1")
    answer = good("train", "--train", rows_file, *columns, "--method", "head", "--out", tmp_path / "a", *short)
    assert "reviews (classification) on 27 rows, judged by macro_f1 on 3" in answer.err
    assert "judged by only 3 rows: one row more or less is 33.3 points" in answer.err
    assert "--validation FILE or --validation 0.3" in answer.err
    assert "macro_f1" in answer.out
    found = good("inspect", tmp_path / "a", "--json").json
    assert found["task"]["labels"] == ["no", "yes"]
    judged = good("evaluate", tmp_path / "a", "--data", rows_file, "--json").json
    assert 0 <= judged[0]["macro_f1"] <= 1
    assert "give them with --data FILE" in bad("evaluate", tmp_path / "a")
    assert "--metric" not in bad("train", "--train", rows_file, "--text", "nte", "--method", "head", "--out", "x")


def test_a_multiple_choice_from_a_table_of_ones_own(tmp_path: Path, short: tuple[str, ...]) -> None:
    rows = [{"premise": f"film {i}", "first": "good", "second": "bad", "answer": i % 2} for i in range(20)]
    file = tmp_path / "causes.jsonl"
    file.write_text(_lines(*rows), "utf-8")
    given = ("--train", file, "--text", "{premise} Why?", "--label", "answer", "--method", "ia3", *short)
    answer = good("train", *given, "--choices", "first,second", "--out", tmp_path / "causes")
    assert "causes (multiple_choice) on 18 rows, judged by accuracy on 2" in answer.err
    found = good("predict", "--adapters", tmp_path / "causes", input=_lines(rows[0])).lines[0]
    assert set(found["probabilities"]) == {"0", "1"}
    assert found["choice"] == ("good", "bad")[int(found["label"])]
    task = good("inspect", tmp_path / "causes", "--json").json["task"]
    assert (task["choices"], task["template"]) == (["first", "second"], ["{premise} Why?"])
    recipe = tmp_path / "recipe.yaml"
    read = []
    for choices in ("first, second", "[first, second]", "['{first}, or so', second]"):
        recipe.write_text(f"train: {file}\ntext: '{{premise}} Why?'\nchoices: {choices}\nlabel: answer\n")
        read.append(task_data(read_recipe(recipe), 0).task.choices)
    assert read == [("first", "second")] * 2 + [("{first}, or so", "second")]
    twice = good("train", *given, "--choices", "first", "--choices", "second", "--out", tmp_path / "again", "--json")
    assert twice.json["metric"] == "accuracy"
    assert "Did you mean 'first'?" in bad("train", *given, "--choices", "frst,second", "--out", tmp_path / "no")


def test_the_order_of_labels_is_honoured(tmp_path: Path, rows_file: Path, short: tuple[str, ...]) -> None:
    given = ("--train", rows_file, "--text", "note", "--label", "liked", "--method", "head", *short)
    good("train", *given, "--labels", "yes, no", "--metric", "f1", "--out", tmp_path / "a")
    assert good("inspect", tmp_path / "a", "--json").json["task"]["labels"] == ["yes", "no"]
    assert "unknown label 'no'" in bad("train", *given, "--labels", "yes,never", "--out", tmp_path / "b")
    assert "--labels cannot be honoured" in bad(
        "train", "--task", "demo/topic", "--labels", "a,b", "--method", "head", "--out", tmp_path / "b"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train: {rows_file}\ntext: note\nlabel: liked\nlabels: [yes, no]\n")
    with pytest.raises(ConfigError, match="'labels' in the recipe: True is no name; put quotes around it"):
        task_data(read_recipe(recipe), 0)
    recipe.write_text(f"train: {rows_file}\nlabels: 3\n")
    with pytest.raises(ConfigError, match="'labels' in the recipe is a list of names, such as"):
        task_data(read_recipe(recipe), 0)


def test_own_rows_in_a_folder_and_in_two_files(tmp_path: Path, rows_file: Path, short: tuple[str, ...]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = rows_file.read_text().splitlines()
    (folder / "train.csv").write_text("\n".join(lines[:21]))
    (folder / "validation.csv").write_text("\n".join([lines[0], *lines[21:]]))
    flags = ("--text", "note", "--label", "liked", "--method", "head", *short)
    answer = good("train", "--train", folder, "--name", "likes", *flags, "--out", tmp_path / "a")
    assert "likes (classification) on 20 rows, judged by accuracy on 10" in answer.err
    more = ("--train", rows_file, "--validation", folder / "validation.csv")
    answer = good("train", *more, *flags, "--out", tmp_path / "b")
    assert "on 30 rows, judged by accuracy on 10" in answer.err


# -------------------------------------------------------------------- evaluate, inspect, fuse, merge


def test_evaluate_agrees_with_training(adapters: Path) -> None:
    found = good("evaluate", adapters / "topic", adapters / "urgency", "--json").json
    assert [f["task"] for f in found] == ["demo/topic", "demo/urgency"]
    trained = json.loads((adapters / "topic" / "adapter.json").read_text("utf-8"))["metrics"]["accuracy"]
    assert found[0]["accuracy"] == pytest.approx(trained, abs=0.03)  # other batches, so a tie may fall otherwise
    assert set(found[1]) > {"pearson_spearman", "pearson", "spearman"}
    lines = good("evaluate", adapters / "topic", "--task", "demo/topic").out.splitlines()
    assert lines[2].split()[1:4] == ["lora", "demo/topic", f"{found[0]['rows']:,}"]


def test_evaluate_leaves_layers_out(adapters: Path) -> None:
    whole, none = (
        good("evaluate", adapters / "topic", "--json", *flags).json[0]["accuracy"]
        for flags in ((), ("--drop-layers", "0,1"))
    )
    assert 0 <= none <= 1 and whole >= 0
    assert "layer 7 does not exist" in bad("evaluate", adapters / "topic", "--drop-layers", "7")
    assert "no deltas of its own in layer 0" in bad("evaluate", adapters / "urgency", "--drop-layers", "0")
    assert "--drop-layers takes layer numbers" in bad("evaluate", adapters / "topic", "--drop-layers", "low")


def test_evaluate_judges_by_the_first_rows(adapters: Path, tmp_path: Path) -> None:
    table = load_task("demo/topic").validation
    table.select(range(7)).to_json(tmp_path / "first.jsonl")
    answer = good("evaluate", adapters / "topic", "--task", "demo/topic", "--rows", "7", "--json")
    (first,) = good("evaluate", adapters / "topic", "--data", tmp_path / "first.jsonl", "--json").json
    assert answer.json == [first]
    assert first["rows"] == 7
    assert answer.err.count(f"judged by the first rows only: 7 of {len(table)}") == 1
    twice = good("evaluate", adapters / "topic", adapters / "topic", "--rows", "7")
    assert twice.err.count("judged by") == 1
    assert [line.split()[3] for line in twice.out.splitlines()[2:]] == ["7", "7"]
    more = good("evaluate", adapters / "topic", "--rows", len(table) + 1, "--json").json
    assert more == good("evaluate", adapters / "topic", "--json").json
    assert more[0]["rows"] == len(table)
    for rows in ("0", "-1"):
        assert f"--rows {rows} is not possible" in bad("evaluate", adapters / "topic", "--rows", rows)


def test_the_first_rows_keep_their_groups_whole(random_adapter: Any, bert: Any) -> None:
    adapter = random_adapter(bert, get_method("lora")(), 1)
    task = Task(
        name="t",
        kind="classification",
        template=("a",),
        label="y",
        labels=("no", "yes"),
        metric="f1a_and_em",
        group=("q",),
    )
    head = Head.for_task(task)
    params = head.init(bert, torch.Generator().manual_seed(0))
    adapter = replace(adapter, task=task, head=head, head_params=params)
    rows = [{"q": q, "a": f"film {i}", "y": i % 2} for i, q in enumerate("abcabcd")]
    for num_rows, kept in ((1, [0, 3]), (2, [0, 1, 3, 4]), (7, range(7)), (9, range(7))):
        assert evaluate(bert, adapter, rows, num_rows=num_rows) == evaluate(bert, adapter, [rows[i] for i in kept])
    with pytest.raises(ConfigError, match="num_rows=0 is not possible; give at least 1"):
        evaluate(bert, adapter, rows, num_rows=0)


def test_evaluate_refuses_what_it_cannot_honour(adapters: Path) -> None:
    assert "give one of them" in bad("evaluate", adapters / "topic", "--task", "demo/topic", "--data", "x.csv")
    assert "no split 'tset'" in bad("evaluate", adapters / "topic", "--split", "tset")
    assert "It holds the adapters topic, urgency" in bad("evaluate", adapters)


def test_inspect(adapters: Path) -> None:
    out = good("inspect", adapters / "topic").out
    for part in ("demo/topic", "business, health", "LoRA (lora)", "r=2", "768 trained", "accuracy", "fingerprint"):
        assert part in out
    assert "max_steps=2" in out
    assert "multitune fuse" in good("inspect", adapters / "urgency").out
    found = good("inspect", adapters / "topic", "--json").json
    assert found["parameters"]["method"] == 768
    assert set(found["files"]) == {"adapter.json", "adapter.safetensors"}


def test_a_damaged_adapter_is_named(adapters: Path, tmp_path: Path) -> None:
    for file in ("adapter.json", "adapter.safetensors"):
        (tmp_path / file).write_bytes((adapters / "topic" / file).read_bytes())
    with (tmp_path / "adapter.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "damaged or truncated" in bad("inspect", tmp_path)


def test_fuse_and_serve_the_table(adapters: Path) -> None:
    assert "multitune fuse" in bad("predict", "--adapters", adapters / "urgency", "Help!", "--aot-store", "mmap")
    found = good("fuse", adapters / "urgency", "--json").json
    assert found["shape"] == [VOCAB, LAYERS, WIDTH]
    assert found["bytes"] > VOCAB * LAYERS * WIDTH * 4
    assert found["max_error"] == found["relative_error"] == 0
    assert "float32" in good("inspect", adapters / "urgency").out
    small = good("fuse", adapters / "urgency", "--dtype", "int8", "--json").json
    assert small["bytes"] < found["bytes"] / 3
    assert 0 < small["relative_error"] < 0.01
    assert f"int8, off by {small['max_error']:.2g} at most" in good("inspect", adapters / "urgency").out
    assert f"{small['max_error']:.2g}" in good("fuse", adapters / "urgency", "--dtype", "int8").out
    good("fuse", adapters / "urgency")
    rows = '{"text": "There is a fire!"}\n'
    one, other = (
        good("predict", "--adapters", adapters / "urgency", "--aot-store", store, input=rows).lines[0]["label"]
        for store in ("factors", "mmap")
    )
    assert one == pytest.approx(other, abs=1e-5)
    (adapters / "urgency" / "table.safetensors").unlink()


def test_fuse_refuses(adapters: Path) -> None:
    assert "there is nothing to fuse" in bad("fuse", adapters / "topic")
    assert "Did you mean 'float16'?" in bad("fuse", adapters / "topic", "--dtype", "float61")


def test_merge(adapters: Path, tmp_path: Path) -> None:
    found = good("merge", adapters / "topic", "--out", tmp_path / "m", "--json").json
    assert found["num_deltas"] == 2 * LAYERS
    assert found["max_difference"] < 1e-4
    assert (tmp_path / "m" / "model.safetensors").exists()
    assert "give --overwrite" in bad("merge", adapters / "topic", "--out", tmp_path / "m")
    assert "deltas folded in" in good("merge", adapters / "topic", "--out", tmp_path / "m", "--overwrite").out
    assert "depends on the token" in bad("merge", adapters / "urgency", "--out", tmp_path / "n")
    moved = tmp_path / "moved"
    shutil.copytree(adapters / "topic", moved)
    about = json.loads((moved / "adapter.json").read_text())
    about["backbone"]["name"] = str(tmp_path / "gone")
    (moved / "adapter.json").write_text(json.dumps(about))
    said = bad("merge", moved, "--out", tmp_path / "n")
    assert "names the backbone it was trained on, which is not there by that name: give --backbone" in said
    assert not (tmp_path / "n").exists()


# -------------------------------------------------------------------- predict


def _lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = (
    {"adapter": "topic", "text": "The team won the final in the last minute of a long and very eventful evening."},
    {"adapter": None, "text": "bare"},
    {"adapter": "urgency", "text": "Help!", "score": "a label is not read"},
    {"adapter": "topic", "text": "Shares fell."},
    {"adapter": None, "text": "a pair", "text_pair": "of texts"},
)


def test_predict_keeps_the_order_whatever_the_batches(adapters: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_lines(*ROWS))
    at_once = good("predict", "--adapters", adapters, "--input", file).lines
    assert [a["adapter"] for a in at_once] == [row["adapter"] for row in ROWS]
    assert [sorted(a) for a in at_once[:2]] == [["adapter", "label", "probabilities"], ["adapter", "embedding"]]
    assert set(at_once[0]["probabilities"]) == set(load_task("demo/topic").task.labels)
    assert len(at_once[1]["embedding"]) == WIDTH
    assert isinstance(at_once[2]["label"], float)
    both = (f"topic={adapters / 'topic'}", f"urgency={adapters / 'urgency'}")
    one_by_one = good(
        *("predict", "--adapters", both[0], "--adapters", both[1], "--window", "1", "--batch-size", "1"),
        *("--output", tmp_path / "answers.jsonl"),
        input=_lines(*ROWS),
    )
    assert one_by_one.out == ""
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()]
    for a, b in zip(at_once, written, strict=True):
        assert a["adapter"] == b["adapter"]
        assert a.get("label") == pytest.approx(b.get("label"), abs=1e-4)
        assert a.get("embedding") == pytest.approx(b.get("embedding"), abs=1e-4)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no valid JSON"),
        ("[1]", "a line is an object"),
        ('{"text": "x"}', 'no "adapter"; name one of topic, urgency'),
        ('{"adapter": "topik", "text": "x"}', "Did you mean 'topic'?"),
        ('{"adapter": 3, "text": "x"}', "no adapter 3"),
        ('{"adapter": "topic", "txt": "x"}', "Did you mean 'txt'?"),
        ('{"adapter": "topic", "text": null}', "is empty"),
        ('{"adapter": null, "sentence": "x"}', 'has a "text"'),
    ],
)
def test_a_bad_line_is_named_after_the_good_ones_are_answered(adapters: Path, line: str, says: str) -> None:
    answer = Answer("predict", "--adapters", adapters, input=_lines(ROWS[0]) + "\n" + line + "\n" + _lines(ROWS[3]))
    assert answer.code == 1
    assert [a["adapter"] for a in answer.lines] == ["topic"]
    (problem,) = answer.err.splitlines()
    assert problem.startswith("error: line 3, column 2: " if line == "{" else "error: line 3: ")
    assert says in problem


def test_a_line_that_is_no_json_is_named_by_file_line_and_column(adapters: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(_lines(ROWS[0]) + '{"adapter": "topic" "text": "x"}\n' + _lines(ROWS[3]), "utf-8")
    answer = Answer("predict", "--adapters", adapters, "--input", file)
    assert answer.code == 1 and len(answer.lines) == 1
    assert answer.err == (
        "error: rows.jsonl, line 2, column 21: no valid JSON: Expecting ',' delimiter. The lines before it are "
        "answered; it and those after it are not\n"
    )


def test_a_line_that_the_bank_refuses_is_named_after_those_before_it_are_answered(
    adapters: Path, pair: Path, tmp_path: Path
) -> None:
    """Whichever window and batch it is in, and whichever rows have a backbone of their own."""
    shutil.copytree(adapters / "topic", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "adapter.json").read_text("utf-8"))
    (tmp_path / "short" / "adapter.json").write_text(json.dumps(config | {"max_length": 1}), "utf-8")
    full = {"adapter": "pair", "text": "a b", "text_pair": "b a"}
    rows = (ROWS[0], full, ROWS[1], ROWS[3], full, ROWS[0], {"adapter": "short", "text": "The moon."}, full)
    given = ("predict", "--adapters", adapters, "--adapters", pair, "--adapters", tmp_path / "short")
    for more in ((), ("--window", "3"), ("--window", "1"), ("--batch-size", "2")):
        answer = Answer(*given, *more, input="\n" + _lines(*rows))
        assert answer.code == 1
        assert [a["adapter"] for a in answer.lines] == [row["adapter"] for row in rows[:6]]
        assert answer.err.splitlines()[-1].startswith("error: line 8: ")
        assert "tokens cannot be cut to the 1 that" in answer.err and "row " not in answer.err
    assert bad(*given, "--batch-size", "0", input=_lines(*rows)).startswith("error: batch_size=0 is not possible")


def test_a_line_that_is_not_utf8_is_named(adapters: Path) -> None:
    assert "line 1: no valid JSON" in bad(
        "predict", "--adapters", adapters, input=b'{"adapter": "topic", "text": "\xff"}\n'
    )


def test_one_row_on_the_command_line(adapters: Path) -> None:
    lines = good("predict", "--adapters", adapters / "topic", "Shares fell.").out.splitlines()
    assert len(lines) == 2 + 6
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[2:]]
    assert shares == sorted(shares, reverse=True)
    found = good("predict", "--adapters", adapters / "topic", "Shares fell.", "--json").json
    assert found["label"] == lines[2].split()[0]
    assert float(good("predict", "--adapters", f"u={adapters / 'urgency'}", "Help!").out) == pytest.approx(0, abs=3)


def test_predict_leaves_layers_out(adapters: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(adapters / "topic")
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(t.shape, generator=generator) for name, t in adapter.params.items()}
    saved = replace(adapter, params=params).save(tmp_path / "topic")
    bank = Bank(load_backbone(adapter.backbone["name"]))
    bank.add("topic", saved, drop_layers=(0, 2))
    (expected,) = bank.predict([("topic", "The moon.")])
    rows = _lines({"adapter": "topic", "text": "The moon."})
    given = ("predict", "--adapters", tmp_path / "topic")
    (found,), (whole,) = (good(*given, *more, input=rows).lines for more in (("--drop-layers", "0,2"), ()))
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert whole["probabilities"] != pytest.approx(expected.probabilities, abs=1e-3)
    assert "--drop-layers takes layer numbers" in bad(*given, "--drop-layers", "low", input=rows)
    assert "layer 7 does not exist" in bad(*given, "--drop-layers", "7", input=rows)


def test_an_embedding_is_shown_by_its_first_numbers(adapters: Path, tmp_path: Path) -> None:
    task = Task(name="vectors", kind="embedding", template=("text",))
    adapter = replace(Adapter.load(adapters / "topic"), task=task, head=Head.for_task(task), head_params={})
    given = ("predict", "The moon.", "--adapters", adapter.save(tmp_path / "vectors").path)
    whole = good(*given, "--json").json["embedding"]
    assert len(whole) == WIDTH
    shown = good(*given).out.strip()
    assert shown == f"[{', '.join(f'{v:.4f}' for v in whole[:4])}, …] ({WIDTH} numbers; --json prints them all)"


def test_a_fully_tuned_adapter_is_served_beside_the_others(adapters: Path, pair: Path) -> None:
    rows = (
        {"adapter": "pair", "sentence1": "a b", "sentence2": "b a"},
        ROWS[0],
        {"adapter": "pair", "text": "a b", "text_pair": "b a"},
    )
    found = good("predict", "--adapters", pair, "--adapters", adapters / "topic", input=_lines(*rows)).lines
    assert [a["adapter"] for a in found] == ["pair", "topic", "pair"]
    assert found[0]["probabilities"] == pytest.approx(found[2]["probabilities"], abs=1e-5)
    only = good("predict", "--adapters", pair, "a b", "b a", "--json").json
    assert only["probabilities"] == pytest.approx(found[0]["probabilities"], abs=1e-4)


def test_several_adapters_may_follow_one_option(adapters: Path) -> None:
    both = (adapters / "topic", f"u={adapters / 'urgency'}")
    rows = _lines({"adapter": "u", "text": "Help!"}, ROWS[0])
    found = good("predict", "--adapters", *both, "--input", "-", input=rows).lines
    assert [a["adapter"] for a in found] == ["u", "topic"]
    long = "a very long text " * 500
    assert good("predict", "--adapters", adapters / "topic", long, "--json").json["adapter"] == "topic"


def test_predict_refuses_what_it_cannot_honour(adapters: Path, tmp_path: Path) -> None:
    one = adapters / "topic"
    assert "predict needs adapters" in bad("predict", "x")
    assert "not 1 text(s) for 2" in bad("predict", "--adapters", adapters, "x")
    assert "two adapters are called 'topic'" in bad("predict", "--adapters", one, "--adapters", one)
    assert "cannot all be called 'a'" in bad("predict", "--adapters", f"a={adapters}")
    assert "is not an adapter folder" in bad("predict", "--adapters", tmp_path, "x")
    assert "drop --input and --output" in bad("predict", "--adapters", one, "x", "--output", tmp_path / "o")
    (tmp_path / "rows.jsonl").write_text("")
    assert "Did you mean 'rows.jsonl'?" in bad("predict", "--adapters", one, "--input", tmp_path / "row.jsonl")
    assert "No such file" in bad("predict", "--adapters", one, "--output", tmp_path / "no" / "o", input="")
    assert "window=0" in bad("predict", "--adapters", one, "--window", "0")
    assert "aot_store 'disk'" in bad("predict", "--adapters", one, "--aot-store", "disk", input="")
    assert "dtype 'float8'" in bad("predict", "--adapters", one, "--dtype", "float8", input="")


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    tmp_path: Path, short: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("train", "--task", "demo/topic", "--method", "bitfit", "--out", out, *short, "--max-steps", 4)
    command = (*command, "--evaluations-per-epoch", 100)
    good(*command[:6], tmp_path / "whole", *command[7:])
    after_step = get_method("bitfit").after_step

    def stop(self: Any, params: Any, step: int, num_steps: int) -> None:
        after_step(self, params, step, num_steps)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(get_method("bitfit"), "after_step", stop)
        stopped = Answer(*command)
    assert stopped.code == 130
    assert "interrupted; the last checkpoint is step " in stopped.err.splitlines()[-1]
    assert f"in {out}; give the same command to go on" in stopped.err
    resumed = good(*command)
    assert "resuming at step " in resumed.err and " of 4" in resumed.err
    tensors = [folder / "adapter.safetensors" for folder in (out, tmp_path / "whole")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()


def test_a_damaged_adapter_stops_only_the_rows_that_ask_for_it(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "topic", tmp_path / "topic")
    shutil.copytree(adapters / "topic", tmp_path / "lost")
    (tmp_path / "lost" / "adapter.safetensors").write_bytes(b"x")
    answer = good("predict", "--adapters", tmp_path, input=_lines({"adapter": "topic", "text": "The moon."}))
    assert len(answer.lines) == 1
    assert "left out adapter 'lost'" in answer.err and "damaged" in answer.err
    says = bad("predict", "--adapters", tmp_path, input=_lines({"adapter": "lost", "text": "The moon."}))
    assert "line 1: adapter 'lost' could not be loaded" in says
    assert 'no "adapter"' in bad("predict", "--adapters", tmp_path, input=_lines({"text": "Whose?"}))
    assert "damaged" in bad("predict", "--adapters", tmp_path / "lost", "x")


def test_what_was_guessed_and_what_is_empty_is_said(tmp_path: Path, short: tuple[str, ...]) -> None:
    file, out = tmp_path / "rows.csv", tmp_path / "out"
    file.write_text("text,label\n" + "".join(f"{'' if i == 3 else f'row {i}'},{'ab'[i % 2]}\n" for i in range(20)))
    train = ("train", "--train", file, "--validation", file, "--method", "bitfit", "--out", out, *short)
    err = good(*train).err
    assert "reading the text from text and the answer from label (2 labels: a, b)" in err
    assert "warning: task 'rows': 1 of 20 train rows have an empty text (rows 3, counted from 0)" in err
    assert "validation rows have an empty text" in err
    err = good("evaluate", out, "--data", file).err
    assert "given rows have an empty text" in err
    assert f"held out by its seed is in `multitune inspect {out}`" in err
    assert "reading the text" not in good(*train, "--overwrite", "--text", "text", "--label", "label").err


def test_a_recipe_of_many_jobs_is_checked(tmp_path: Path) -> None:
    recipe = tmp_path / "many.yaml"

    def refused(text: str) -> str:
        recipe.write_text(text)
        return bad("train-many", recipe, "--out", tmp_path / "out")

    assert "needs 'jobs', a list" in refused("epochs: 1\n")
    assert "unknown key 'job'. Did you mean 'jobs'" in refused("job: []\n")
    assert "job 2: key 'device' is unknown, or the same for all" in refused(
        "jobs: [{task: demo/topic, method: lora}, {task: demo/topic, method: lora, device: cpu}]\n"
    )
    assert "job 1: it names no method" in refused("jobs: [{task: demo/topic}]\n")
    assert "job 1: train needs data" in refused("jobs: [{method: lora}]\n")
    named = refused("jobs: [{task: demo/topic, method: lora, lr: 1}]\n")
    assert "job 1: key 'lr' is unknown" in named and "Did you mean 'learning_rate'" in named
    assert "a job is called as its folder: give out: FOLDER/mine" in refused(
        "jobs: [{task: demo/topic, method: lora, name: mine}]\n"
    )
    assert f"no recipe {tmp_path / 'mani.yaml'}. Did you mean 'many.yaml'?" in bad("train-many", tmp_path / "mani.yaml")
    assert "job 2: 'set' in the recipe is a mapping" in refused(
        "set: {r: 4}\njobs: [{task: demo/topic, method: lora}, {task: demo/topic, method: lora, set: r=16}]\n"
    )
    assert "'set' in the recipe is a mapping" in refused("set: r=4\njobs: [{task: demo/topic, method: lora}]\n")
    one = "jobs: [{task: demo/topic, method: lora, overwrite: %s}]\n"
    assert "job 1: 'overwrite' in the recipe is true or false, not 'no'" in refused(one % "'no'")
    for number in ("many", "2.5", "true"):
        said = refused(f"max_jobs: {number}\njobs: [{{task: demo/topic, method: lora}}]\n")
        assert "'max_jobs' in the recipe is a whole number" in said
    recipe.write_text("jobs: [{task: demo/topic, method: lora}]\n")
    assert "needs --out" in bad("train-many", recipe)
    assert not (tmp_path / "out").exists()


def test_jobs_whose_folders_join_to_one_name_keep_the_slashes() -> None:
    folders = ["a-b/c", "a/b/c", "d/c", "e"]
    jobs = [TrainJob(data=None, method="lora", output_dir=folder) for folder in folders]  # type: ignore[arg-type]
    assert [job.name for job in _with_names(jobs)] == ["a-b/c", "a/b/c", "d-c", "e"]


def test_jobs_of_folders_of_one_name_are_called_by_their_paths(tmp_path: Path, short: tuple[str, ...]) -> None:
    recipe = tmp_path / "many.yaml"
    outs = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b" / "y"]
    shared = f"backbone: {short[1]}\ntask: demo/topic\nmax_steps: 1\nbatch_size: 2\neval_batch_size: 64\nmax_length: 8"
    recipe.write_text(f"{shared}\nmethod: bitfit\njobs: [{', '.join(f'{{out: {out}}}' for out in outs)}]\n")
    lines = good("train-many", recipe, "--out", tmp_path / "all", "--json").json
    whole = ["-".join(out.parts[1:]) for out in outs]
    assert [line["job"] for line in lines] == [*whole[:2], "y"]
    assert [line["adapter"] for line in lines] == list(map(str, outs))


# ---- answers as text


@pytest.fixture
def tiny_llama(tmp_path: Path, make_model: Any, make_backbone: Any) -> Path:
    """The folder of a tiny causal language model."""
    from transformers import LlamaForCausalLM

    base = make_model("llama", tie_word_embeddings=True, max_position_embeddings=640)
    whole = LlamaForCausalLM(base.config)
    whole.model.load_state_dict(base.state_dict())
    whole.save_pretrained(tmp_path / "llama")
    make_backbone("llama").tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_pattern_trains_ranks_and_is_shown(tmp_path: Path, tiny_llama: Path) -> None:
    said = ("positive=good", "negative=bad", "positive=very good")
    pattern = ("--pattern", "{text} is {mask}", *(part for text in said for part in ("--verbalizer", text)))
    short = ("--max-steps", "1", "--batch-size", "2", "--progress", "false", "--learning-rate", "1e-3")
    common = ("--task", "demo/sentiment", "--method", "ia3", "--backbone", tiny_llama, "--out", tmp_path / "a")
    good("train", *common, *pattern, *short, "--losses", "language+choice", "--distill-examples", "1")
    shown = good("inspect", tmp_path / "a", "--json").json
    assert shown["task"]["pattern"]["verbalizer"] == {"positive": ["good", "very good"], "negative": "bad"}
    assert shown["recipe"]["losses"] == "language+choice" and "{text} is {mask}" in good("inspect", tmp_path / "a").out
    answer = good("predict", "a good film", "--adapters", tmp_path / "a", "--json").json
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert good("evaluate", tmp_path / "a", "--task", "demo/sentiment", "--json").json[0]["accuracy"] >= 0


def test_a_recipe_with_a_pattern_is_that_of_the_flags(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = ("task: demo/sentiment", "pattern: '{text} {mask}'", "verbalizer: {positive: good}", "instruction: Say.")
    recipe.write_text("\n".join(lines))
    made = task_data(read_recipe(recipe), 0).task.pattern
    assert made == Pattern("{text} {mask}", {"positive": "good"}, instruction="Say.")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--verbalizer", "positive=good"), "belongs to a pattern; give --pattern too"),
        (("--pattern", "{text}", "--verbalizer", "good"), "--verbalizer takes LABEL=TEXT, such as --verbalizer"),
        (("--pattern", "{text}", "--verbalizer", "positve=good"), "Did you mean 'positive'"),
        (("--pattern", "{text} {mask} {mask}"), "more than once"),
    ],
)
def test_patterns_on_the_command_line_are_checked(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    answer = Answer("train", "--task", "demo/sentiment", "--method", "ia3", "--out", tmp_path / "a", *options)
    assert answer.code == 1 and says in answer.err
