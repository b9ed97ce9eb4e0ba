"""What single architectures need: layers that share their weights, encoders of encoder-decoders, factorised words."""

import pytest
import torch

from multitune import (
    AdapterError,
    Backbone,
    DeltaSet,
    FullFineTuning,
    LoRA,
    Plan,
    get_method,
    method_names,
)
from multitune.merge import merge_deltas

MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]


def run(backbone, sets, rows):
    with torch.no_grad():
        return backbone.run(Plan(sets), *rows.padded())


# ---- ALBERT: one module runs as several layers


@pytest.fixture(scope="module")
def unshared(make_model):
    """The tiny ALBERT with a copy of its weights for every layer, so that each module runs once."""
    shared = make_model("albert")
    config = shared.config
    groups, passes = config.num_hidden_groups, config.num_hidden_layers
    model = make_model("albert", num_hidden_groups=passes)
    state = shared.state_dict()
    place = "encoder.albert_layer_groups."
    for name in model.state_dict():
        if name.startswith(place):
            group, rest = name.removeprefix(place).split(".", 1)
            state[name] = shared.state_dict()[f"{place}{int(group) * groups // passes}.{rest}"]
    model.load_state_dict(state)
    return Backbone(model)


def test_layers_of_shared_weights_are_sites_of_their_own(make_backbone, unshared):
    shared = make_backbone("albert")
    assert shared.num_layers == unshared.num_layers == 8
    assert [s.name for s in shared.sites] == [s.name for s in unshared.sites]
    assert not any(s.shared for s in unshared.sites)
    assert {s.layer for s in shared.sites if s.shared} == set(range(8))
    modules = [s.module.split(".attention")[0] for s in shared.find_sites("linear", "query")]
    place = "encoder.albert_layer_groups."
    order = ["0.albert_layers.0", "0.albert_layers.1"] * 2 + ["1.albert_layers.0", "1.albert_layers.1"] * 2
    assert modules == [place + path for path in order]


@pytest.mark.parametrize("name", MIXABLE)
def test_a_delta_of_one_layer_acts_in_that_pass_alone(name, make_backbone, unshared, random_params, random_rows, close):
    shared, method = make_backbone("albert"), get_method(name)()
    rows = random_rows(shared, [4, 7, 5, 6])
    params = [random_params(shared, method, seed) for seed in (1, 2)]
    for fused in (False, True):
        outputs = []
        for backbone in (shared, unshared):
            sets = [DeltaSet(method.deltas(p, backbone)) for p in params]
            sets = [s.fused(backbone.dtype, backbone.device) for s in sets] if fused else sets
            outputs.append([run(backbone, [sets[i] for i in mix], rows) for mix in ([0, 0, 0, 0], [0, 1, 1, 0])])
        for ours, expected in zip(*outputs, strict=True):
            assert torch.isfinite(expected).all()
            close(ours, expected)


def test_one_layer_of_many_that_share_weights(make_backbone, unshared, random_params, random_rows, close):
    shared = make_backbone("albert")
    rows = random_rows(shared, [4, 6])
    seen = []
    for layer in range(8):
        method = LoRA(r=2, targets=("query", "value", "ffn_in", "ffn_out"), layers=(layer,))
        params = random_params(shared, method, 1, std=0.5)
        sets = DeltaSet(method.deltas(params, shared))
        out = run(shared, [sets, None], rows)
        close(out[0, :4], run(merge_deltas(unshared, sets), [None, None], rows)[0, :4])
        close(out[1], run(shared, [None, None], rows)[1])
        seen.append(out[0, :4])
        with pytest.raises(AdapterError, match=rf"at layer\.{layer}\.query cannot be folded .*other layers run with"):
            merge_deltas(shared, sets)
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(seen) for b in seen[:i])


def test_a_batch_that_failed_leaves_no_count_behind(make_backbone, delta_set, random_rows):
    backbone = make_backbone("albert")
    sets = [delta_set(backbone, LoRA(), 1)]
    rows = random_rows(backbone, [5])
    before = run(backbone, sets, rows)
    stop = backbone.model.encoder.albert_layer_groups[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(backbone, sets, rows)
    stop.remove()
    assert torch.equal(run(backbone, sets, rows), before)


def test_albert_pools_as_transformers_does(make_backbone, make_model, random_rows, close):
    backbone, plain = make_backbone("albert"), make_model("albert").eval()
    ids = random_rows(backbone, [6]).one(0)
    with torch.no_grad():
        close(backbone.pooler(backbone.run(Plan([None]), ids)), plain(input_ids=ids).pooler_output)


# ---- encoder-decoders: the encoder runs, the rest stays as it is


@pytest.fixture(params=["bart", "t5", "t5/gated", "t5/eager"])
def encoder_decoder(request, make_backbone):
    return make_backbone(request.param)


def test_only_the_encoder_runs_and_is_trained(encoder_decoder):
    backbone = encoder_decoder
    model, encoder = backbone.model, backbone.model.encoder
    assert backbone.running is encoder
    assert {s.module.split(".")[0] for s in backbone.sites} == {"encoder"}
    ran = []
    parts = [(n, m) for n, m in model.named_children() if n not in ("encoder", "shared")]
    handles = [m.register_forward_pre_hook(lambda *_: ran.append(1)) for _, m in parts]
    backbone.run(Plan([None]), torch.tensor([[5, 6, 7]]))
    for handle in handles:
        handle.remove()
    assert not ran and [n for n, _ in parts] == (["decoder"] if hasattr(model, "decoder") else [])
    names = FullFineTuning().init(backbone, torch.Generator()).keys()
    assert {id(model.get_parameter(n)) for n in names} == {id(p) for p in encoder.parameters()}
    assert backbone.num_parameters == sum(p.numel() for p in encoder.parameters())
    assert "shared.weight" in names and not any(n.startswith("decoder.") for n in names)


def test_an_encoder_decoder_is_kept_whole(encoder_decoder, make_model, tmp_path):
    backbone = encoder_decoder
    plain = make_model(backbone.name).eval()
    assert list(backbone.model.state_dict()) == list(plain.state_dict())
    plain.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    loaded = Backbone.load(tmp_path)
    assert type(loaded.model) is type(plain)
    assert loaded.fingerprint == backbone.fingerprint
    backbone.detach()
    ids = torch.tensor([[5, 6, 7, 8]])
    words = dict(input_ids=ids) | (dict(decoder_input_ids=ids) if hasattr(plain, "decoder") else {})
    with torch.no_grad():  # decoder and all
        assert torch.equal(backbone.model(**words).last_hidden_state, plain(**words).last_hidden_state)
