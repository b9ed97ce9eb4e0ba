"""`multitune import` and `export`, run in process on real checkpoints."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import multitune as mt
from multitune.cli import app
from multitune.convert.heads import SEQUENCE, model_with_head
from multitune.convert.peft.files import write_checkpoint

peft = pytest.importorskip("peft", reason="PEFT is not installed; pip install 'multitune[parity]'")


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result.stdout if code == 0 else result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_backbone):
    """A tiny backbone as a folder, and a PEFT classifier on it."""
    root = tmp_path_factory.mktemp("convert")
    tiny = make_backbone("bert")
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type=SEQUENCE, r=2, target_modules=["query", "value"])
        model = peft.get_peft_model(model_with_head(tiny, SEQUENCE, 2), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(root / "theirs")
    tiny.detach()
    tiny.model.save_pretrained(root / "backbone")
    tiny.tokenizer.save_pretrained(root / "backbone")
    return root / "backbone", root / "theirs", model.eval()


def test_there_and_back(folders, tmp_path):
    backbone, theirs, model = folders
    out = tmp_path / "mood"
    options = ("--backbone", backbone, "--labels", "bad, good", "--template", "{text}", "--label", "y")
    facts = json.loads(run("import", theirs, *options, "--out", out, "--json"))
    assert facts["method"] == "lora" and facts["head"] == "checkpoint" and facts["compared"] == "logits"
    assert 0 <= facts["max_difference"] <= 1e-5 * facts["max_magnitude"] and facts["with"].startswith("PEFT")
    adapter = mt.Adapter.load(out)
    assert (adapter.name, adapter.task.labels, adapter.task.label) == ("mood", ("bad", "good"), "y")

    answer = json.loads(run("predict", "not the good film", "--adapters", out, "--json"))
    tokens = mt.Backbone.load(backbone).tokenizer("not the good film", return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).logits.softmax(-1)[0]
    assert answer["probabilities"] == pytest.approx({"bad": float(expected[0]), "good": float(expected[1])}, abs=1e-5)

    shown = run("export", out, "--out", tmp_path / "back")
    assert "largest difference" in shown and "logits with PEFT" in shown
    assert "give --overwrite" in run("export", out, "--out", tmp_path / "back", code=1)
    assert json.loads(run("export", out, "--out", tmp_path / "back", "--overwrite", "--json"))["task"] == SEQUENCE


def test_what_is_wrong_is_said_in_one_line(folders, tmp_path):
    backbone, theirs, _ = folders
    options = ("--backbone", backbone, "--out", tmp_path / "out")
    for args, problem in [
        (("import", theirs, *options, "--from", "pefft"), "no format 'pefft' to import. Did you mean 'peft'?"),
        (("import", theirs, *options, "--labels", "a,b,c"), "2 outputs, but 3 labels were given: a, b, c"),
        (("import", tmp_path, *options), "is not a PEFT checkpoint: it has no adapter_config.json"),
        (
            ("import", theirs, *options, "--kind", "tagging"),
            "kind classification or regression or multilabel, not 'tagging'",
        ),
        (("export", tmp_path, "--out", tmp_path / "out"), "is not an adapter folder"),
    ]:
        assert problem in run(*args, code=1)
        assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_head_embeds(folders, tmp_path):
    backbone, theirs, _ = folders
    config = json.loads((theirs / "adapter_config.json").read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    tensors = load_file(theirs / "adapter_model.safetensors")
    own = {k.replace("model.bert.", "model."): t for k, t in tensors.items() if "lora" in k}
    config |= {"task_type": "FEATURE_EXTRACTION", "modules_to_save": None}
    write_checkpoint(bare, config, own)
    facts = json.loads(run("import", bare, "--backbone", backbone, "--out", tmp_path / "out", "--json"))
    assert (facts["head"], facts["compared"]) == ("none", "hidden states")
    found = json.loads(run("predict", "good film", "--adapters", tmp_path / "out", "--json"))
    assert len(found["embedding"]) == 32
