"""`multitune train --kind generation`, `multitune evaluate` and `multitune generate`, in process on a tiny model."""

import io
import json
import shutil
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from multitune import Backbone, Bank, get_method
from multitune.cli import app
from multitune.cli.generate import _say_why_empty
from multitune.cli.generate_lines import warn_of_classifiers
from multitune.cli.predict import standard_input
from multitune.generation import Engine, Generation

ROWS = [{"facts": f"film {c}", "said": f"good {c}"} for c in "abcdefghij"]


def run(*args, code=0, input=None):
    result = CliRunner().invoke(app, [str(a) for a in args], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_backbone):
    """A tiny language model in a folder, a table, and two adapters that write, one of them fully tuned."""
    root = tmp_path_factory.mktemp("writing")
    tiny = make_backbone("gpt2", tie_word_embeddings=True)
    tiny.detach()
    tiny.model.save_pretrained(root / "model")
    tiny.tokenizer.save_pretrained(root / "model")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    for method in ("lora", "full"):
        done = run(
            *(
                "train",
                "--train",
                root / "rows.jsonl",
                "--kind",
                "generation",
                "--text",
                "{facts} :",
                "--label",
                "said",
            ),
            *("--metric", "exact_match", "--format", "plain", "--method", method, "--out", root / "adapters" / method),
            *("--backbone", root / "model", "--max-steps", "2", "--batch-size", "4", "--max-length", "24"),
            *("--progress", "false", "--json"),
        )
        assert json.loads(done.stdout)["metric"] == "perplexity"
        assert "judged by perplexity on 1" in done.stderr
        assert "exact_match is of written texts: `multitune generate` judges the adapter by it" in done.stderr
    return root


def test_rows_of_any_adapter_are_written_in_order(made):
    rows = [
        {"adapter": "lora", "facts": "film a", "said": "never read"},
        {"adapter": "full", "facts": "film b"},
        {"adapter": None, "text": "the film"},
        {"adapter": "lora", "text": "film a"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    done = run("generate", "--adapters", made / "adapters", "--max-new-tokens", "4", input=lines)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["adapter"] for f in found] == ["lora", "full", None, "lora"]
    assert found[0] == found[3] and all(len(f["token_ids"]) <= 4 for f in found)
    alone = run("generate", "film a", "--adapters", made / "adapters/lora", "--max-new-tokens", "4", "--json")
    assert json.loads(alone.stdout)["token_ids"] == found[0]["token_ids"]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_line_may_have_settings_of_its_own(made):
    row = {"adapter": "lora", "facts": "film a"}
    drawn = {"temperature": 30.0, "seed": 1, "stop_at_eos": False}
    rows = lines(row, row | drawn, row | drawn, row | drawn | {"seed": 2}, row | {"max_new_tokens": 1}, row)
    given = ("--adapters", made / "adapters/lora", "--max-new-tokens", "5")
    found = [json.loads(line)["token_ids"] for line in run("generate", *given, input=rows).stdout.splitlines()]
    assert found[0] == found[5] and found[4] == found[0][:1]
    assert found[1] == found[2] and len({tuple(ids) for ids in found}) == 4
    # what the command line says holds for the lines that say nothing
    (first, other) = [
        json.loads(line)["token_ids"]
        for line in run(
            "generate", *given, "--temperature", "30", "--seed", "1", input=lines(row | {"stop_at_eos": False}, row)
        ).stdout.splitlines()
    ]
    assert first == found[1] and other == first[: len(other)]


def test_a_column_that_is_called_like_a_setting_is_the_column(made, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "seeds"
    file.write_text(lines(*({"seed": f"film {c}", "said": "good"} for c in "abcdef")), "utf-8")
    texts = ("--train", file, "--kind", "generation", "--text", "{seed} :", "--label", "said", "--format", "plain")
    short = ("--max-steps", "1", "--batch-size", "2", "--max-length", "24", "--progress", "false")
    run("train", *texts, "--method", "lora", "--out", out, "--backbone", made / "model", *short)
    rows = lines({"seed": "film a"}, {"text": "film a"})
    one, other = run("generate", "--adapters", out, "--max-new-tokens", "3", input=rows).stdout.splitlines()
    assert one == other


def test_a_teacher_is_asked_for_by_flags_and_writes_the_answers_that_rows_lack(tmp_path, made):
    file, out = tmp_path / "rows.jsonl", tmp_path / "taught"
    rows = [{**row, "said": row["said"] if number < 4 else None} for number, row in enumerate(ROWS)]
    file.write_text(lines(*rows), "utf-8")
    texts = ("--train", file, "--kind", "generation", "--text", "{facts} :", "--label", "said", "--format", "plain")
    short = ("--max-steps", "1", "--batch-size", "2", "--max-length", "24", "--progress", "false", "--json")
    teacher = ("--distill-examples", "1", "--distill-instruction", "the film", "--distill-weight", "0.5")
    common = (*texts, *short, *teacher, "--method", "lora", "--out", out, "--backbone", made / "model")
    refused = run("train", *common, code=1).stderr
    assert "the answer is empty" in refused and "--distill-new-tokens 64" in refused
    done = run("train", *common, "--distill-new-tokens", "3")
    assert "judged by distillation on" in done.stderr and json.loads(done.stdout)["metric"] == "distillation"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "film a", "temprature": 0.7}, "unknown key 'temprature'. Did you mean 'temperature'?"),
        ({"text": "film a", "beams": 2}, "unknown key 'beams'. Did you mean 'num_beams'?"),
        ({"fact": "film a"}, "unknown key 'fact'. Did you mean 'facts'?"),
        ({"text": "film a", "temperature": "hot"}, "temperature='hot' is not possible; give a number, 0 or more"),
        (
            {"adapter": None, "text": "film a", "facts": "b"},
            "unknown key 'facts'. A line has an adapter, columns (text)",
        ),
    ],
)
def test_what_a_line_says_is_honoured_or_refused(made, row, words):
    rows = lines({"text": "film a"}, row)
    assert f"line 2: {words}" in run("generate", "--adapters", made / "adapters/lora", input=rows, code=1).stderr


def test_a_task_whose_rows_the_adapter_cannot_read_is_refused_with_its_own(made):
    given = ("generate", "--adapters", made / "adapters/lora", "--task", "demo/topic")
    words = "rows of task 'demo/topic', of kind classification, have the columns text, label, and not facts, which the"
    said = run(*given, code=1).stderr
    assert words in said and "it was trained on task 'rows'" in said


def test_beams_that_do_not_fit_are_named_by_line_and_option(made):
    given = ("generate", "--adapters", made / "adapters/lora", "--beams", "3", "--batch-size", "2")
    words = "beams are more rows than batch_size=2; raise it"
    assert f"line 1: 3 {words}" in run(*given, input=lines({"text": "film a"}), code=1).stderr
    said = run(*given[:3], "--input", made / "rows.jsonl", "--max-new-tokens", "9999", code=1).stderr
    assert said.startswith("error: rows.jsonl, line 1: ")  # a file is named, whoever finds what is wrong
    assert f"error: 3 {words}" in run(*given, "film a", code=1).stderr


def test_the_line_that_cannot_be_written_is_named_before_any_is_written(made, tmp_path, monkeypatch):
    """In the file's own numbers, whichever backbone its adapter has, and the output keeps what it held."""
    good, alone = {"adapter": "lora", "text": "film a"}, {"adapter": "full", "text": "film a"}
    long = {"adapter": None, "text": "film a", "max_new_tokens": 100_000}
    short = ("generate", "--adapters", made / "adapters", "--max-new-tokens", "2")
    given = (*short, "--output", tmp_path / "out")
    (tmp_path / "out").write_text("kept")
    steps = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: steps.append(engine) or step(engine))
    for rows in ((good, alone, good, long), (good, alone, alone, {**long, "adapter": "full"})):
        said = run(*given, input="\n" + lines(*rows), code=1).stderr.splitlines()[-1]
        assert said.startswith("error: line 5: ") and "row " not in said
    assert not steps and (tmp_path / "out").read_text() == "kept"
    said = run(*short, "--output", tmp_path / "no" / "out", input=lines(good), code=1).stderr
    assert "No such file" in said and not steps
    run(*given, input=lines(good, alone))
    assert steps and len((tmp_path / "out").read_text().splitlines()) == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text(lines(good))
    assert "would be emptied" in run(*short, "--input", rows, "--output", rows, code=1).stderr
    assert rows.read_text() == lines(good)


def test_texts_stand_beside_references(made, tmp_path):
    given = ("generate", "--adapters", made / "adapters/lora", "--data", made / "rows.jsonl", "--max-new-tokens", "3")
    done = run(*given, "--rows", "3", "--out", tmp_path / "out", "--json")
    scores = json.loads(done.stdout)
    assert scores["rows"] == 3 and "exact_match" in scores and "predictions.html" in done.stderr
    assert len((tmp_path / "out" / "predictions.jsonl").read_text("utf-8").splitlines()) == 3
    assert "exact_match" in run(*given).stdout


def test_evaluate_measures_perplexity(made):
    done = run("evaluate", made / "adapters/lora", "--data", made / "rows.jsonl", "--json")
    (found,) = json.loads(done.stdout)
    assert found["perplexity"] > 1
    command = f"multitune generate --adapters {made / 'adapters/lora'} --data {made / 'rows.jsonl'}"
    assert done.stderr.splitlines()[-1].endswith(command)
    assert json.loads(run(*command.split()[1:], "--max-new-tokens", "2", "--json").stdout)["rows"] == len(ROWS)
    few = run("evaluate", made / "adapters/lora", "--data", made / "rows.jsonl", "--rows", "1", "--json")
    first = made / "first.jsonl"
    first.write_text(lines(ROWS[0]), "utf-8")
    alone = run("evaluate", made / "adapters/lora", "--data", first, "--json")
    assert json.loads(few.stdout) == json.loads(alone.stdout) != [found]
    assert "judged by the first rows only: 1 of 10" in few.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--task", "x", "--data", "y"), "give one of them"),
        (("--data", "y", "--input", "z"), "bring their own rows"),
        (("--out", "z"), "--out is for the rows of a task; give --task NAME or --data FILE too"),
        (("--rows", "3"), "--rows is for the rows of a task"),
        (("--split", "test"), "--split is for the rows of a task"),
        (("--data", "y", "--rows", "0"), "--rows 0 is not possible; give 1 or more"),
        (("--task", "y", "--examples", "-1"), "--examples -1 is not possible; give 0 or more"),
        (("--temperature", "-1"), "temperature=-1.0"),
        (("text",), "for one adapter, not 2"),
    ],
)
def test_what_cannot_be_honoured_is_refused(made, args, words):
    done = run("generate", *args, "--adapters", made / "adapters", code=1)
    assert words in done.stderr.splitlines()[-1]


def test_predict_says_to_generate(made):
    done = run("predict", "film a", "--adapters", made / "adapters/lora", code=1)
    assert "writes texts and predicts no label; use Bank.generate" in done.stderr


def test_several_adapters_may_stand_behind_one_option(made):
    """As `--adapters adapters/*` gives them, and as `multitune predict` takes them."""
    rows = lines({"adapter": "b", "text": "film a"}, {"adapter": "lora", "text": "film a"})
    both = ("generate", "--adapters", made / "adapters/lora", f"b={made / 'adapters/lora'}", "--max-new-tokens", "2")
    one, other = [json.loads(line)["token_ids"] for line in run(*both, input=rows).stdout.splitlines()]
    assert one == other
    said = run(*both, "film", "a", code=1).stderr
    assert "one text for one adapter, not 2: 'film', 'a', of which none is the folder of an adapter" in said


def test_a_line_is_printed_as_soon_as_it_and_those_before_it_are_done(made, monkeypatch):
    """What is done when a later step fails, or the command is stopped, is kept."""
    step, steps = Engine.step, []

    def failing(engine):
        steps.append(engine)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", failing)
    row = {"text": "film a", "stop_at_eos": False}
    rows = lines(row | {"max_new_tokens": 2}, row | {"max_new_tokens": 9}, row | {"max_new_tokens": 1})
    given = ["generate", "--adapters", str(made / "adapters/lora")]
    result = CliRunner().invoke(app, given, input=rows)
    (line,) = result.stdout.splitlines()
    assert len(json.loads(line)["token_ids"]) == 2


def test_a_line_may_be_a_chat(made, tmp_path, capsys):
    model = shutil.copytree(made / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}good")
    given = ("generate", "--backbone", model, "--max-new-tokens", "1")
    chat = {"messages": [{"role": "user", "content": "film a"}]}
    (line,) = run(*given, input=lines(chat)).stdout.splitlines()
    assert json.loads(line)["num_prompt_tokens"] == 3
    for row, words in (
        ({"messages": "film a"}, '"messages" is a list such as [{"role": "user", "content": "…"}], not \'film a\''),
        (chat | {"text": "film"}, "\"messages\" are a whole prompt, so that 'text' would not be read"),
        ({"adapter": None}, 'a row without an adapter has a "text", or the "messages" of a chat'),
        ({"messages": [{"role": "user"}]}, "line 1: a prompt is a text, a list of messages with"),
    ):
        assert words in run(*given, input=lines(row), code=1).stderr
    bank = Bank(Backbone.load(model))
    ended = Generation(text="", token_ids=(11,), finish_reason="eos")
    _say_why_empty(bank, ended)
    assert "the text is empty: the model ended it at once. Without an adapter" in capsys.readouterr().err
    _say_why_empty(bank, replace(ended, adapter="some"))
    assert capsys.readouterr().err == "the text is empty: the model ended it at once\n"
    _say_why_empty(bank, replace(ended, text="some"))
    assert capsys.readouterr().err == ""


def test_a_stop_string_with_an_escape_is_taken_as_it_stands_and_said_to_be(made):
    given = ("generate", "film a", "--adapters", made / "adapters/lora", "--max-new-tokens", "1")
    said = run(*given, "--stop", r"good\n").stderr
    assert r"if a line break or a tab is meant: --stop $'good\n'" in said
    assert "warning" not in run(*given, "--stop", "good").stderr


def test_a_terminal_is_told_that_rows_are_read_from_it(monkeypatch, capsys):
    for terminal in (True, False):
        stdin = io.TextIOWrapper(io.BytesIO(b"row"))
        monkeypatch.setattr(stdin, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert standard_input().read() == b"row"
        assert ("reading rows from this terminal" in capsys.readouterr().err) is terminal


def test_texts_may_be_judged_by_another_metric_than_the_task_names(made, monkeypatch):
    rows = ("--data", made / "rows.jsonl", "--rows", "2", "--max-new-tokens", "3", "--json")
    given = ("generate", "--adapters", made / "adapters/lora", *rows)
    assert "exact_match" in json.loads(run(*given).stdout)
    found = json.loads(run(*given, "--metric", "chrf").stdout)
    assert "chrf" in found and "exact_match" not in found
    monkeypatch.setattr(Bank, "generate", lambda *a, **k: pytest.fail("wrote for references that cannot be judged by"))
    assert "the reference 'good a' holds no number" in run(*given, "--metric", "number_match", code=1).stderr
    assert "metric 'accuracy' does not judge generation" in run(*given, "--metric", "accuracy", code=1).stderr


def test_an_adapter_that_was_not_trained_to_write_is_said_to_be(make_backbone, random_adapter, capsys):
    bank = Bank(make_backbone("gpt2"))
    bank.add("mood", random_adapter(bank.backbone, get_method("ia3")(), pooling="last"))
    warn_of_classifiers(bank, [None, "mood", "mood"])
    said = capsys.readouterr().err
    assert said.startswith("warning: adapter 'mood' was trained for classification") and said.count("warning") == 1
