"""The documents do what they say: their code runs, and their generated parts are up to date."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import multitune as mt
from multitune.cli import app
from multitune.cli.sections import sections_of
from multitune.cli.shared import COMMANDS, load_command
from multitune.methods import Method, registry
from multitune.methods.yielded import check_deltas
from multitune.plan import DeltaSet, Plan

ROOT = Path(__file__).parents[1]


def blocks(file: str, language: str) -> list[str]:
    """The fenced blocks of one language in a document."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text("utf-8"), flags=re.DOTALL)


@contextmanager
def loaded(code, name, folder):
    """A module with this code, in a file of its own; it and the method of its name are forgotten afterwards."""
    file = folder / f"{name}.py"
    file.write_text(code, "utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]
        registry._METHODS.pop(name, None)


@pytest.fixture
def output_gain(tmp_path):
    """The example method of CONTRIBUTING.md."""
    (code,) = (b for b in blocks("CONTRIBUTING.md", "python") if "class OutputGain" in b)
    with loaded(code, "output_gain", tmp_path) as module:
        yield module.OutputGain


def test_the_example_method_trains_saves_and_mixes(output_gain, minilm, tmp_path):
    assert mt.get_method("output_gain") is output_gain
    data = mt.load_task("demo/topic")
    settings = {"max_steps": 2, "progress": False}
    mt.train(minilm, data, output_gain(targets=("ffn_out",)), tmp_path / "gain", learning_rate=0.1, **settings)
    mt.train(minilm, data, "lora", tmp_path / "lora", **settings)
    bank = mt.Bank(minilm)
    for name in ("gain", "lora"):
        bank.add(name, tmp_path / name)
    text = "The probe sent back its first pictures."
    mixed = bank.predict([("gain", text), ("lora", text), (None, text)])
    for name, answer in zip(("gain", "lora"), mixed, strict=False):
        (alone,) = bank.predict([(name, text)])
        torch.testing.assert_close(answer.logits, alone.logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[0].logits, mixed[1].logits)
    trained = mt.Adapter.load(tmp_path / "gain", minilm)
    assert trained.num_method_parameters == 6 * 384
    assert all(t.abs().max() > 0 for t in trained.params.values())


@pytest.fixture
def layer_shift(tmp_path):
    """The example of CONTRIBUTING.md for a whole backbone, with the imports of the other one and those it names."""
    first, second = (b for b in blocks("CONTRIBUTING.md", "python") if "@register" in b)
    more = "from multitune.deltas import Bottleneck\nfrom multitune.methods import Method\n\n"
    with loaded(first.split("@register")[0] + more + second, "layer_shift", tmp_path) as module:
        yield module.LayerShift


def test_the_example_for_a_whole_backbone_adds_its_vector_to_every_layers_output(layer_shift, bert, random_rows):
    method = layer_shift()
    v = torch.randn(32)
    yielded = method.deltas({"v": v}, bert)
    check_deltas(method, yielded, bert)
    last = f"layer.{bert.num_layers - 1}."
    assert list(yielded) == [s.name for s in bert.sites if s.role == "block"] and len(yielded) == bert.num_layers
    ids, mask = random_rows(bert, [5, 3]).padded()
    bare = bert.run(Plan([None] * 2), ids, mask)
    shifted = DeltaSet({name: deltas for name, deltas in yielded.items() if name.startswith(last)})
    found = bert.run(Plan([shifted] * 2), ids, mask)
    torch.testing.assert_close(found, bare + v)


def test_the_readme_code_uses_names_that_exist():
    used = {n for block in blocks("README.md", "python") for n in re.findall(r"\bmt\.(\w+)", block)}
    assert used and all(hasattr(mt, name) for name in used), used


def test_the_readme_code_that_writes_runs(make_backbone, tmp_path, monkeypatch, capsys):
    (code,) = (b for b in blocks("README.md", "python") if "facts.csv" in b)
    monkeypatch.chdir(tmp_path)
    Path("facts.csv").write_text("facts,sentence\n" + "name[Aromi],Aromi is a place.\n" * 10, "utf-8")
    small = code.replace('mt.Backbone.load("smollm2")', "tiny").replace(
        '"adapters/facts"\n)', '"adapters/facts", **few\n)', 1
    )
    assert small.count("tiny") == small.count("few") == 1
    few = {"max_steps": 1, "progress": False}
    exec(compile(small, "README.md", "exec"), {"mt": mt, "tiny": make_backbone("gpt2", n_positions=128), "few": few})
    assert {line[0] for line in capsys.readouterr().out.splitlines()} == {"0", "1"}


def test_the_readme_code_for_your_own_data_runs(minilm, tmp_path, monkeypatch):
    (code,) = (b for b in blocks("README.md", "python") if "reviews.csv" in b)
    rows = [f"Row {i} is {word}.,{label}" for i, (word, label) in enumerate([("good", "yes"), ("bad", "no")] * 10)]
    causes = [{"premise": f"Lamp {i} is dark.", "first": "No power.", "second": "Red.", "answer": 0} for i in range(9)]
    monkeypatch.chdir(tmp_path)
    for file in ("reviews.csv", "more.csv"):
        Path(file).write_text("\n".join(["review,verdict", *rows]), "utf-8")
    Path("causes.jsonl").write_text("\n".join(map(json.dumps, [*causes, {**causes[0], "answer": 1}])), "utf-8")
    exec(compile(code, "README.md", "exec"), {"mt": mt, "backbone": minilm})
    bank = mt.Bank(minilm)
    for name in ("reviews", "causes"):
        bank.add(name, f"adapters/{name}")
    answers = bank.predict([("reviews", "Good."), ("causes", causes[0])])
    assert [set(a.probabilities) for a in answers] == [{"yes", "no"}, {"0", "1"}]


def test_training_many_runs_as_its_page_says(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mt.Backbone, "load", lambda name, **settings: minilm)
    (code,) = blocks("docs/training-many.md", "python")
    exec(compile(code.replace("epochs=1", "max_steps=1, progress=False"), "training-many.md", "exec"), {})
    named = ["demo-topic-lora", "topic-small", "demo-sentiment-ptuning_v2"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == named
    (recipe,) = blocks("docs/training-many.md", "yaml")
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(recipe.replace("epochs: 1", "max_steps: 1"))
    result = CliRunner().invoke(app, ["train-many", "recipe.yaml", "--json"])
    assert result.exit_code == 0, result.stderr
    folders = ["demo-topic-lora", "demo-topic-lora-2", "demo-sentiment-ptuning_v2"]
    assert [job["adapter"] for job in json.loads(result.stdout)] == [str(tmp_path / "adapters" / f) for f in folders]


def test_the_page_on_answers_as_language_runs(make_backbone, tmp_path, monkeypatch, capsys):
    tiny = make_backbone("llama", tie_word_embeddings=True, max_position_embeddings=400)
    monkeypatch.setattr(mt.Backbone, "load", lambda name, **settings: tiny)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/language-tasks.md", "python")
    small = code.replace("batch_size=8", "batch_size=2, max_steps=1, max_length=400, progress=False")
    exec(compile(small, "language-tasks.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "'positive': 0." in printed and "'negative': 0." in printed
    (command,) = blocks("docs/language-tasks.md", "bash")
    words = shlex.split(command.replace("\\\n", " "))[1:]
    words[words.index("adapters/sentiment")] = "adapters/other"
    result = CliRunner().invoke(app, [*words, "--max-steps", "1", "--max-length", "400", "--batch-size", "2"])
    assert result.exit_code == 0, result.stderr


def test_the_example_of_listed_choices_prints_what_it_says(capsys):
    (code,) = blocks("docs/tasks.md", "python")
    exec(compile(code, "docs/tasks.md", "exec"), {})
    assert capsys.readouterr().out == "(0,)\n"


def test_comparing_runs_as_its_page_says(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mt.Backbone, "load", lambda name, **settings: minilm)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/compare.md", "python")
    exec(compile(code.replace('"epochs": 1', '"max_steps": 1'), "compare.md", "exec"), {})
    printed = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert printed == [[m, r, seed] for seed in "01" for m, r in (("lora", "4"), ("lora", "8"), ("head", "None"))]
    (recipe,) = blocks("docs/compare.md", "yaml")
    Path("mine.csv").write_text("question,intent\n" + "Is it open?,hours\nWhat does it cost?,price\n" * 10, "utf-8")
    Path("recipe.yaml").write_text(recipe, "utf-8")
    result = CliRunner().invoke(app, ["compare", "recipe.yaml", "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(
        "45 trials; about "
    )  # 3 tasks, 4 settings of LoRA and BitFit, 3 seeds


def test_no_document_links_to_a_file_that_is_not_there():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
HISTORY = ROOT / "CHANGELOG.md"


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link may name behind the # of a page: its headings, as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def written_commands(page: Path, program: str) -> list[list[str]]:
    """The commands of a program that stand in a page, in blocks and in the text, as words."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    typed = [block.replace("\\\n", " ") for language, block in fenced if language in ("", "bash")]
    lines = [line for block in typed for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    return [shlex.split(part, comments=True) for part in parts if part.startswith(program)]


def test_no_document_links_to_a_heading_that_is_not_there():
    for page in PAGES:
        for file, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", prose(page)):
            place = page.parent / file if file else page
            assert anchor in anchors(place), f"{page.name} links to {file}#{anchor}, where there are {anchors(place)}"


def test_every_command_in_the_documents_has_the_options_it_is_given():
    found = [(page.name, words) for page in PAGES if page != HISTORY for words in written_commands(page, "multitune ")]
    assert len(found) > 60
    for page, words in found:
        if words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, f"{page}: there is no command {words[1]!r}"
        known = {"--help", *(option for p in load_command(words[1]).params for option in p.opts)}
        given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert given <= known, f"{page}: {' '.join(words)}"


def test_every_benchmark_in_the_documents_has_the_options_it_is_given():
    common = (ROOT / "benchmarks" / "_cells.py").read_text("utf-8")
    found = [(page.name, words) for page in PAGES for words in written_commands(page, "python benchmarks/")]
    assert len(found) > 15
    for page, words in found:
        code = (ROOT / words[1]).read_text("utf-8")
        code += common if "from _cells import" in code else ""
        given = {word for word in words[2:] if word.startswith("--")}
        assert all(f'"{option}"' in code for option in given), f"{page}: {' '.join(words)}"


def test_the_documents_name_what_exists():
    own = re.findall(r"^class (\w+)", "".join(blocks("CONTRIBUTING.md", "python")), flags=re.MULTILINE)
    for page in PAGES:
        text = page.read_text("utf-8")
        used = set(re.findall(r"\bmt\.([A-Za-z]\w*)", text)) - set(own)
        assert [name for name in sorted(used) if not hasattr(mt, name)] == [], page.name
        for module, names in re.findall(r"^from (multitune[\w.]*) import (.+)$", text, flags=re.MULTILINE):
            lacking = [n for n in names.split(", ") if not hasattr(importlib.import_module(module), n)]
            assert lacking == [], f"{page.name}: {module}"
        for dotted in re.findall(r"`(multitune(?:\.\w+)+)", text):
            pkgutil.resolve_name(dotted)  # raises for what is not there


def test_the_server_of_the_page_on_practice_answers_rows_and_refuses_wrong_ones(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mt.Backbone, "load", lambda name, **settings: minilm)
    monkeypatch.chdir(tmp_path)
    mt.train(minilm, mt.load_task("demo/topic"), "layernorm", "adapters/topic", max_steps=1, progress=False)
    (code,) = blocks("docs/practice.md", "python")
    made = {}
    exec(compile(code, "practice.md", "exec"), made)
    assert capsys.readouterr().out.strip() in mt.load_task("demo/topic").task.labels
    with pytest.raises(mt.AdapterError, match="no adapter 'topics'"):
        made["ask"]("topics", "A text.")
    batch = [((name, "A text."), Future()) for name in ("topic", "topics", None)]
    made["answer"](batch)
    assert [reply.exception() is None for _, reply in batch] == [True, False, True]
    assert batch[0][1].result().adapter == "topic" and batch[2][1].result().embedding is not None
    made["waiting"].put(None)


def test_the_page_on_attaching_runs(make_model, tmp_path, monkeypatch):
    rows = [{"input_ids": [i % 90 + 5] * 6, "labels": i % 2} for i in range(8)]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, save_strategy="no", report_to="none", use_cpu=True
    )
    model = transformers.AutoModelForSequenceClassification.from_config(make_model("bert").config)
    loads = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(loads, "from_pretrained", lambda name, num_labels: model)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/attach.md", "python")
    exec(compile(code, "attach.md", "exec"), {"args": args, "rows": rows})
    assert mt.Adapter.load("adapters/mood").method == mt.LoRA(r=8)
    assert not hasattr(model, "multitune")


def test_the_page_on_few_bits_loads_and_converts_as_it_says(make_backbone, monkeypatch):
    pytest.importorskip("torchao", reason="the extra [quant] is not installed")

    def load(name, quantize=None):
        return make_backbone("bert") if quantize is None else mt.quantize(make_backbone("bert"), quantize)

    monkeypatch.setattr(mt.Backbone, "load", load)
    made = {"mt": mt}
    exec(compile(blocks("docs/backbones.md", "python")[0], "backbones.md", "exec"), made)
    schemes = {name: made[name].quantized for name in ("backbone", "whole", "few")}
    assert {name: q and q.scheme for name, q in schemes.items()} == {"backbone": "int8", "whole": None, "few": "nf4"}


def test_the_page_on_generation_writes_as_it_says(make_backbone, tmp_path, monkeypatch, capsys):
    tiny = make_backbone("gpt2", n_positions=256)
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }} {% endfor %}bot")
    monkeypatch.chdir(tmp_path)
    Path("facts.csv").write_text("name,facts,sentence\n" + "Aromi,a pub,Aromi is a pub.\n" * 10, "utf-8")
    tasks = {"nlg/e2e_nlg": mt.load_table("facts.csv", text="{facts}", label="sentence", kind="generation")}
    monkeypatch.setattr(mt, "load_task", tasks.__getitem__)
    made = {"mt": mt, "backbone": tiny}
    tables, training, packing, generating, judging = (
        next(b for b in blocks("docs/generation.md", "python") if word in b)
        for word in ("mt.load_table", "epochs=2", "packing=True", "bank.generate_stream", "evaluate_texts")
    )
    packing = packing.replace("packing=True", "packing=True, max_steps=1, progress=False")
    for code in (tables, training.replace("epochs=2", "max_steps=1, progress=False"), packing):
        exec(compile(code, "generation.md", "exec"), made)
    Path("adapters/summary").symlink_to("e2e")
    exec(compile(generating, "generation.md", "exec"), made)
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()[:3]} <= {"eos", "stop", "length"}
    short = judging.replace('"max_new_tokens": 64', '"max_new_tokens": 4')
    exec(compile(short, "generation.md", "exec"), made)
    assert Path("written/e2e/predictions.html").exists()


@pytest.mark.parametrize("name", mt.method_names())
def test_a_page_has_all_its_sections(name):
    said = sections_of(mt.get_method(name))
    assert said.summary and not said.missing


def test_a_section_is_a_header_and_what_is_indented_below_it():
    class Short(Method):
        """One.  y = f(x):

        Still the summary.

        Pitfalls:
            - First:
              second line.
            - Next.
        Shapes:
            `A [I, R]`
        """

    said = sections_of(Short)
    assert said.summary == "One.  y = f(x):\n\nStill the summary."
    assert said.texts == {"Shapes": "`A [I, R]`", "Pitfalls": "- First:\n  second line.\n- Next."}
    assert list(said.texts) == ["Shapes", "Pitfalls"]  # the order of the page
    assert said.missing == ("Parameters", "Use it when", "Published")


@pytest.mark.parametrize(
    ("doc", "words"),
    [
        ("A.\n\n    Pitfals:\n        x", "section 'Pitfals:', which no page has. Did you mean 'Pitfalls'"),
        ("A.\n\n    Shapes:\n    Pitfalls:\n        x", "section 'Shapes:' without a text; write it"),
        ("A.\n\n    Shapes:\n        x\n    Shapes:\n        y", "section 'Shapes:' twice; join them"),
    ],
)
def test_a_section_that_no_page_has_is_refused(doc, words):
    with pytest.raises(mt.ConfigError, match=words):
        sections_of(type("Wrong", (Method,), {"__doc__": doc}))


def test_the_readme_leads_to_the_page_of_every_method():
    assert "](docs/methods.md)" in (ROOT / "README.md").read_text("utf-8")
    listed = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert [name for name in mt.method_names() if f"](methods/{name}.md)" not in listed] == []


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
