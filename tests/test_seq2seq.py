"""Encoder-decoders with their decoder: sites, every delta on them, and training, each against the plain model."""

import copy
import dataclasses

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from multitune import (
    IA3,
    Adapter,
    AdapterError,
    AoTFC,
    Backbone,
    BackboneError,
    Bank,
    BitFit,
    ConfigError,
    DeltaSet,
    Head,
    Houlsby,
    LoRA,
    Plan,
    PlanError,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    Task,
    convert_to_lsg,
    evaluate,
    get_method,
    merge,
    method_names,
    train,
    train_many,
)
from multitune.batching import Encoded
from multitune.generation import evaluate_texts
from multitune.language_loss import token_losses
from multitune.merging import merge_deltas
from multitune.tasks import TaskData
from multitune.training import TrainJob
from multitune.training.data import Collator, Item

WRITERS = ["t5/writes", "t5/gated/writes", "bart/writes"]
MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]
SMALL = {
    "ptuning_v2": dict(length=3),
    "prefix": dict(length=3, reparametrise=False),
    "prompt": dict(length=2),
    "dsee": dict(num_sparse=9, r=2),
}


@pytest.fixture(scope="module")
def tiny(make_backbone):
    """`tiny(name)`: one backbone per writer, shared."""
    made = {}
    return lambda name: made.setdefault(name, make_backbone(name))


@pytest.fixture
def plain(make_model):
    """`plain(name)`: transformers' own model with the weights of `tiny(name)`."""
    return lambda name: make_model(name).eval()


@pytest.fixture(scope="module")
def texts():
    """`texts(lengths, answers)`: ids and mask for the encoder, and what the decoder reads."""

    def make(lengths, answers, seed=0):
        g = torch.Generator().manual_seed(seed)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(5, 97, mask.shape, generator=g) * mask
        written = torch.randint(5, 97, (len(lengths), answers), generator=g)
        return ids, mask, torch.cat([torch.full((len(lengths), 1), 4), written], 1)

    return make


def run(backbone, sets, ids, mask, written):
    with torch.no_grad():
        return backbone.run(Plan(sets), ids, mask, decoder_input_ids=written)


# ---- sites


@pytest.mark.parametrize("name", WRITERS)
def test_a_role_selects_its_sites_in_every_stack_and_with_the_stack_in_one(tiny, name):
    backbone = tiny(name)
    first, layers = backbone.num_encoder_layers, backbone.num_layers
    assert layers == first + 2
    queries = [s.name for s in backbone.find_sites("linear", ("query",))]
    encoder = [f"layer.{i}.query" for i in range(first)]
    decoder = [f"layer.{i}.{part}query" for i in range(first, layers) for part in ("", "cross.")]
    assert queries == encoder + decoder
    for stack, expected in (("encoder", encoder), ("decoder", decoder[::2]), ("cross", decoder[1::2])):
        assert [s.name for s in backbone.find_sites("linear", (f"{stack}.query",))] == expected
    assert [s.layer for s in backbone.find_sites("attention", layers=(first,))] == [first, first]
    assert backbone.find_sites("norm", ("cross.attention_norm",))
    with pytest.raises(ConfigError, match="no linear site has the role 'cross.ffn_in'"):
        backbone.find_sites("linear", ("cross.ffn_in",))
    heads = {s.stack: backbone.heads_at(s) for s in backbone.sites}
    config = backbone.model.config
    assert heads["encoder"] == (4, 4)
    assert heads["cross"] == heads["decoder"] == ((2, 2) if config.model_type == "bart" else (4, 4))


@pytest.mark.parametrize("name", WRITERS)
def test_every_parameter_of_the_stacks_but_tables_belongs_to_a_site(tiny, name):
    backbone = tiny(name)
    at = tuple(f"{s.module}." for s in backbone.sites if s.kind in ("linear", "norm", "embedding"))
    left = [n for n, _ in backbone.model.named_parameters() if not n.startswith(at)]
    assert all("position" in n or "relative" in n or n == "shared.weight" for n in left), left


def test_the_encoder_alone_is_what_it_was(make_backbone, make_model, tiny):
    """Its sites keep their names, no decoder's among them, and adapters of one are refused by the other."""
    model = make_model("bart/writes")
    alone = Backbone(copy.deepcopy(model), decoder=False)
    same = Backbone(copy.deepcopy(model.model))
    assert alone.sites[0].stack is None and not alone.decodes and not same.decodes
    assert {s.name for s in same.sites} < {s.name for s in tiny("bart/writes").sites}
    assert same.fingerprint != tiny("bart/writes").fingerprint
    assert Backbone(copy.deepcopy(model.model), decoder=False).fingerprint == same.fingerprint
    with pytest.raises(BackboneError, match=r"its encoder runs alone\. Load it with its decoder: .*\+decoder"):
        _ = same.lm_head


# ---- the bare model


@pytest.mark.parametrize("name", WRITERS)
def test_logits_and_loss_are_transformers_own(tiny, plain, texts, name, close):
    backbone, model = tiny(name), plain(name)
    if backbone.parts.bias is not None:
        model.final_logits_bias.copy_(torch.randn(1, 97, generator=torch.Generator().manual_seed(0)))
        backbone = Backbone(copy.deepcopy(model), name=name)
    for lengths in ([7, 7, 7], [7, 2, 5]):
        ids, mask, written = texts(lengths, 5)
        labels = written[:, 1:].clone()
        labels[1, 3:] = -100
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            hidden = backbone.run(Plan([None] * 3), ids, mask, decoder_input_ids=written)
        close(backbone.lm_head(hidden), expected)
        rows = []
        for read, open_, answer in zip(ids, mask, labels, strict=True):
            known = answer[answer >= 0].tolist()
            whole = Encoded(input_ids=[*read[open_ > 0].tolist(), *known])
            rows.append(Item(sequences=(whole,), target=len(known)))
        batch = Collator("generation", 0, start_ids=backbone.start_ids)(rows)
        targets = batch.pop("targets")
        with torch.no_grad():
            ours = token_losses(backbone.lm_head, backbone.run(Plan([None] * 3), **batch), targets).mean()
        close(ours, loss)


# ---- deltas


def small(name):
    return get_method(name)(**SMALL.get(name, {}))


@pytest.mark.parametrize("name", WRITERS)
def test_every_method_in_one_batch_equals_every_row_alone(make_backbone, texts, delta_set, name, close):
    backbone = make_backbone(name)
    backbone.model.double()
    sets = [None]
    for i, method in enumerate(MIXABLE):
        try:
            sets.append(delta_set(backbone, small(method), i, fused=True))
        except ConfigError as error:
            assert method in ("u_tuning", "ptuning_v1"), (method, error)
    lengths = [2 + (5 * i) % 9 for i in range(len(sets))]
    ids, mask, written = texts(lengths, 6)
    mixed = run(backbone, sets, ids, mask, written)
    bare = run(backbone, [None] * len(sets), ids, mask, written)
    for i, (one, length) in enumerate(zip(sets, lengths, strict=True)):
        close(mixed[i], run(backbone, [one], ids[i : i + 1, :length], None, written[i : i + 1])[0])
    changed = ((mixed - bare).abs().amax((1, 2)) > 1e-3).sum()
    assert changed >= len(sets) - 2  # head tuning and the bare row change nothing


one_row = st.tuples(st.sampled_from([*MIXABLE, None]), st.integers(1, 9), st.integers(0, 2))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(WRITERS),
    rows=st.lists(one_row, min_size=2, max_size=7),
    answers=st.integers(1, 6),
)
def test_any_mix_equals_the_rows_alone_in_trainable_form(tiny, texts, delta_set, close, name, rows, answers):
    backbone = tiny(name)
    made = {}
    sets = []
    for method, _, seed in rows:
        if method in (None, "u_tuning", "ptuning_v1"):
            sets.append(None)
        else:
            key = (method, seed)
            sets.append(made.setdefault(key, delta_set(backbone, small(method), seed)))
    ids, mask, written = texts([n for _, n, _ in rows], answers)
    mixed = backbone.run(Plan(sets), ids, mask, decoder_input_ids=written).detach()
    for i, one in enumerate(sets):
        alone = run(backbone, [one], ids[i : i + 1, : rows[i][1]], None, written[i : i + 1])
        close(mixed[i], alone[0])


@pytest.mark.parametrize("name", WRITERS)
def test_no_written_token_sees_a_later_one(tiny, texts, delta_set, name):
    backbone = tiny(name)
    methods = [PTuningV2(length=3), PromptTuning(length=2), LoRA(), AoTFC(r=2)]
    sets = [*(delta_set(backbone, m, i, fused=True) for i, m in enumerate(methods)), None]
    ids, mask, written = texts([6] * 5, 7)
    changed = written.clone()
    changed[:, 5] = 5 + (changed[:, 5] + 1) % 80
    before, after = run(backbone, sets, ids, mask, written), run(backbone, sets, ids, mask, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-5, atol=1e-6)
    assert ((before - after)[:, 5:].abs().amax((1, 2)) > 1e-3).all()


@pytest.mark.parametrize("stack", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("name", WRITERS)
def test_lora_on_one_stack_is_a_change_of_its_weights(tiny, plain, texts, name, stack, random_params, close):
    backbone, model = tiny(name), plain(name)
    method = LoRA(r=2, targets=tuple(f"{stack}.{role}" for role in ("query", "key", "value", "attention_output")))
    params = random_params(backbone, method, 1)
    with torch.no_grad():
        for site in method.sites(backbone):
            A, B = params[f"{site.name}.A"], params[f"{site.name}.B"]
            path = site.module if name.startswith("t5") else f"model.{site.module}"
            model.get_submodule(path).weight.add_(8.0 * (A @ B).T)
    ids, mask, written = texts([6, 4], 5)
    ours = run(backbone, [DeltaSet(method.deltas(params, backbone)), None], ids, mask, written)
    with torch.no_grad():
        close(backbone.lm_head(ours)[0], model(input_ids=ids[:1], decoder_input_ids=written[:1]).logits[0])


class Reference:
    """Attention written out, entry by entry, with a prefix in front of every module's own keys and values."""

    def __init__(self, prefixes):
        self.prefixes = prefixes
        """Module -> keys and values `[M, H, K]`."""

    def __call__(self, module, query, key, value, mask, scaling=None, position_bias=None, **kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                keys, values = key[0, h], value[0, h]
                bias = torch.zeros(len(keys)) if position_bias is None else position_bias[0, h, t].clone()
                if mask is not None:
                    bias = bias + mask[0, 0, t, : len(keys)]
                if module in self.prefixes:
                    front, of_front = (p[:, h] for p in self.prefixes[module])
                    keys, values = torch.cat([front, keys]), torch.cat([of_front, values])
                    bias = torch.cat([torch.zeros(len(front)), bias])
                scores = (keys * query[0, h, t]).sum(1) * scaling + bias
                out[0, t, h] = (scores.softmax(0)[:, None] * values).sum(0)
        return out, None


@pytest.mark.parametrize("name", WRITERS)
def test_prefixes_of_all_three_attentions_are_keys_and_values_without_a_place(
    tiny, plain, texts, name, random_params, close
):
    """T5's bias by distance is not for them, and the distances of what they stand in front of stay."""
    backbone, model = tiny(name), plain(name)
    method = PrefixTuning(length=3, reparametrise=False)
    params = random_params(backbone, method, 1)
    base = model if name.startswith("t5") else model.model
    prefixes = {}
    for site in method.sites(backbone):
        heads = backbone.heads_at(site)[1]
        prefixes[base.get_submodule(site.module)] = tuple(
            params[f"{site.name}.{k}"].view(3, heads, -1) for k in ("keys", "values")
        )
    assert len(prefixes) == backbone.num_encoder_layers + 2 * 2
    ALL_ATTENTION_FUNCTIONS.register("reference", Reference(prefixes))
    ALL_MASK_ATTENTION_FUNCTIONS.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    for config in (base.config, base.encoder.config, base.decoder.config):
        config._attn_implementation = "reference"
    ids, mask, written = texts([6, 4], 5)
    ours = run(backbone, [DeltaSet(method.deltas(params, backbone)), None], ids, mask, written)
    with torch.no_grad():
        expected = model(input_ids=ids[:1], decoder_input_ids=written[:1]).logits[0]
    close(backbone.lm_head(ours)[0], expected)
    bare = run(backbone, [None], ids[:1], None, written[:1])
    assert (backbone.lm_head(bare)[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", WRITERS)
def test_aot_adds_rows_of_read_tokens_in_the_encoder_and_of_written_ones_in_the_decoder(
    tiny, plain, texts, name, random_params, close
):
    backbone, model = tiny(name), plain(name)
    method = AoTFC(r=2)
    params = random_params(backbone, method, 1)
    one = DeltaSet(method.deltas(params, backbone))
    (_, delta), = one.of(type(method.deltas(params, backbone)["layers"][0]))  # fmt: skip
    table = delta.source.rows(torch.arange(97), False)  # [V, L, D]
    ids, mask, written = texts([6, 4], 5)
    base = model if name.startswith("t5") else model.model
    (site,) = [s for s in backbone.sites if s.kind == "layers"]
    for i, path in enumerate(site.layers):
        tokens = ids[0] if i < backbone.num_encoder_layers else written[0]
        base.get_submodule(path).register_forward_pre_hook(
            lambda m, args, bias=table[tokens, i]: (args[0] + bias, *args[1:])
        )
    with torch.no_grad():
        expected = model(input_ids=ids[:1], decoder_input_ids=written[:1]).logits[0]
    close(backbone.lm_head(run(backbone, [one, None], ids, mask, written))[0], expected)


@pytest.mark.parametrize("name", WRITERS)
def test_lora_and_ia3_are_pefts(tiny, plain, texts, name, random_params, close):
    peft = pytest.importorskip("peft")
    backbone = tiny(name)
    is_t5 = name.startswith("t5")
    names = ("q", "v") if is_t5 else ("q_proj", "v_proj")
    ids, mask, written = texts([6, 4], 5)
    method = LoRA(r=2)
    params = random_params(backbone, method, 1)
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=16, target_modules=list(names))
    theirs = peft.get_peft_model(plain(name), config).eval()
    found = {n: m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    sites = {s.module: s for s in method.sites(backbone)}
    assert len(found) == len(sites)  # its default targets are those of all three attentions
    for path, module in found.items():
        site = sites[path.removeprefix("base_model.model.").removeprefix("model.")]
        module.lora_A["default"].weight.data = params[f"{site.name}.A"].T.clone()
        module.lora_B["default"].weight.data = params[f"{site.name}.B"].T.clone()
    ours = run(backbone, [DeltaSet(method.deltas(params, backbone)), None], ids, mask, written)
    with torch.no_grad():
        expected = theirs(input_ids=ids[:1], decoder_input_ids=written[:1]).logits[0]
    close(backbone.lm_head(ours)[0], expected)


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("name", WRITERS)
def test_prompt_vectors_stand_among_the_encoders_words(tiny, plain, texts, name, position, close):
    backbone, model = tiny(name), plain(name)
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    method = PromptTuning(length=2, position=position)
    ids, mask, written = texts([4, 6], 5)
    ours = run(backbone, [DeltaSet(method.deltas({"vectors": vectors}, backbone)), None], ids, mask, written)
    with torch.no_grad():
        words = model.get_encoder().embed_tokens(ids[:1, :4])
        joined = [vectors[None], words] if position == 0 else [words, vectors[None]]
        expected = model(inputs_embeds=torch.cat(joined, 1), decoder_input_ids=written[:1]).logits[0]
    close(backbone.lm_head(ours)[0], expected)


def sublayers(name, base, layer, encoder_layers):
    """The modules that give a layer's sub-layer outputs, in the order they run, by hand."""
    inside = base.encoder if layer < encoder_layers else base.decoder
    at = layer if layer < encoder_layers else layer - encoder_layers
    if name.startswith("t5"):
        return [part.dropout for part in inside.block[at].layer]
    one = inside.layers[at]
    return [one.self_attn.out_proj, *([one.encoder_attn.out_proj] if layer >= encoder_layers else []), one.fc2]


@pytest.mark.parametrize("name", WRITERS)
def test_adapters_stand_behind_every_sublayer_of_both_stacks(tiny, plain, texts, name, random_params, close):
    backbone, model = tiny(name), plain(name)
    method = Houlsby(bottleneck=3, activation="relu")
    params = random_params(backbone, method, 1)
    base = model if name.startswith("t5") else model.model
    for layer in range(backbone.num_layers):
        modules = sublayers(name, base, layer, backbone.num_encoder_layers)
        parts = ["attention", "ffn"] if len(modules) == 2 else ["attention", "cross.attention", "ffn"]
        for module, part in zip(modules, parts, strict=True):
            own = [params[f"layer.{layer}.{part}_sublayer.{k}"] for k in ("down", "down_bias", "up", "up_bias")]
            module.register_forward_hook(lambda m, args, y, w=own: y + (y @ w[0] + w[1]).relu() @ w[2] + w[3])
    ids, mask, written = texts([6, 4], 5)
    one = DeltaSet({k: v for k, v in method.deltas(params, backbone).items() if k.endswith("sublayer")})
    assert len(one.by_site) == 2 * backbone.num_encoder_layers + 3 * 2
    ours = run(backbone, [one, None], ids, mask, written)
    with torch.no_grad():
        close(backbone.lm_head(ours)[0], model(input_ids=ids[:1], decoder_input_ids=written[:1]).logits[0])


def test_deltas_of_a_stack_can_be_chosen_by_methods(tiny):
    backbone = tiny("t5/gated/writes")
    ia3 = IA3(outputs=("cross.key", "cross.value"), inputs=("decoder.ffn_out",))
    shapes = ia3.shapes(backbone)
    assert {n.rsplit(".", 2)[-2] for n in shapes} == {"key", "value", "ffn_out"}
    assert all(".cross." in n for n in shapes if "ffn" not in n)
    assert shapes["layer.3.ffn_out.s"] == torch.Size((48,))
    assert all("cross" in n for n in BitFit(subset=("cross.query",)).shapes(backbone))


# ---- training


WRITE = Task(name="name it", kind="generation", template=("{text} :",), label="answer")
ROWS = [
    {"text": "good film", "answer": "good"},
    {"text": "bad bad film x1", "answer": "bad bad"},
    {"text": "the very good film", "answer": ["good", "very good"]},
    {"text": "not good", "answer": "bad"},
]
QUICK = dict(epochs=6, batch_size=8, progress=False, learning_rate=2e-2)


@pytest.fixture
def data():
    return TaskData(task=WRITE, train=ROWS * 4, validation=ROWS, test=None)


def test_the_encoder_reads_the_prompt_and_the_decoder_its_start_and_the_answer(tiny):
    rows = [Item(sequences=(Encoded(input_ids=[7, 8, 9, 20, 3]),), target=2),
            Item(sequences=(Encoded(input_ids=[6, 21, 22, 3]),), target=3)]  # fmt: skip
    batch = Collator("generation", 0, start_ids=tiny("t5/writes").start_ids)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [6, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[4, 20, 3, 0], [4, 21, 22, 3]]
    assert batch["targets"].tolist() == [[-100, 20, 3, -100], [-100, 21, 22, 3]]


@pytest.mark.parametrize(
    ("name", "method"),
    [("t5/gated/writes", "lora"), ("bart/writes", "lora"), ("t5/writes", "prefix"), ("bart/writes", "full")],
)
def test_an_adapter_learns_to_write_and_is_served(make_backbone, data, tmp_path, name, method):
    backbone = make_backbone(name)
    chosen = LoRA(r=8, targets=("query", "value", "ffn_in", "ffn_out")) if method == "lora" else get_method(method)()
    rate = 5e-3 if method == "full" else 2e-2
    found = train(backbone, data, chosen, tmp_path / "a", **(QUICK | {"learning_rate": rate}))
    assert found.best_metric < 0.6 * torch.tensor(found.history[0]["loss"]).exp()
    again = Adapter.load(tmp_path / "a", backbone)
    scores = evaluate(backbone, again, ROWS)
    assert scores["perplexity"] == pytest.approx(found.best_metric, rel=1e-4)
    bank = Bank(backbone)
    bank.add("a", tmp_path / "a")
    text = bank.generate([("a", ROWS[1])], {"max_new_tokens": 4})[0]
    assert text.finish_reason in ("eos", "length")


def test_training_is_judged_by_written_texts_and_texts_are_judged_beside_references(make_backbone, data):
    backbone = make_backbone("t5/writes")
    task = dataclasses.replace(WRITE, metric="exact_match")
    found = train(
        backbone, dataclasses.replace(data, task=task), "lora", epochs=1, batch_size=8, progress=False, eval_texts=3,
        eval_new_tokens=4,
    )  # fmt: skip
    assert found.metric == "exact_match"
    bank = Bank(backbone)
    bank.add("a", found.adapter)
    done = evaluate_texts(bank, "a", ROWS, {"max_new_tokens": 4})
    assert [row.prompt for row in done.rows] == [f"{row['text']} :" for row in ROWS]


def test_recomputed_layers_give_the_same_gradients(make_backbone, texts, random_params, close):
    for name in ("t5/writes", "bart/writes"):
        found = []
        for recomputes in (False, True):
            backbone = make_backbone(name)
            backbone.model.train()
            if recomputes:
                backbone.enable_gradient_checkpointing()
            method = AoTFC(r=2)
            lora, aot = LoRA(r=2), method
            params = {k: t.requires_grad_() for k, t in random_params(backbone, lora, 1).items()}
            rows = {k: t.requires_grad_() for k, t in random_params(backbone, aot, 2).items() if t.is_floating_point()}
            rows = random_params(backbone, aot, 2) | rows
            plan = Plan([DeltaSet(lora.deltas(params, backbone)), DeltaSet(aot.deltas(rows, backbone))])
            ids, mask, written = texts([5, 3], 4)
            backbone.run(plan, ids, mask, decoder_input_ids=written).pow(2).sum().backward()
            found.append([t.grad for t in (*params.values(), *rows.values()) if t.grad is not None])
        assert len(found[0]) == len(found[1]) > 4
        for a, b in zip(*found, strict=True):
            close(a, b)


# ---- merging


@pytest.mark.parametrize("name", WRITERS)
def test_a_merged_adapter_is_an_ordinary_encoder_decoder(make_backbone, texts, random_params, close, tmp_path, name):
    backbone = make_backbone(name)
    backbone.model.double()
    method = LoRA(r=2, targets=("query", "value", "cross.key", "ffn_out"))
    params = {k: t.double() for k, t in random_params(backbone, method, 1).items()}
    head = Head.for_task(WRITE)
    adapter = Adapter(
        name="a", method=method, params=params, head=head, head_params={}, task=WRITE, backbone=backbone.describe(),
        max_length=32,
    )  # fmt: skip
    report = merge(adapter, backbone, tmp_path / "merged")
    assert report.max_difference < 1e-4 * report.max_magnitude
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    ids, mask, written = texts([6, 4], 5)
    deltas = DeltaSet(method.deltas(params, backbone))
    hidden = run(backbone, [deltas] * 2, ids, mask, written)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits
    close(logits, backbone.lm_head(hidden))
    words = LoRA(r=2, targets=("embedding",))
    deltas = DeltaSet(words.deltas(random_params(backbone, words, 1), backbone))
    assert set(deltas.by_site) == {"embedding", "decoder.embedding"}
    with pytest.raises(AdapterError, match="encoder, decoder and head have one table of words"):
        merge_deltas(backbone, deltas)


# ---- what is refused


def test_what_a_decoder_does_not_do_is_refused_by_name(tiny, data, texts, make_backbone, make_model, tmp_path):
    backbone = tiny("bart/writes")
    ids, mask, _ = texts([4], 3)
    with pytest.raises(PlanError, match="needs decoder_input_ids"):
        backbone.run(Plan([None]), ids, mask)
    with pytest.raises(PlanError, match="the decoder reads 41 tokens, but backbone .* has 40"):
        backbone.run(Plan([None]), ids, mask, decoder_input_ids=torch.full((1, 41), 5))
    mood = Task(name="mood", kind="classification", template=("{text}",), label="y", labels=("bad", "good"))
    rows = [{"text": "good", "y": "good"}]
    with pytest.raises(BackboneError, match="a head of kind classification has nothing to read; load its encoder"):
        train(backbone, TaskData(task=mood, train=rows, validation=rows, test=None), "lora")
    with pytest.raises(BackboneError, match="not trained together; train them one by one"):
        train_many(backbone, [TrainJob(data=data, method="lora")])
    with pytest.raises(BackboneError, match="LSG here is for encoders; load it without"):
        convert_to_lsg(backbone)
    with pytest.raises(BackboneError, match="the compiler is not tested"):
        backbone.compile()
    with pytest.raises(BackboneError, match="a text alone gives no keys and values"):
        PrefixTuning(length=2, start_text="good").init(backbone, torch.Generator())
    with pytest.raises(BackboneError, match="bert is no encoder-decoder"):
        Backbone(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1)), decoder=True)
    with pytest.raises(BackboneError, match="a BartModel has no head, without which its decoder cannot write"):
        Backbone(make_model("bart/writes").model, decoder=True)
    silent = make_backbone("bart/writes", decoder_start_token_id=None)
    with pytest.raises(BackboneError, match="which token its decoder begins with"):
        train(silent, data, "lora")


def test_a_name_with_decoder_loads_both_stacks(make_model, make_backbone, tiny, tmp_path):
    for name in ("t5/writes", "bart/writes"):
        folder = tmp_path / name.replace("/", "-")
        make_model(name).save_pretrained(folder)
        tiny(name).tokenizer.save_pretrained(folder)
        loaded = Backbone.load(f"{folder}+decoder")
        assert loaded.decodes and loaded.fingerprint == tiny(name).fingerprint
        assert not Backbone.load(folder).decodes
        quantised = Backbone.load(f"{folder}+decoder+int8")
        assert quantised.decodes and quantised.quantized is not None
    with pytest.raises(BackboneError, match=r"load its encoder alone: '[^+]*\+int8'"):
        Head(kind="classification", num_outputs=2).check(quantised)
    with pytest.raises(BackboneError, match=r"Backbone\.load\('[^+]*\+decoder\+int8'\)"):
        _ = Backbone.load(f"{folder}+int8").lm_head
    with pytest.raises(BackboneError, match="bert is no encoder-decoder"):
        make_model("bert").save_pretrained(tmp_path / "bert")
        Backbone.load(f"{tmp_path / 'bert'}+decoder")


def test_a_checkpoint_without_the_head_does_not_write(make_model, tiny, tmp_path):
    """Where the head is not tied to the word embeddings, these must not stand in for it."""
    config = copy.deepcopy(make_model("bart/writes").config)
    config.tie_word_embeddings = False
    transformers.BartModel(config).save_pretrained(tmp_path)
    tiny("bart/writes").tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"its checkpoint lacks the weights lm_head\.weight"):
        Backbone.load(f"{tmp_path}+decoder")
