"""Choosing layers by where hidden states turn: the measure is its formula, and the choice is usable."""

import json

import pytest
import torch
from typer.testing import CliRunner

import multitune as mt
from multitune.cli import app
from multitune.layers import NUM_ROWS, choose_layers, choose_layers_for

TEXTS = ["good film", "not the very bad film", "x", "the film is not a good film at all"]


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2/v3", "modernbert", "gpt2", "llama"])
def test_deviations_are_their_formula(name, make_backbone, make_model):
    backbone = make_backbone(name)
    choice = choose_layers(backbone, TEXTS, batch_size=3)
    plain, away = make_model(name).eval(), []
    for text in TEXTS:  # one text at a time, by the model's own hidden states
        ids = torch.tensor([backbone.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            out = plain(input_ids=ids, output_hidden_states=True)
        states = [*out.hidden_states[:-1], out.last_hidden_state]
        cosines = [torch.nn.functional.cosine_similarity(s[0], states[-1][0], dim=-1) for s in states]
        away.append(torch.stack([1 - c for c in cosines]))
    expected = torch.cat(away, dim=1).mean(1)
    assert choice.deviations == pytest.approx(expected.tolist(), abs=1e-5)
    assert choice.gains == pytest.approx((expected[:-1] - expected[1:]).tolist(), abs=2e-5)
    assert choice.deviations[-1] == pytest.approx(0, abs=1e-6)


def test_all_layers_above_the_largest_gain_are_trained(make_backbone):
    backbone = make_backbone("bert")
    turning = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    layers = backbone.model.encoder.layer
    for turn in range(3):
        with torch.no_grad():
            for i, layer in enumerate(layers):  # a norm whose gain flips signs turns every state; the others keep it
                layer.output.LayerNorm.weight.fill_(1.0)
                layer.output.LayerNorm.bias.zero_()
                layer.attention.output.LayerNorm.weight.fill_(1.0)
                layer.attention.output.LayerNorm.bias.zero_()
                layer.attention.output.dense.weight.mul_(0)
                layer.attention.output.dense.bias.zero_()
                layer.output.dense.weight.mul_(0)
                layer.output.dense.bias.zero_()
                if i == turn:
                    layer.output.LayerNorm.weight.copy_(turning[0].sign())
        choice = choose_layers(backbone, TEXTS)
        assert max(range(3), key=choice.gains.__getitem__) == turn
        assert choice.trained == {0: (1, 2), 1: (2,)}.get(turn, choice.trained)
        assert choice.trained[-1] == 2  # the uppermost layer is always trained


def test_the_choice_goes_into_methods(bert):
    trained = choose_layers(bert, TEXTS).trained
    keys = mt.LoRA(layers=trained).init(bert, torch.Generator())
    assert {int(k.split(".")[1]) for k in keys} == set(trained)
    assert tuple(mt.Freeze(first=trained[0]).trained_layers(bert)) == trained


def test_nothing_to_measure_is_refused(bert, make_backbone):
    with pytest.raises(mt.DataError, match="no texts to choose layers by"):
        choose_layers(bert, [])
    with pytest.raises(mt.ConfigError, match="has one layer"):
        choose_layers(make_backbone("bert", num_hidden_layers=1), TEXTS)


def _turning(backbone, turn):
    """Make one layer of a BERT flip the signs of its states; the others keep what they are given, normed."""
    for i, layer in enumerate(backbone.model.encoder.layer):
        with torch.no_grad():
            for part in (layer.attention.output, layer.output):
                part.LayerNorm.weight.fill_(1.0)
                part.LayerNorm.bias.zero_()
                part.dense.weight.zero_()
                part.dense.bias.zero_()
            if i == turn:
                layer.output.LayerNorm.weight.copy_(torch.ones(32) - 2 * (torch.arange(32) % 2))


def _data(tasks, num_rows=12):
    rows = [{"text": TEXTS[i % 4], "y": ("bad", "good", "mixed")[i % 3]} for i in range(num_rows)]
    return mt.TaskData(task=tasks["classification"], train=rows, validation=rows[:6], test=None)


QUICK = dict(progress=False, max_steps=2, batch_size=4)


@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(
    ("method", "of"),
    [
        (mt.LoRA(layers="semantic"), lambda m: m.layers),
        (mt.Freeze(first="semantic"), lambda m: tuple(range(m.first, 3))),
        (
            mt.make_method("lora+bitfit", {"lora.layers": "semantic", "bitfit.layers": "1"}),
            lambda m: m.methods[0].layers,
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_semantic_layers_are_chosen_before_training_and_recorded(method, of, turn, make_backbone, tasks, tmp_path):
    backbone, lines, data = make_backbone("bert"), [], _data(tasks)
    _turning(backbone, turn)
    result = mt.train(backbone, data, method, tmp_path / "a", report=lines.append, **QUICK)
    expected = tuple(range(turn + 1, 3))
    assert result.layer_choice.trained == expected and of(result.adapter.method) == expected
    saved = json.loads((tmp_path / "a" / "adapter.json").read_text())
    assert "semantic" not in json.dumps(saved["method"])
    assert saved["recipe"]["layer_choice"]["trained"] == list(expected)
    assert saved["recipe"]["layer_choice"]["gains"] == pytest.approx(result.layer_choice.gains)
    assert f"layers {turn + 1} to 2 are trained: layer {turn} below them turns most" in lines[0]
    loaded = mt.Adapter.load(tmp_path / "a", backbone)
    assert of(loaded.method) == expected
    if method.name == "lora":
        assert {int(name.split(".")[1]) for name in loaded.params} == set(expected)
        by_hand = mt.train(backbone, data, mt.LoRA(layers=expected), **QUICK)
        assert all(torch.equal(t, result.adapter.params[k]) for k, t in by_hand.adapter.params.items())
        assert by_hand.layer_choice is None


def test_a_method_without_the_word_is_left_alone():
    assert not mt.LoRA().asks_for_layers and mt.LoRA(layers=(1,)).with_layers((2,)) == mt.LoRA(layers=(1,))
    assert mt.Freeze(first="semantic", last=1).with_layers((1, 2)) == mt.Freeze(first=1, last=1)


@pytest.mark.parametrize(
    "method", [mt.LoRA(layers="semantic"), mt.BitFit(layers="semantic"), mt.Freeze(first="semantic")]
)
def test_semantic_layers_outside_of_training_are_refused(method, bert):
    with pytest.raises(mt.ConfigError, match="stands for no layers? yet.*choose_layers"):
        method.init(bert, torch.Generator())


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("lora", "layers", "semantic", "semantic"),
        ("lora", "layers", "1,2", (1, 2)),
        ("lora", "layers", [1, 2], (1, 2)),
        ("lora", "layers", "none", None),
        ("freeze", "first", "semantic", "semantic"),
        ("freeze", "first", "-3", -3),
    ],
)
def test_layers_are_read_from_words_and_numbers(name, key, value, expected):
    method = mt.make_method(name, {key: value})
    assert getattr(method, key) == expected
    assert mt.make_method(name, method.settings()) == method


@pytest.mark.parametrize(("name", "key"), [("lora", "layers"), ("freeze", "first")])
def test_another_word_is_refused(name, key):
    with pytest.raises(mt.ConfigError, match=f"{key}='semantik' is not possible; give a .*semantic"):
        mt.make_method(name, {key: "semantik"})


def test_a_task_is_measured_through_its_template_on_rows_drawn_evenly(bert, tasks):
    rows = [{"a": TEXTS[i % 4], "b": TEXTS[i % 3], "y": "unknown"} for i in range(2 * NUM_ROWS + 3)]
    choice = choose_layers_for(bert, tasks["regression"], rows)
    drawn = [(rows[i]["a"], rows[i]["b"]) for i in range(0, len(rows), 3)]
    assert choice == choose_layers(bert, drawn)
    assert choice.turn == choice.trained[0] - 1
    words = [{"words": text.split()} for text in TEXTS]
    assert choose_layers_for(bert, tasks["tagging"], words) == choose_layers(bert, TEXTS)


def test_global_tokens_are_not_measured(make_backbone):
    plain = make_backbone("bert")
    before = choose_layers(plain, TEXTS)
    converted = choose_layers(mt.convert_to_lsg(plain, block=4, sparse=2, num_global=1), TEXTS)
    assert converted.deviations[0] != before.deviations[0]  # another last hidden state, as many tokens
    assert len(converted.gains) == 3 and max(converted.deviations) < 2


def test_the_command_prints_draws_and_writes_the_choice(minilm, tmp_path):
    plot = tmp_path / "layers.png"
    result = CliRunner().invoke(app, ["layers", "--task", "demo/topic", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    data = mt.load_task("demo/topic")
    choice = choose_layers_for(minilm, data.task, data.train)
    lines = result.stdout.splitlines()
    assert len(lines) == 2 + 7 and f"{choice.gains[2]:.4f}" in lines[5]
    assert lines[3 + choice.turn].endswith("turns most") and lines[-1].endswith("trained")
    assert f"--set first={choice.trained[0]}" in result.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(CliRunner().invoke(app, ["layers", "--task", "demo/topic", "--json"]).stdout)
    assert found["trained"] == list(choice.trained) and found["gains"] == pytest.approx(choice.gains)
    assert found["turn"] == choice.turn
