"""Backbones converted to LSG attention: what they compute, what runs on them, what is refused."""

import dataclasses

import pytest
import torch
from datasets import Dataset

from multitune import (
    LSG,
    Adapter,
    AdapterError,
    AoTFC,
    Backbone,
    BackboneError,
    Bank,
    ConfigError,
    DeltaSet,
    FullFineTuning,
    LoRA,
    Plan,
    PlanError,
    PromptTuning,
    PTuningV2,
    TrainConfig,
    attach,
    convert_to_lsg,
    get_method,
    merge,
    method_names,
    train,
)
from multitune.lsg import GLOBALS, split_name
from multitune.tasks import TaskData

ENCODERS = ("bert", "bert/eager", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "bart")
OTHERS = ("deberta-v2/v3", "deberta", "mpnet", "t5", "modernbert", "gpt2", "opt", "llama")
KINDS = ("norm", "pooling", "lsh", "stride", "block_stride", "none")
SMALL = dict(max_length=200, block=8, sparse=6, sparsity=2)


def long(make_backbone, name="bert", **settings):
    """A converted tiny backbone in float64, so that rounding chooses no key."""
    original = make_backbone(name)
    original.tokenizer.mask_token = "[MASK]" if original.pad_id == 0 else "[UNK]"
    converted = convert_to_lsg(original, **(SMALL | settings))
    converted.model.double()
    return converted


def run(backbone, plan, ids, mask=None):
    with torch.no_grad():
        return backbone.run(plan, ids, mask)


# -------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("name", ENCODERS)
def test_short_rows_without_global_tokens_get_the_originals_output(make_backbone, random_rows, close, name):
    original = make_backbone(name)
    converted = convert_to_lsg(original, **SMALL, num_global=0)
    ids, mask = random_rows(original, (16, 9, 3)).padded()
    expected = run(original, Plan([None] * 3), ids, mask)
    found = run(converted, Plan([None] * 3), ids, mask)
    close(found[mask > 0], expected[mask > 0])


def test_short_rows_are_full_attention_over_global_tokens_and_tokens(make_backbone, make_model, random_rows, close):
    converted = long(make_backbone, num_global=3)
    plain = make_model("bert").double().eval()
    embeddings = plain.embeddings
    words = embeddings.word_embeddings.weight
    positions = embeddings.position_embeddings.weight
    kind = embeddings.token_type_embeddings.weight[0]
    first, mask = converted.tokenizer.cls_token_id, converted.tokenizer.mask_token_id
    front = torch.stack([words[first] + positions[0], words[mask] + positions[1], words[mask] + positions[2]]) + kind
    ids = random_rows(converted, (15,)).one(0)
    with torch.no_grad():
        summed = words[ids] + positions[:15] + kind
        expected = plain.encoder(embeddings.LayerNorm(torch.cat([front[None], summed], dim=1))).last_hidden_state
    # The converted tables come from float32, in which they were added.
    torch.testing.assert_close(run(converted, Plan([None]), ids), expected[:, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", ["norm", "pooling"])
def test_a_long_row_is_the_same_alone_and_padded_on_either_side(make_backbone, random_rows, close, name, kind):
    converted = long(make_backbone, name, kind=kind)
    rows = random_rows(converted, (150, 61, 16, 1))
    ids, mask = rows.padded()
    left_ids, left_mask = (torch.stack([t[i].roll(150 - len(r)) for i, r in enumerate(rows.rows)]) for t in (ids, mask))
    found = run(converted, Plan([None] * 4), ids, mask)
    left = run(converted, Plan([None] * 4), left_ids, left_mask)
    for i, row in enumerate(rows.rows):
        alone = run(converted, Plan([None]), rows.one(i))[0]
        close(found[i, : len(row)], alone)
        close(left[i, 150 - len(row) :], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_see_less_than_all_and_global_tokens_more_than_their_neighbours(make_backbone, random_rows, kind):
    rows = random_rows(make_backbone(), (120,))
    ids = rows.one(0)
    other = ids.clone()
    other[0, -1] = 5 if int(ids[0, -1]) != 5 else 6
    changed = []
    for num_global in (0, 1):
        converted = long(make_backbone, kind=kind, sparse=0, num_global=num_global)
        before, after = (run(converted, Plan([None]), t)[0, 0] for t in (ids, other))
        changed.append(float((before - after).abs().max()))
    assert changed[0] == 0  # three layers of one block each do not reach the first token ...
    assert changed[1] > 0  # ... but through the global token


def test_mask_first_closes_the_first_token_and_gives_the_global_state(make_backbone, random_rows, close, delta_set):
    converted = long(make_backbone, mask_first=True)
    plain = long(make_backbone)
    ids = random_rows(converted, (50,)).one(0)
    other = ids.clone()
    other[0, 0] = 5 if int(ids[0, 0]) != 5 else 6
    for prompt in (None, delta_set(converted, PromptTuning(length=3), fused=True)):
        close(run(converted, Plan([prompt]), other), run(converted, Plan([prompt]), ids))
    assert float((run(plain, Plan([None]), other) - run(plain, Plan([None]), ids)).abs().max()) > 1e-3


def test_positions_are_tiled_and_reserved_rows_stay(make_backbone):
    original = make_backbone("roberta")
    converted = convert_to_lsg(original, **(SMALL | dict(max_length=90)))
    before = original.model.embeddings.position_embeddings.weight
    after = converted.model.embeddings.position_embeddings.weight
    assert converted.max_length == 90 and after.shape[0] == 92
    assert torch.equal(after[:42], before)
    assert torch.equal(after[42:82], before[2:])
    assert torch.equal(after[82:], before[2:12])
    assert original.max_length == 40  # the original stays


def test_global_tokens_are_spread_over_the_positions(make_backbone):
    original = make_backbone("bert", max_position_embeddings=200)
    original.tokenizer.mask_token = "[MASK]"
    converted = convert_to_lsg(original, max_length=300, num_global=6)
    e = original.model.embeddings
    words, positions, kind = e.word_embeddings.weight, e.position_embeddings.weight, e.token_type_embeddings.weight[0]
    cls, mask = original.tokenizer.cls_token_id, original.tokenizer.mask_token_id
    places = [0, 64, 128, 192, 1, 65]
    expected = [words[cls if i == 0 else mask] + positions[p] + kind for i, p in enumerate(places)]
    torch.testing.assert_close(converted.running.get_parameter(GLOBALS), torch.stack(expected))


# -------------------------------------------------------------------- what runs on it


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_mixes_on_long_rows_and_each_row_equals_alone(make_backbone, random_rows, delta_set, close, kind):
    converted = long(make_backbone, kind=kind, num_global=2)
    methods = [m for m in map(get_method, method_names()) if not m.changes_weights]
    sets = [None, *(delta_set(converted, method(), seed) for seed, method in enumerate(methods))]
    sets += [delta_set(converted, LoRA(layers=(1,)), 50), delta_set(converted, PTuningV2(length=5), 51)]
    lengths = [(17 * i) % 83 + 2 for i in range(len(sets))]
    rows = random_rows(converted, lengths)
    ids, mask = rows.padded()
    with torch.no_grad():
        sets = [s if s is None else s.fused(converted.dtype, converted.device) for s in sets]
    mixed = run(converted, Plan(sets), ids, mask)
    bare = run(converted, Plan([None] * len(sets)), ids, mask)
    for i, (own, length) in enumerate(zip(sets, lengths, strict=True)):
        alone = run(converted, Plan([own]), rows.one(i))[0]
        close(mixed[i, :length], alone, msg=f"row {i}: {methods[i - 1].name if 0 < i <= len(methods) else own}")
        if own is not None and own.by_site:
            assert float((alone - bare[i, :length]).abs().max()) > 1e-6


def test_linear_sites_keep_names_and_shapes(make_backbone):
    original = make_backbone()
    converted = convert_to_lsg(original, **SMALL)
    assert converted.sites == original.sites
    assert {n: t.shape for n, t in original.model.state_dict().items() if "position" not in n} == {
        n: t.shape for n, t in converted.model.state_dict().items() if "position" not in n and n != GLOBALS
    }


@pytest.mark.parametrize("method", [LoRA(layers=(0, 2)), AoTFC(), PTuningV2(length=2)])
@pytest.mark.parametrize("kind", ["norm", "pooling"])
def test_gradients_are_those_of_finite_differences(make_backbone, random_rows, random_params, method, kind):
    converted = long(make_backbone, kind=kind)
    params = {k: t.double().requires_grad_() for k, t in random_params(converted, method).items()}
    ids, mask = random_rows(converted, (90, 41)).padded()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 90, 32, generator=generator, dtype=torch.float64) * mask.unsqueeze(-1)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in params.values()]

    def loss(step=0.0):
        moved = {k: t + step * d for (k, t), d in zip(params.items(), directions, strict=True)}
        hidden = converted.run(Plan([DeltaSet(method.deltas(moved, converted))] * 2), ids, mask)
        return (hidden * weights).sum()

    gradients = torch.autograd.grad(loss(), list(params.values()))
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    with torch.no_grad():
        slope = float(loss(1e-6) - loss(-1e-6)) / 2e-6
    assert slope == pytest.approx(expected, rel=1e-5)


def data_of(tasks):
    words = ("good", "bad")
    rows = [{"text": " ".join([words[i % 2], *["film the not very"] * 20]), "y": words[i % 2]} for i in range(8)]
    task = dataclasses.replace(tasks["classification"], labels=words)
    return task, rows


def test_an_adapter_trains_saves_loads_and_serves_long_texts(make_backbone, tasks, tmp_path):
    converted = convert_to_lsg(make_backbone(), **SMALL)
    task, rows = data_of(tasks)
    data = TaskData(task=task, train=Dataset.from_list(rows), validation=Dataset.from_list(rows))
    config = TrainConfig(epochs=1, batch_size=4, max_length=120, gradient_checkpointing=True, progress=False)
    result = train(converted, data, LoRA(r=2), tmp_path / "long", config=config)
    again = train(converted, data, LoRA(r=2), config=dataclasses.replace(config, gradient_checkpointing=False))
    for name, tensor in result.adapter.params.items():
        torch.testing.assert_close(again.adapter.params[name], tensor, rtol=1e-4, atol=1e-5)
    adapter = Adapter.load(tmp_path / "long", converted)
    assert adapter.max_length == 120
    assert adapter.backbone["lsg"] == dataclasses.asdict(converted.lsg)
    bank = Bank(converted)
    bank.add("long", adapter)
    text = rows[0]["text"]
    beyond = bank.predict([("long", text), (None, text), ("long", "good")])
    cut = Bank(converted)
    cut.add("long", dataclasses.replace(adapter, max_length=40))
    assert not torch.allclose(beyond[0].logits, cut.predict([("long", text)])[0].logits)
    original = make_backbone()
    with pytest.raises(BackboneError, match=r"trained on backbone 'bert\+lsg:max_length=200,block=8,sparse=6'"):
        Adapter.load(tmp_path / "long", original)
    with pytest.raises(AdapterError, match="LSG attention"):
        merge(adapter, converted, tmp_path / "merged")


def test_full_fine_tuning_trains_the_global_tokens_too(make_backbone, random_rows, random_adapter):
    converted = convert_to_lsg(make_backbone(), **SMALL)
    params = FullFineTuning().init(converted, torch.Generator())
    assert params[GLOBALS].shape == (1, 32)
    tuned = converted.with_weights({GLOBALS: params[GLOBALS] + 1})
    ids = random_rows(converted, (70,)).one(0)
    assert tuned.lsg == converted.lsg and tuned.fingerprint != converted.fingerprint
    assert not torch.allclose(run(tuned, Plan([None]), ids), run(converted, Plan([None]), ids))
    bank = Bank(converted)
    bank.add("full", random_adapter(converted, FullFineTuning(), max_length=100))
    assert bank.predict([("full", "good bad " * 30)])[0].logits.isfinite().all()


def test_detaching_and_cloning_leave_a_converted_backbone_whole(make_backbone, random_rows):
    converted = convert_to_lsg(make_backbone(), **SMALL)
    ids = random_rows(converted, (70,)).one(0)
    before = run(converted, Plan([None]), ids)
    copied = converted.clone()
    assert torch.equal(run(copied, Plan([None]), ids), before)
    assert copied.fingerprint == converted.fingerprint
    converted.detach()
    assert not any("forward" in module.__dict__ for module in converted.model.modules())
    converted.attach()
    assert torch.equal(run(converted, Plan([None]), ids), before)


# -------------------------------------------------------------------- its name


def test_settings_and_weights_make_the_fingerprint(make_backbone):
    original = make_backbone()
    first, same, other = (convert_to_lsg(original, **SMALL, kind=kind) for kind in ("norm", "norm", "pooling"))
    assert first.fingerprint == same.fingerprint
    assert len({original.fingerprint, first.fingerprint, other.fingerprint}) == 3
    assert convert_to_lsg(make_backbone(seed=1), **SMALL).fingerprint != first.fingerprint


def test_a_converted_backbone_loads_by_its_name(minilm):
    converted = Backbone.load("minilm+lsg:kind=pooling,block=32,mask_first=true,max_length=600")
    assert converted.name == "minilm+lsg:max_length=600,block=32,kind=pooling,mask_first=true"
    expected = LSG(kind="pooling", block=32, mask_first=True, max_length=600)
    assert converted.lsg == expected and split_name(converted.name) == ("minilm", expected)
    half = Backbone.load(converted.name, dtype="float16")
    assert half.fingerprint == converted.fingerprint and half.dtype == torch.float16
    assert split_name("minilm+lsg") == ("minilm", LSG())
    assert split_name("minilm") == ("minilm", None)
    ids = torch.randint(1000, 9000, (1, 590), generator=torch.Generator().manual_seed(0))
    assert bool(run(converted, Plan([None]), ids).isfinite().all())
    with pytest.raises(PlanError, match="600"):
        run(converted, Plan([None]), ids.repeat(1, 2))


def test_a_folder_whose_name_ends_alike_is_a_folder(tmp_path):
    folder = tmp_path / "mine+lsg"
    folder.mkdir()
    assert split_name(str(folder)) == (str(folder), None)


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", OTHERS)
def test_models_without_absolute_positions_or_with_causal_attention_are_refused(make_backbone, name):
    reason = "before them" if name in ("gpt2", "opt", "llama") else "relative or rotary"
    with pytest.raises(BackboneError, match=reason):
        convert_to_lsg(make_backbone(name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="nrom"), "'norm'"),
        (dict(block=6, sparsity=4), "does not divide"),
        (dict(block=0), "block=0"),
        (dict(sparse=-1), "sparse=-1"),
        (dict(num_global=True), "num_global=True"),
        (dict(kind="lsh", block=6, sparsity=2), "even"),
        (dict(num_global=0, mask_first=True), "mask_first"),
        (dict(max_length=20), "40 positions"),
        (dict(num_global=41), "num_global=41"),
        (dict(kind="stride", block=8, sparsity=8), "4"),
    ],
)
def test_impossible_settings_are_refused(make_backbone, settings, message):
    with pytest.raises(ConfigError, match=message):
        convert_to_lsg(make_backbone(), **(SMALL | settings))


def test_what_cannot_be_made_into_global_tokens_is_refused(make_model, make_backbone):
    bare = Backbone(make_model("bert"))
    with pytest.raises(BackboneError, match="no first token"):
        convert_to_lsg(bare, **SMALL)
    assert convert_to_lsg(bare, **SMALL, num_global=0).max_length == 200
    with pytest.raises(BackboneError, match="no mask token"):
        convert_to_lsg(make_backbone(), **SMALL, num_global=2)


def test_a_converted_backbone_is_not_converted_again(make_backbone):
    with pytest.raises(BackboneError, match="already"):
        convert_to_lsg(convert_to_lsg(make_backbone(), **SMALL))


def test_names_with_wrong_settings_say_what_there_is():
    for name, message in (
        ("minilm+lsg:blok=4", "'block'"),
        ("minilm+lsg:block", "NAME=VALUE"),
        ("minilm+lsg:block=four", "whole number"),
        ("minilm+lsg:mask_first=1", "true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            Backbone.load(name)


def test_a_saved_model_without_its_global_tokens_is_refused(make_backbone, tmp_path):
    converted = convert_to_lsg(make_backbone(), **SMALL)
    converted.detach()
    converted.model.save_pretrained(tmp_path)
    converted.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"\+lsg"):
        Backbone.load(tmp_path)


def test_a_row_too_long_is_named(make_backbone, random_rows):
    converted = convert_to_lsg(make_backbone(), **SMALL)
    ids, mask = random_rows(converted, (10, 201)).padded()
    with pytest.raises(PlanError, match=r"row 1: 201 positions"):
        run(converted, Plan([None, None]), ids, mask)


def test_transformers_own_loops_are_refused(make_backbone):
    converted = convert_to_lsg(make_backbone(), **SMALL)
    converted.detach()
    with pytest.raises(BackboneError, match="LSG attention"):
        attach(converted.model, LoRA())
