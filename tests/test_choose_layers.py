"""Choosing layers by where hidden states turn: the measure is its formula, and the choice is usable."""

import pytest
import torch

import multitune as mt
from multitune.layers import choose_layers

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
