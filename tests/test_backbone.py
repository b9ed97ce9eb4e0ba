"""The backbone: what it accepts, what it leaves alone, and where inserted vectors and positions go."""

import copy
import inspect
import re
import shlex

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from multitune import (
    AoTFC,
    Backbone,
    BackboneError,
    Bank,
    ConfigError,
    DeltaSet,
    Head,
    LoRA,
    Plan,
    PlanError,
    PromptTuning,
    PTuningV2,
)
from multitune import plan as plan_module
from multitune.architectures import ARCHITECTURES, architecture_for, supported_model_types
from multitune.inputs import Batch
from multitune.joint import JointBatch
from multitune.sites import find_sites

SUPPORTED = (
    "albert, bart, bert, deberta, deberta-v2, distilbert, electra, gemma2, gemma3_text, gpt2, llama, mistral, "
    "modernbert, mpnet, opt, qwen2, qwen3, roberta, t5, xlm-roberta"
)
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=97)


@pytest.fixture
def checkpoint(make_model, make_backbone, tmp_path):
    """`checkpoint(name)`: a folder as the hub has them."""

    def save(name="bert", seed=0):
        folder = tmp_path / name.replace("/", "-")
        make_model(name, seed).save_pretrained(folder)
        make_backbone(name).tokenizer.save_pretrained(folder)
        return folder

    return save


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- which models


def test_every_supported_type_is_tested(make_model):
    tested = set(SUPPORTED.split(", "))
    assert set(supported_model_types()) == tested
    assert len(supported_model_types()) == sum(len(row.model_types) for row in ARCHITECTURES if row.when is None)
    for name in [*sorted(tested - {"deberta-v2"}), "deberta-v2/v3", "deberta-v2/conv"]:
        assert make_model(name).config.model_type == name.split("/")[0]


def test_an_unsupported_architecture_lists_the_supported_ones(make_backbone, tmp_path):
    model = transformers.BloomModel(transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=97))
    words = rf"architecture 'bloom' is not supported\. Supported: {SUPPORTED}\. To add it, add one Architecture row to"
    with pytest.raises(BackboneError, match=words):
        Backbone(model)
    assert hooks_on(model) == 0 and all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    make_backbone().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=words):
        Backbone.load(tmp_path)
    with pytest.raises(BackboneError, match="'robberta' is not supported. Did you mean 'roberta'"):
        architecture_for("robberta")


def test_a_row_of_the_table_that_does_not_fit_says_which_path(make_model):
    row = architecture_for("distilbert")
    model = make_model("bert")
    with pytest.raises(
        BackboneError, match="BertModel has no module 'transformer.layer', which the table row for disti"
    ):
        find_sites(model, row)


def test_sites_of_every_architecture(backbone):
    kind = backbone.model.config.model_type
    gated = kind == "modernbert" or (kind != "t5" and backbone.architecture.norm_kind == "rms")
    gated = gated or backbone.name == "t5/gated"
    linears = ["query", "key", "value", "attention_output", *(["ffn_gate"] if gated else []), "ffn_in", "ffn_out"]
    norms = ["attention_norm", "ffn_norm"]
    if kind.startswith("gemma"):
        norms = ["attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"]
    per_layer = [*linears, *norms, "attention_sublayer", "ffn_sublayer", "block_sublayer", "attention"]
    names = ["embedding", "layers"] if backbone.causal or kind == "t5" else ["embedding", "embedding_norm", "layers"]
    names += [f"layer.{i}.{role}" for i in range(backbone.num_layers) for role in per_layer]
    names += ["final_norm"] if backbone.causal or kind in ("modernbert", "t5") else []
    if kind == "modernbert":
        names.remove("layer.0.attention_norm")  # an identity there
    assert [s.name for s in backbone.sites] == names
    for site in backbone.sites:
        module = backbone.frozen(site.name)
        if site.kind == "linear":
            assert tuple(module.weight.shape) == (site.out_features, site.in_features)
        if site.kind == "norm":
            assert tuple(module.weight.shape) == (site.in_features,)
        if site.kind in ("linear", "norm"):
            assert (module.bias is not None) == site.bias
    assert {s.role for s in backbone.find_sites("linear", ("query", "value"), (1,))} == {"query", "value"}
    assert backbone.find_sites("sublayer", "ffn")[0].name == "layer.0.ffn_sublayer"  # a single role needs no tuple


def test_shape_of_every_architecture(backbone):
    expected = {"bert": (3, 32, True), "electra": (2, 20, True), "albert": (8, 20, True)}
    layers, width, types = expected.get(backbone.name, (2, 32, False))
    if backbone.name == "bert/eager":
        types = True
    assert backbone.num_layers == layers
    assert backbone.hidden_size == 32
    assert tuple(backbone.word_embeddings.shape) == (97, width)
    assert backbone.vocab_size == 97
    assert backbone.num_key_value_heads == getattr(backbone.model.config, "num_key_value_heads", 4)
    assert backbone.output_size == 32
    assert backbone.max_length == 40
    assert backbone.takes_token_types == types
    assert backbone.placeholder_id != backbone.pad_id
    with_pooler = ("bert", "roberta", "xlm-roberta", "albert", "mpnet")
    assert (backbone.pooler is not None) == (backbone.model.config.model_type in with_pooler)
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    assert backbone.describe() == {
        "name": backbone.name,
        "architecture": backbone.model.config.model_type,
        "hidden_size": 32,
        "num_layers": layers,
        "vocab_size": 97,
        "fingerprint": backbone.fingerprint,
    }
    assert repr(backbone).startswith(f'Backbone("{backbone.name}", {backbone.model.config.model_type}, ')


# ---- loading


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "roberta",
        "electra",
        "distilbert",
        "deberta-v2/v3",
        "modernbert",
        "gpt2",
        "opt",
        "llama",
        "gemma2",
        "gemma3_text",
        "albert",
        "t5/gated",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float16])
def test_load_a_folder(checkpoint, make_backbone, random_rows, name, dtype):
    folder = checkpoint(name)
    loaded = Backbone.load(folder, dtype=dtype)
    original = make_backbone(name)
    assert loaded.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    assert loaded.name == str(folder)
    assert loaded.fingerprint == original.fingerprint  # an adapter fits the same weights in any dtype
    assert loaded.clone().fingerprint == original.fingerprint
    ids = loaded.tokenizer("good film")["input_ids"]
    assert ids == original.tokenizer("good film")["input_ids"]
    hidden = loaded.run(Plan([None]), torch.tensor([ids]))
    assert hidden.dtype == loaded.dtype and torch.isfinite(hidden).all()
    if dtype == "float32":
        assert torch.equal(hidden, original.run(Plan([None]), torch.tensor([ids])))


@pytest.mark.parametrize("name", ["llama", "modernbert", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_frequencies_are_not_rounded(checkpoint, name, dtype):
    folder = checkpoint(name)
    loaded, wide = Backbone.load(folder, dtype=dtype), Backbone.load(folder)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    expected = {k: t for k, t in wide.model.named_buffers() if "inv_freq" in k}
    assert expected
    models = [loaded.model, loaded.clone().model, *([loaded.language_model().base_model] if loaded.has_lm_head else [])]
    for model in models:
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[k], t) for k, t in expected.items())  # of a row's position, which counts far


def test_a_site_that_is_not_there_is_refused_with_the_nearest(make_backbone):
    backbone = make_backbone("bert")
    assert backbone.frozen("layer.0.query").weight.shape == (32, 32)
    with pytest.raises(ConfigError, match="has no site 'layer.0.qeury'. Did you mean 'layer.0.query'"):
        backbone.frozen("layer.0.qeury")


def test_an_unknown_dtype_lists_the_known_ones(checkpoint):
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown; choose one of float32, bfloat16, float16"):
        Backbone.load(checkpoint(), dtype="int8")


def test_a_name_that_is_nothing_says_what_can_be_given(tmp_path):
    for name in ("no-such-org/no-such-model", str(tmp_path / "nothing"), str(tmp_path), "minilmm"):
        with pytest.raises(BackboneError, match=rf"cannot load backbone '{name}': .*Give 'minilm', 'smollm2', a fold"):
            Backbone.load(name)
    (tmp_path / "mybert").mkdir()
    with pytest.raises(BackboneError, match=r"there is no folder '.*mybart'\. Did you mean 'mybert'\? As a hub id: "):
        Backbone.load(tmp_path / "mybart")
    with pytest.raises(BackboneError, match="Did you mean 'minilm'"):
        Backbone.load("minilmm")


def test_a_packaged_name_with_a_typo_is_refused_before_the_hub_is_asked(tmp_path, monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("multitune.loading.AutoConfig.from_pretrained", asked)
        for name, meant in (
            ("minilmm", "minilm"),
            ("MiniLM", "minilm"),
            ("mini lm", "minilm"),
            ("smolm2+decoder", "smollm2"),
        ):
            with pytest.raises(BackboneError, match=rf"Did you mean '{meant}'\? Give 'minilm'"):
                Backbone.load(name)
    (tmp_path / "minilmm").mkdir()  # a folder of that name is meant as it is written
    with pytest.raises(BackboneError, match=r"cannot load backbone 'minilmm': (?!there is no folder)") as refused:
        Backbone.load("minilmm")
    assert ".." not in str(refused.value)


@pytest.mark.parametrize(("device", "near"), [("cuda:99", ""), ("gpu", "Did you mean 'cuda'? "), ("cuad", "'cuda'? ")])
def test_a_device_that_is_not_there_says_what_to_do(device, near):
    with pytest.raises(ConfigError, match=f"cannot use device '{device}': .*{re.escape(near)}.*Leave it out to use"):
        Backbone.load("minilm", device=device)


def test_loading_prints_nothing(checkpoint, capfd):
    folder = checkpoint()
    transformers_logging.enable_progress_bar()
    capfd.readouterr()
    Backbone.load(folder)
    assert transformers_logging.is_progress_bar_enabled()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("keep", [0, 9, 0.5, -10])
def test_truncated_weights_are_refused(checkpoint, keep):
    folder = checkpoint()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(BackboneError, match="cannot load backbone"):
        Backbone.load(folder)


def test_a_backbone_that_is_a_pickle_is_not_opened_and_the_line_of_the_refusal_converts_it(checkpoint):
    folder = checkpoint()
    before = Backbone.load(folder).fingerprint
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"pytorch_model\.bin is a pickle, .*convert it: python -c") as refused:
        Backbone.load(folder)
    program, option, code = shlex.split(str(refused.value).partition("convert it: ")[2])
    assert (program, option) == ("python", "-c")
    exec(code, {})  # in this process, which has torch already
    assert Backbone.load(folder).fingerprint == before


@pytest.mark.parametrize("there", ["pytorch_model.bin", "model.safetensors.index.json"])
def test_a_hub_id_without_safetensors_is_refused_before_transformers_has_it_converted(make_model, monkeypatch, there):
    def loads(*_, **__):
        raise OSError("transformers was asked")

    monkeypatch.setattr("multitune.loading.AutoConfig.from_pretrained", lambda source: make_model("bert").config)
    monkeypatch.setattr("multitune.loading.AutoModel.from_pretrained", loads)

    def fetched(source, file):
        if file != there:
            raise OSError(f"{source} has no {file}.")

    monkeypatch.setattr("multitune.loading.cached_file", fetched)
    no = r"no model.safetensors of .* \(org/old has no model.safetensors\).*: hf download org/old --local-dir"
    expected = no if there.endswith("bin") else "transformers was asked"
    with pytest.raises(BackboneError, match=rf"cannot load backbone 'org/old': .*{expected}"):
        Backbone.load("org/old")


def test_weights_that_are_missing_or_misshapen_are_refused(checkpoint):
    """transformers would fill them with random numbers, other ones each time, and say so in a log."""
    folder = checkpoint()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    missing = {k: t for k, t in tensors.items() if "layer.1.intermediate" not in k}
    save_file(missing, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"its checkpoint lacks the weights encoder\.layer\.1\.intermediate\.dense"):
        Backbone.load(folder)
    wrong = tensors | {"encoder.layer.0.output.dense.bias": torch.zeros(5)}
    save_file(wrong, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="cannot load backbone"):
        Backbone.load(folder)


def test_a_checkpoint_without_a_pooler_loads_the_same_each_time(make_backbone, random_adapter, tmp_path):
    """roberta-base and other masked language models have no pooler; a random one would change the fingerprint."""
    config = transformers.RobertaConfig(**TINY, max_position_embeddings=42, pad_token_id=1)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    make_backbone("roberta").tokenizer.save_pretrained(tmp_path)
    first, second = Backbone.load(tmp_path), Backbone.load(tmp_path)
    assert first.fingerprint == second.fingerprint
    assert first.pooler is None
    bank = Bank(second)
    bank.add("a", random_adapter(first, LoRA(), 1))
    assert bank.predict([("a", "good film")])[0].label is not None
    with pytest.raises(ConfigError, match="has no pretrained pooler"):
        Head(kind="classification", num_outputs=2, pooling="pooler").check(first)


def test_minilm_needs_no_network(minilm):
    assert minilm.describe() | {"fingerprint": ""} == {
        "name": "minilm",
        "architecture": "bert",
        "hidden_size": 384,
        "num_layers": 6,
        "vocab_size": 30522,
        "fingerprint": "",
    }
    bank = Bank(minilm)
    one, two, three = (
        p.embedding for p in bank.predict([(None, "a cat sat"), (None, "the kitten sits"), (None, "stock prices fell")])
    )
    similar = torch.nn.functional.cosine_similarity
    assert similar(one, two, dim=0) > similar(one, three, dim=0) + 0.2


# ---- one model, one backbone


def test_two_backbones_on_one_model_are_refused(make_model):
    model = make_model("bert")
    first = Backbone(model)
    count = hooks_on(model)
    with pytest.raises(BackboneError, match="already belongs to another Backbone; use that one, or detach"):
        Backbone(model)
    assert hooks_on(model) == count
    first.detach()
    assert hooks_on(model) == 0
    second = Backbone(model)
    with pytest.raises(BackboneError, match="already belongs to another Backbone"):
        first.attach()
    second.detach()
    first.attach()
    assert hooks_on(model) == count


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_an_attention_that_cannot_carry_a_memory_is_refused_and_left_alone(make_model, implementation):
    model = make_model("bert")
    model.config._attn_implementation = implementation
    with pytest.raises(BackboneError, match=f"'{implementation}' cannot carry .*='sdpa' or 'eager'"):
        Backbone(model)
    assert hooks_on(model) == 0
    assert model.config._attn_implementation == implementation
    model.config._attn_implementation = "sdpa"
    assert Backbone(model).attached


def test_a_clone_is_independent(backbone, delta_set, random_rows, close):
    rows = random_rows(backbone, [5, 3])
    ids, mask = rows.padded()
    mix = Plan([delta_set(backbone, LoRA(), 1, True), delta_set(backbone, PTuningV2(length=3), 2, True)])

    def run(b):
        with torch.no_grad():
            return b.run(mix, ids, mask)

    before, keys = run(backbone), list(backbone.model.state_dict())
    clone = backbone.clone()
    assert clone.model is not backbone.model
    own = {p.data_ptr() for p in backbone.model.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in clone.model.parameters())
    assert list(clone.model.state_dict()) == keys
    assert clone.fingerprint == backbone.fingerprint
    assert hooks_on(clone.model) == hooks_on(backbone.model)
    assert torch.equal(run(clone), before)
    with torch.no_grad():
        for parameter in clone.model.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(run(clone), before)
    assert torch.equal(run(backbone), before)
    clone.detach()
    assert hooks_on(clone.model) == 0
    assert not any("forward" in m.__dict__ for m in clone.model.modules())
    with torch.no_grad():
        clone.running(input_ids=ids, attention_mask=mask)  # a plain model again
    assert torch.equal(run(backbone), before)
    assert backbone.attached


def test_a_clone_keeps_the_users_own_hooks(make_backbone):
    backbone = make_backbone()
    calls = []
    backbone.model.pooler.register_forward_hook(lambda *_: calls.append(1))
    clone = backbone.clone()
    clone.run(Plan([None]), torch.tensor([[5, 6]]))
    assert calls == [1]


def test_with_weights_changes_a_copy(bert):
    name = "encoder.layer.0.output.dense.bias"
    before = bert.model.state_dict()[name].clone()
    changed = bert.with_weights({name: before + 1})
    assert torch.equal(changed.model.state_dict()[name], before + 1)
    assert torch.equal(bert.model.state_dict()[name], before)
    assert changed.fingerprint != bert.fingerprint
    with pytest.raises(BackboneError, match=r"changes weight 'nothing', which bert does not have"):
        bert.with_weights({"nothing": before})


# ---- the fingerprint


def test_the_fingerprint_is_of_the_weights(make_model, make_backbone):
    model = make_model("bert")
    fingerprint = Backbone(copy.deepcopy(model), name="another name").fingerprint
    assert make_backbone("bert").fingerprint == fingerprint
    assert Backbone(copy.deepcopy(model).bfloat16()).fingerprint == fingerprint
    assert Backbone(copy.deepcopy(model).double()).fingerprint == fingerprint
    others = {Backbone(make_model("bert", seed=1)).fingerprint, Backbone(make_model("bert/eager")).fingerprint}
    with torch.no_grad():
        for name in ("embeddings.word_embeddings.weight", "encoder.layer.2.output.LayerNorm.bias"):
            changed = copy.deepcopy(model)
            changed.get_parameter(name).view(-1)[0] += 0.5
            others.add(Backbone(changed).fingerprint)
    assert len(others) == 4 and fingerprint not in others


# ---- prompts: places, positions, masks


def embeds_of(plain, ids, vectors, at):
    """`inputs_embeds [n + P, E]` of one row, built by hand: vectors in front of word `at` (-1: behind the last)."""
    words = plain.get_input_embeddings()(ids)
    place = len(ids) if at < 0 else min(at, len(ids))
    places = [i if i < place else i + len(vectors) for i in range(len(ids))]
    return torch.cat([words[:place], vectors, words[place:]]), places


def by_hand(backbone, plain, embeds, lead=0):
    """The plain model's hidden states for one row's `inputs_embeds`, standing `lead` columns from the left."""
    if "position_ids" not in inspect.signature(plain.forward).parameters:  # it counts columns
        embeds = torch.cat([torch.zeros(lead, embeds.shape[1]), embeds])
        mask = (torch.arange(len(embeds)) >= lead).long()
        with torch.no_grad():
            return plain(inputs_embeds=embeds[None], attention_mask=mask[None]).last_hidden_state[0, lead:]
    # models that count positions from the padding id skip padding
    offset = backbone._position_offset or (0 if backbone.architecture.own_positions else lead)
    positions = torch.arange(len(embeds)) + offset
    with torch.no_grad():
        return plain(inputs_embeds=embeds[None], position_ids=positions[None]).last_hidden_state[0]


PLACES = [(1, 0), (3, 0), (2, 1), (4, 3), (3, 8), (2, -1), (5, 99)]  # (vectors, in front of which word)


@pytest.fixture
def prompted(backbone, make_model, request, random_params, random_rows):
    """The backbone, the plain model, rows of random ids, and per row its vectors and their place (or none)."""
    plain = make_model(request.node.callspec.params["backbone"]).get_submodule(backbone.architecture.runs)
    plain.eval()
    lengths = [5, 3, 7, 6, 9, 4, 2, 8]
    rows = random_rows(backbone, lengths)
    sets, made = [], []
    for seed, (length, at) in enumerate(PLACES):
        method = PromptTuning(length=length, position=at)
        params = random_params(backbone, method, seed, std=1.0)
        sets.append(DeltaSet(method.deltas(params, backbone)))
        made.append((params["vectors"], at))
    return backbone, plain, rows, [*sets, None], [*made, (torch.zeros(0, backbone.word_embeddings.shape[1]), 0)]


def test_prompts_at_any_place_equal_a_hand_built_row(prompted, close):
    backbone, plain, rows, sets, made = prompted
    with torch.no_grad():
        hidden = backbone.run(Plan(sets), *rows.padded())
    assert hidden.shape == (len(rows), 9, 32)
    for i, (vectors, at) in enumerate(made):
        embeds, places = embeds_of(plain, rows.rows[i], vectors, at)
        expected = by_hand(backbone, plain, embeds)[places]
        close(hidden[i, : len(places)], expected)


def test_prompts_with_padding_on_the_left(prompted, close):
    backbone, plain, rows, sets, made = prompted
    width = max(len(r) for r in rows.rows)
    ids = torch.stack([torch.cat([torch.full((width - len(r),), rows.pad_id), r]) for r in rows.rows])
    mask = torch.stack([(torch.arange(width) >= width - len(r)).long() for r in rows.rows])
    with torch.no_grad():
        hidden = backbone.run(Plan(sets), ids, mask)
    for i, (vectors, at) in enumerate(made):
        lead = width - len(rows.rows[i])
        embeds, places = embeds_of(plain, rows.rows[i], vectors, at)
        expected = by_hand(backbone, plain, embeds, lead=lead)[places]
        close(hidden[i, lead:], expected)


def test_pooling_reads_the_rows_own_tokens(prompted, tasks, random_adapter, close):
    """`cls` is the row's own first token even where a prompt stands in front; `mean` leaves the prompt out."""
    backbone, plain, _, _, made = prompted
    bank = Bank(backbone)
    text = "good film"
    ids = torch.tensor(backbone.tokenizer(text)["input_ids"])
    for pooling in ("cls", "mean"):
        for i, (vectors, at) in enumerate(made[:-1]):
            method = PromptTuning(length=len(vectors), position=at)
            adapter = random_adapter(backbone, method, i, pooling=pooling)
            bank.add(f"{pooling}{i}", adapter)
            (got,) = bank.predict([(f"{pooling}{i}", text)])
            embeds, places = embeds_of(plain, ids, adapter.params["vectors"], at)
            own = by_hand(backbone, plain, embeds)[places]
            pooled = own[0] if pooling == "cls" else own.mean(0)
            close(got.logits, adapter.head_params["weight"] @ pooled + adapter.head_params["bias"])


def test_token_types_and_token_biases_skip_the_prompt(bert, make_model, random_params, close):
    """Inserted vectors have token type 0 and no token bias, whatever id stands in for them."""
    plain = make_model("bert")
    plain.eval()
    prompt, aot = PromptTuning(length=3, position=2), AoTFC(r=2)
    prompt_params, aot_params = random_params(bert, prompt, 1), random_params(bert, aot, 2)
    together = DeltaSet(prompt.deltas(prompt_params, bert) | aot.deltas(aot_params, bert))
    ids, types = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    (source,) = aot.deltas(aot_params, bert)["layers"]
    biases = source.source.rows(ids[0]).detach()  # [5, L, D]
    places = [0, 1, 5, 6, 7]
    added = torch.zeros(8, bert.num_layers, 32)
    added[places] = biases
    handles = [
        layer.register_forward_pre_hook(lambda m, args, i=i: (args[0] + added[None, :, i], *args[1:]))
        for i, layer in enumerate(plain.encoder.layer)
    ]
    embeds, where = embeds_of(plain, ids[0], prompt_params["vectors"], 2)
    assert where == places
    with torch.no_grad():
        expected = plain(inputs_embeds=embeds[None], token_type_ids=torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]]))
        for plan in (Plan([together]), Plan([together, None])):
            hidden = bert.run(plan, ids.expand(plan.num_rows, -1), None, types.expand(plan.num_rows, -1))
            close(hidden[0], expected.last_hidden_state[0, places])
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "name", ["bert", "deberta-v2/v3", "deberta", "deberta/talking", "mpnet", "albert", "t5", "t5/eager"]
)
def test_a_memory_that_is_never_open_changes_nothing(name, make_backbone, random_params, random_rows, close):
    """Keys and values in front, but no positions: what they do is up to attention alone."""
    backbone = make_backbone(name)
    method = PTuningV2(length=4)
    made = method.deltas(random_params(backbone, method, 1, std=3.0), backbone)
    never = DeltaSet({s: [type(d)(keys=d.keys, values=d.values, open=d.open * 0) for d in ds]
                      for s, ds in made.items()})  # fmt: skip
    rows = random_rows(backbone, [6, 4])
    real = rows.padded()[1].bool()
    with torch.no_grad():
        bare = backbone.run(Plan([None, None]), *rows.padded())
        for sets in ([never, never], [never, None]):
            close(backbone.run(Plan(sets), *rows.padded())[real], bare[real])


# ---- lengths


def test_a_row_that_is_too_long_is_named(backbone, delta_set, random_rows):
    prompts = {n: delta_set(backbone, PromptTuning(length=n), 1) for n in (4, 8)}
    limit = backbone.max_length
    assert limit == 40

    def run(sets, lengths):
        with torch.no_grad():
            return backbone.run(Plan(sets), *random_rows(backbone, lengths).padded())

    assert run([prompts[8], prompts[4], None], [32, 36, 40]).shape == (3, 40, 32)
    for sets, lengths, words in (
        ([None, None, None], [3, 41, 5], "row 1: 41 positions, 0 of them its prompt, .* to 40 tokens"),
        ([None], [41], "row 0: 41 positions, 0 of them its prompt"),
        ([prompts[8], prompts[4]], [3, 38], "row 1: 42 positions, 4 of them its prompt, .* has 40; .* to 36 tokens"),
        ([None, prompts[8], prompts[4]], [40, 33, 36], "row 1: 41 positions, 8 of them its prompt, .* to 32 tokens"),
        ([prompts[4], prompts[4]], [37, 37], "row 0: 41 positions, 4 of them its prompt"),
    ):
        with pytest.raises(PlanError, match=f"^{words}"):
            run(sets, lengths)


# ---- what stands beside the ids


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(attention_mask=torch.ones(2, 3)), r"attention_mask has shape \(2, 3\), but input_ids has shape \(2, 4\)"),
        (dict(attention_mask=torch.ones(3, 4)), r"attention_mask has shape \(3, 4\)"),
        (dict(attention_mask=torch.ones(2, 1, 1, 4)), r"attention_mask has shape \(2, 1, 1, 4\)"),
        (dict(token_type_ids=torch.zeros(1, 4).long()), r"token_type_ids has shape \(1, 4\)"),
        (
            dict(token_type_ids=torch.tensor([[0, 1, 1, 1], [0, 1, 2, 0]])),
            r"row 1: token type 2 at position 2 is outside 0\.\.1, which are those of backbone 'bert'",
        ),
        (dict(token_type_ids=torch.tensor([[0, -1, 1, 1], [0, 0, 0, 0]])), "row 0: token type -1 at position 1"),
        (dict(slots=torch.zeros(3, 1).long()), r"slots has shape \(3, 1\), but there are 2 rows"),
    ],
)
@pytest.mark.parametrize("way", ["run", "in pieces", "run_below", "run_above", "run_joint"])
def test_what_does_not_go_with_the_ids_is_refused(bert, delta_set, monkeypatch, given, words, way):
    ids = torch.full((2, 4), 7)
    sets = [delta_set(bert, PromptTuning(length=2), 1) if way == "in pieces" else None, None]
    if way == "in pieces":
        monkeypatch.setattr(plan_module, "SPLIT_POSITIONS", 0)
    plan, batch = Plan(sets), Batch(input_ids=ids, **given)
    assert bool(plan.parts) == (way == "in pieces")
    calls = {
        "run_below": lambda: bert.run_below(plan, 1, batch),
        "run_above": lambda: bert.run_above(plan, 1, torch.zeros(2, 4, bert.hidden_size), batch),
        "run_joint": lambda: bert.run_joint([JointBatch(plan=plan, input_ids=ids, **given)]),
    }
    with pytest.raises(PlanError, match=words):
        calls.get(way, lambda: bert.run(plan, ids, **given))()


def test_a_mask_of_another_shape_is_refused_where_text_is_written(make_backbone):
    ids = torch.full((2, 4), 7)
    with pytest.raises(PlanError, match=r"attention_mask has shape \(2, 5\), but input_ids has shape \(2, 4\)"):
        make_backbone("gpt2").generate(Plan([None, None]), ids, torch.ones(2, 5))


def test_models_without_token_types_ignore_them(make_backbone):
    backbone, ids = make_backbone("distilbert"), torch.full((1, 4), 7)
    expected = backbone.run(Plan([None]), ids)
    assert torch.equal(backbone.run(Plan([None]), ids, token_type_ids=torch.full_like(ids, 9)), expected)
