"""`multitune train --mixture` and `--examples`, `evaluate --mixture`, `generate --examples`, on a tiny model."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from typer.testing import CliRunner

from multitune import Adapter, Bank
from multitune.cli import app

FAST = ("--max-steps", "2", "--batch-size", "4", "--max-length", "120", "--progress", "false", "--json")


def run(*args, code=0, input=None):
    result = CliRunner().invoke(app, [str(a) for a in args], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_backbone):
    """A tiny language model, and a folder of suites with three tasks."""
    root = tmp_path_factory.mktemp("instructions")
    tiny = make_backbone("llama", tie_word_embeddings=True, max_position_embeddings=300)
    tiny.detach()
    tiny.model.save_pretrained(root / "model")
    tiny.tokenizer.save_pretrained(root / "model")

    def write(path, rows, features=None):
        (root / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(root / "data" / path)

    label = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    for name in ("one", "two"):
        for split in ("train", "validation"):
            write(f"moods/{name}/{split}.parquet", [{"text": f"{name} {c}", "label": 1} for c in "abcdef"], label)
    said = [{"meaning_representation": f"film {c}", "human_reference": f"good {c}"} for c in "abcdef"]
    for split in ("train", "validation"):
        write(f"nlg/e2e_nlg/{split}.parquet", said)
    (root / "mixture.yaml").write_text("tasks: [moods/one, moods/two, nlg/e2e_nlg]\nheld_out: [moods/two]\nrows: 12\n")
    return root


@pytest.fixture(autouse=True)
def data(place, monkeypatch):
    monkeypatch.setenv("MULTITUNE_DATA", str(place / "data"))


def train(place, out, *args, code=0):
    model = ("--backbone", place / "model", "--method", "lora", "--out", place / out)
    return run("train", *args, *model, *FAST, code=code)


def test_a_mixture_is_trained_on_and_its_held_out_tasks_judged(place):
    done = train(place, "mixed", "--mixture", place / "mixture.yaml")
    assert "training lora for mixture (generation) on 12 rows" in done.stderr
    task = Adapter.load(place / "mixed").task
    assert (task.columns, task.format) == (("prompt",), "plain")
    judged = run("evaluate", place / "mixed", "--mixture", place / "mixture.yaml", "--rows", "3", "--json")
    before, after = json.loads(judged.stdout)
    assert before["adapter"] == "bare backbone" and after["adapter"] == str(place / "mixed")
    assert {k: before[k] for k in ("task", "metric", "rows", "chance")} == {
        "task": "moods/two",
        "metric": "accuracy",
        "rows": 3,
        "chance": 0.5,
    }
    out = ("--rows", "3", "--out", place / "judged")
    table = run("evaluate", place / "mixed", "--mixture", place / "mixture.yaml", *out).stdout
    assert "moods/two" in table and "bare backbone" in table
    for folder in ("0-bare", "1-mixed"):
        lines = (place / "judged" / folder / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["task"] for line in lines] == ["moods/two"] * 3
        assert (place / "judged" / folder / "predictions.html").exists()
    bad = run("evaluate", place / "mixed", "--out", place / "judged", code=1)
    assert "--out is for --mixture" in bad.stderr


def test_a_recipe_holds_its_mixture(place):
    recipe = place / "recipe.yaml"
    recipe.write_text("mixture: {tasks: [moods/one], rows: 5}\nmethod: bitfit\n")
    done = run("train", "--recipe", recipe, "--backbone", place / "model", "--out", place / "inline", *FAST)
    assert "on 5 rows" in done.stderr
    replaced = run(
        "train", "--recipe", recipe, "--task", "nlg/e2e_nlg", "--backbone", place / "model", "--out", place / "t", *FAST
    )
    assert "for nlg/e2e_nlg (generation) on 6 rows" in replaced.stderr


def test_examples_stand_in_front_in_training_and_writing(place):
    train(place, "shown", "--task", "nlg/e2e_nlg", "--examples", "2")
    assert Adapter.load(place / "shown").task.columns == ("prompt",)
    options = ("--task", "nlg/e2e_nlg", "--rows", "4", "--max-new-tokens", "3", "--out", place / "written")
    run("generate", "--adapters", place / "shown", "--examples", "2", *options)
    without = run("generate", "--adapters", place / "shown", *options, code=1)
    assert "give --examples with the number that it was trained with" in without.stderr
    written = [json.loads(line) for line in (place / "written" / "predictions.jsonl").read_text().splitlines()]
    for row in written:
        *shown, own = row["prompt"].split("\n\n")
        assert len(shown) == 2 and own not in [part.splitlines()[0] for part in shown]
        assert all(part.splitlines()[1].startswith("good ") for part in shown)


def test_the_bare_backbone_writes_and_is_judged_with_and_without_examples(place):
    model = ("generate", "--backbone", place / "model", "--max-new-tokens", "3")
    for k in (0, 2):
        task = ("--task", "nlg/e2e_nlg", "--rows", "4", "--examples", k, "--out", place / f"bare-{k}")
        found = json.loads(run(*model, *task, "--json").stdout)
        assert found["adapter"] is None and found["rows"] == 4 and found["bleu"] >= 0
        kept = (place / f"bare-{k}" / "predictions.jsonl").read_text("utf-8").splitlines()
        prompts = [json.loads(row)["prompt"] for row in kept]
        assert [len(prompt.split("\n\n")) for prompt in prompts] == [k + 1] * 4
        assert run(*model, *task).stdout.splitlines()[2].split()[:3] == ["bare", "nlg/e2e_nlg", "bleu"]
    alone = json.loads(run(*model, "film a", "--json").stdout)
    rows = '{"text": "film a"}\n{"adapter": null, "text": "film a"}\n'
    written = [json.loads(line) for line in run(*model, input=rows).stdout.splitlines()]
    assert [line["token_ids"] for line in written] == [alone["token_ids"]] * 2


def test_the_bare_backbone_ends_its_text_where_examples_end(place, monkeypatch):
    """A model that was not trained on examples goes on with another, and no right answer would be found right."""
    asked = []
    generate = Bank.generate
    monkeypatch.setattr(Bank, "generate", lambda *a, **k: asked.append(a[2]) or generate(*a, **k))
    short = ("--task", "nlg/e2e_nlg", "--rows", "2", "--max-new-tokens", "1")
    model = ("generate", "--backbone", place / "model", *short)
    assert "a text ends at an empty line" in run(*model, "--examples", "2").stderr
    for given in (("--examples", "2", "--stop", "x"), ("--examples", "0")):
        assert "empty line" not in run(*model, *given).stderr
    assert [settings.stop for settings in asked] == [("\n\n",), ("x",), ()]


def test_a_table_is_a_baseline_and_judges_what_was_trained_on_it_with_examples(place):
    table = place / "facts.jsonl"
    table.write_text("".join(json.dumps({"fact": f"film {c}", "said": f"good {c}"}) + "\n" for c in "abcdef"), "utf-8")
    own = ("--data", table, "--text", "{fact} :", "--label", "said", "--metric", "exact_match", "--rows", "2")
    short = ("--max-new-tokens", "2", "--json", "--out", place / "table")

    def prompts(*arguments):
        found = json.loads(run("generate", *arguments, *short).stdout)
        assert found["task"] == "facts" and found["rows"] == 2 and "exact_match" in found
        kept = (place / "table" / "predictions.jsonl").read_text("utf-8").splitlines()
        return [json.loads(row)["prompt"].split("\n\n") for row in kept]

    assert prompts("--backbone", place / "model", *own) == [["film a :"], ["film b :"]]
    shown = prompts("--backbone", place / "model", *own, "--examples", "2")
    assert [(len(parts), parts[-1]) for parts in shown] == [(3, "film a :"), (3, "film b :")]
    assert all("film a" not in part for part in shown[0][:-1])
    said = ("--train", table, "--kind", "generation", "--text", "{fact} :", "--label", "said")
    train(place, "few", *said, "--examples", "2")
    assert prompts("--adapters", place / "few", *own, "--examples", "2") == shown
    for given, words in (
        ((), "--text: the adapter says"),
        (("--examples", "2", "--format", "chat"), "--format: the ad"),
    ):
        assert words in run("generate", "--adapters", place / "few", *own, *given, code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "or --backbone NAME, for a language model without any"),
        (("--backbone", "MODEL", "--text", "x"), "--text says how the rows of --data are put; give --data"),
        (("--backbone", "MODEL", "--data", "x.jsonl"), "no file or folder 'x.jsonl'"),
        (
            ("--backbone", "MODEL", "--task", "moods/one"),
            "task 'moods/one' is of kind classification and writes nothing",
        ),
    ],
)
def test_the_bare_backbone_needs_to_be_told_what_to_write(place, arguments, message):
    given = [place / "model" if word == "MODEL" else word for word in arguments]
    assert message in run("generate", *given, code=1, input="").stderr
    line = '{"adapter": "mixed", "text": "x"}'
    bad = run("generate", "--backbone", place / "model", code=1, input=line)
    assert "line 1: no adapter 'mixed'. There are none, and null asks the bare backbone" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mixture", "no.yaml"), "there is no mixture no.yaml"),
        (("--mixture", "no.yaml", "--task", "nlg/e2e_nlg"), "--task brings its own data, so --mixture cannot be"),
        (("--task", "moods/one", "--examples", "2"), "exemplars stand in prompts of tasks that write"),
        (("--task", "nlg/e2e_nlg", "--examples", "0"), "k=0 examples are not possible"),
    ],
)
def test_training_refuses_what_it_cannot_honour(place, arguments, message):
    assert message in train(place, "refused", *arguments, code=1).stderr


def test_judging_refuses_what_it_cannot_honour(place):
    if not (place / "mixed").exists():
        train(place, "mixed", "--mixture", place / "mixture.yaml")
    bad = run("generate", "TEXT", "--adapters", place / "mixed", "--examples", "2", code=1)
    assert "--examples are rows of a task; give --task NAME or --data FILE too" in bad.stderr
    bad = run("evaluate", place / "mixed", "--mixture", place / "mixture.yaml", "--task", "moods/one", code=1)
    assert "--mixture brings its own rows" in bad.stderr
    (place / "open.yaml").write_text("tasks: [moods/one]\n")
    bad = run("evaluate", place / "mixed", "--mixture", place / "open.yaml", code=1)
    assert "the mixture holds no task out" in bad.stderr


def test_a_set_without_training_rows_judges_an_adapter_of_another(place):
    folder = place / "data" / "reasoning" / "svamp"
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list([{"question": f"film {n} ?", "answer": str(n)} for n in range(3)]).to_parquet(
        folder / "test.parquet"
    )
    if not (place / "mixed").exists():
        train(place, "mixed", "--mixture", place / "mixture.yaml")
    options = ("--task", "reasoning/svamp", "--split", "test", "--max-new-tokens", "3", "--json")
    found = json.loads(run("generate", "--adapters", place / "mixed", *options).stdout)
    assert (found["task"], found["rows"]) == ("reasoning/svamp", 3) and 0 <= found["answer_match"] <= 1
