"""PEFT checkpoints, taken over and written: what PEFT made gives the same outputs here, and the other way round."""

import copy
import dataclasses
import importlib.util
import json
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import multitune as mt
from multitune.convert.heads import SEQUENCE, TOKEN, model_with_head
from multitune.convert.peft.files import CONFIG_FILE, TENSOR_FILE

peft = pytest.importorskip("peft", reason="PEFT is not installed; pip install 'multitune[parity]'")

RELATIVE = 1e-5
BERTS = ["bert", "roberta", "electra", "distilbert", "deberta-v2/v3"]
#: Further families whose classifiers are taken over, with what PEFT has to keep beside the adapter.
CLASSIFIERS = {"albert": [], "mpnet": [], "deberta": ["pooler"], "modernbert": ["head"]}
LENGTHS = [6, 4, 9]

#: Modules that PEFT keeps beside the adapter so that the head can be loaded again.
HEADS = {"distilbert": ["pre_classifier"], "deberta-v2/v3": ["pooler"]}


def configs(backbone, task):
    """Name -> PEFT's configuration for each family, on the modules of a backbone."""

    def modules(*roles):
        return [s.module for s in backbone.find_sites("linear", roles)]

    def norms():
        return [s.module for s in backbone.sites if s.kind == "norm"]

    common = {"task_type": task, "modules_to_save": list(HEADS.get(backbone.name, []))}
    # PEFT appends to the list it is given
    return {
        "lora": peft.LoraConfig(r=3, lora_alpha=7, target_modules=modules("query", "value"), **common),
        "rslora": peft.LoraConfig(
            r=4, lora_alpha=6, use_rslora=True, target_modules=modules("key", "ffn_in", "ffn_out"), **common
        ),
        "dora": peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=modules("value", "ffn_out"), **common),
        "vera": peft.VeraConfig(
            r=6, projection_prng_key=3, target_modules=modules("query", "ffn_in"), vera_dropout=0.1, **common
        ),
        "ia3": peft.IA3Config(
            target_modules=modules("key", "value", "ffn_out"), feedforward_modules=modules("ffn_out"), **common
        ),
        "layernorm": peft.LNTuningConfig(target_modules=norms(), **common),
    }


def trained(base, config, seed=0):
    """A PEFT model of `base` with every trained tensor moved away from its start."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def plain(backbone, task=None, num_outputs=3):
    """A model for PEFT to wrap: without instruments, with the backbone's weights."""
    if task in (SEQUENCE, TOKEN):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return model_with_head(backbone, task, num_outputs)
    copied = backbone.clone()
    copied.detach()
    return copied.model


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def equal(found, expected):
    assert torch.isfinite(found).all() and found.shape == expected.shape
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


def logits_here(backbone, adapter, ids, mask):
    """By the bank's own path, in a batch with rows of the bare backbone."""
    deltas = adapter.delta_set(backbone)
    with torch.no_grad():
        hidden = backbone.run(mt.Plan([deltas, None, deltas]), ids, mask)
        heads = [(adapter.head, adapter.head_params), None, (adapter.head, adapter.head_params)]
        return mt.heads.mixed_logits(backbone, heads, hidden, mask)


@pytest.fixture(scope="module", params=BERTS)
def base(request, make_backbone, random_rows):
    backbone = make_backbone(request.param)
    return backbone, *random_rows(backbone, LENGTHS).padded()


@pytest.mark.parametrize(
    ("family", "task"),
    [*((f, SEQUENCE) for f in ("lora", "rslora", "dora", "vera", "ia3", "layernorm")), ("lora", TOKEN)],
)
def test_a_classifier_gives_the_same_logits_here_and_back_in_peft(base, family, task, tmp_path):
    backbone, ids, mask = base
    model = trained(plain(backbone, task), configs(backbone, task)[family])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    folder = save(model, tmp_path / "theirs")

    done = mt.import_adapter(folder, backbone, tmp_path / "ours", labels=("a", "b", "c"))
    assert done.check.outputs == "logits" and done.check.by.startswith("PEFT") and done.head == "checkpoint"
    assert done.check.max_difference <= RELATIVE * done.check.max_magnitude
    adapter = mt.Adapter.load(tmp_path / "ours", backbone)
    found = logits_here(backbone, adapter, ids, mask)
    for i in (0, 2):
        end = LENGTHS[i] if task == TOKEN else 3
        equal(found[i][:end], expected[i][:end])
    assert found[1] is None

    back = mt.export_adapter(adapter, backbone, tmp_path / "back")
    assert (back.task, back.head) == (task, "checkpoint")
    first, second = load_file(folder / TENSOR_FILE), load_file(tmp_path / "back" / TENSOR_FILE)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-5, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(plain(backbone, task), str(tmp_path / "back")).eval()
    with torch.no_grad():
        equal(again(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", ["lora", "dora", "vera", "ia3", "layernorm", "prompt"])
def test_folding_into_plain_weights_agrees_with_peft(base, family, tmp_path, monkeypatch):
    """The check for machines without PEFT computes what PEFT computes, so it can stand in for it."""
    backbone = base[0]
    if family == "prompt":
        # What PEFT would look for in the configuration, where some models have none of it or another value.
        shape = {"token_dim": backbone.word_embeddings.shape[1], "num_attention_heads": 4, "num_layers": 2}
        config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, **shape)
        model = trained(plain(backbone), config)
    else:
        model = trained(plain(backbone, SEQUENCE), configs(backbone, SEQUENCE)[family])
    folder = save(model, tmp_path / "theirs")
    options = {"fresh_head": True, "labels": ("a", "b")} if family == "prompt" else {}
    with_peft = mt.import_adapter(folder, backbone, **options).check
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    without = mt.import_adapter(folder, backbone, **options).check
    assert "float64" in without.by and "PEFT" in with_peft.by
    assert without.max_difference <= RELATIVE * without.max_magnitude
    assert without.max_magnitude == pytest.approx(with_peft.max_magnitude, rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_is_taken_over_with_its_positions(make_backbone, random_rows, name, projection, tmp_path):
    backbone = make_backbone(name)
    ids, mask = random_rows(backbone, LENGTHS).padded()
    more = {"prefix_projection": True, "encoder_hidden_size": 8} if projection else {}
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=5, **more)
    model = trained(plain(backbone), config)
    folder = save(model, tmp_path / "theirs")
    done = mt.import_adapter(folder, backbone, fresh_head=True, labels=("a", "b"))
    assert done.head == "fresh" and done.check.outputs == "hidden states"
    assert done.check.max_difference <= RELATIVE * done.check.max_magnitude
    deltas = done.adapter.delta_set(backbone)
    with torch.no_grad():
        mixed = backbone.run(mt.Plan([deltas, None, deltas]), ids, mask)
        bare = backbone.run(mt.Plan([None] * 3), ids, mask)
        for i, n in enumerate(LENGTHS):
            theirs = model(input_ids=ids[i : i + 1, :n], attention_mask=mask[i : i + 1, :n]).last_hidden_state[0]
            equal(mixed[i, :n], bare[i, :n] if i == 1 else theirs)
    mt.export_adapter(done.adapter, backbone, tmp_path / "back")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(plain(backbone), str(tmp_path / "back")).eval()
    with torch.no_grad():
        for outputs in (model, again):
            found = outputs(input_ids=ids, attention_mask=mask).last_hidden_state
            equal(found[0, : LENGTHS[0]], mixed[0, : LENGTHS[0]])


def test_a_prefix_classifier_reads_the_pooler(make_backbone, tmp_path):
    backbone = make_backbone("bert")
    config = peft.PrefixTuningConfig(task_type=SEQUENCE, num_virtual_tokens=4)
    folder = save(trained(plain(backbone, SEQUENCE), config), tmp_path / "theirs")
    done = mt.import_adapter(folder, backbone)
    assert done.adapter.head.pooling == "pooler" and done.check.outputs == "logits"
    assert mt.export_adapter(done.adapter, backbone, tmp_path / "back").task == SEQUENCE


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_are_taken_over_and_the_head_behind_them_is_refused(make_backbone, config, tmp_path):
    backbone = make_backbone("roberta")
    kind = getattr(peft, config)
    folder = save(trained(plain(backbone), kind(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)), tmp_path / "a")
    done = mt.import_adapter(folder, backbone, fresh_head=True, labels=("a", "b"))
    assert done.adapter.method == mt.PromptTuning(length=3)
    assert done.check.max_difference <= RELATIVE * done.check.max_magnitude
    assert mt.export_adapter(done.adapter, backbone, tmp_path / "back").head == "beside"
    assert set(load_file(tmp_path / "back" / "head.safetensors")) == {"weight", "bias"}
    model = trained(plain(backbone, SEQUENCE), kind(task_type=SEQUENCE, num_virtual_tokens=3))
    folder = save(model, tmp_path / "b")
    with pytest.raises(mt.AdapterError, match="reads the first vector of the prompt"):
        mt.import_adapter(folder, backbone)
    assert mt.import_adapter(folder, backbone, fresh_head=True, labels=("a", "b")).head == "fresh"


def test_a_trained_pooler_becomes_the_heads_own_layer(make_backbone, tmp_path):
    backbone = make_backbone("bert")
    config = peft.LoraConfig(task_type=SEQUENCE, target_modules=["query"], r=2, modules_to_save=["pooler"])
    folder = save(trained(plain(backbone, SEQUENCE), config), tmp_path / "theirs")
    done = mt.import_adapter(folder, backbone, tmp_path / "ours")
    assert (done.adapter.head.pooling, done.adapter.head.dense) == ("cls", "tanh")
    mt.export_adapter(done.adapter, backbone, tmp_path / "back")
    assert json.loads((tmp_path / "back" / CONFIG_FILE).read_text())["modules_to_save"] == ["classifier", "pooler"]


def test_some_layers_only(make_backbone, tmp_path):
    backbone = make_backbone("bert")
    config = peft.LoraConfig(task_type=SEQUENCE, target_modules=["query"], r=2, layers_to_transform=[0, 2])
    folder = save(trained(plain(backbone, SEQUENCE), config), tmp_path / "theirs")
    done = mt.import_adapter(folder, backbone)
    assert done.adapter.method == mt.LoRA(r=2, alpha=8.0, targets=("query",), layers=(0, 2))
    mt.export_adapter(done.adapter, backbone, tmp_path / "back")
    assert load_file(folder / TENSOR_FILE).keys() == load_file(tmp_path / "back" / TENSOR_FILE).keys()


def test_a_uniform_pattern_is_taken_over_and_another_refused(make_backbone, tmp_path):
    backbone = make_backbone("bert")
    for name, rank, alpha, problem in [
        ("same", {"query": 4, "value": 4}, {"query": 3, "value": 3}, None),
        ("ranks", {"query": 4}, {}, r"rank_pattern=\{'query': 4\} gives modules different values \(2 at .*value, 4 at"),
        ("alphas", {}, {"value": 1}, r"alpha_pattern=\{'value': 1\} gives"),
    ]:
        config = peft.LoraConfig(
            task_type=SEQUENCE,
            r=2,
            lora_alpha=9,
            target_modules=["query", "value"],
            rank_pattern=rank,
            alpha_pattern=alpha,
        )
        folder = save(trained(plain(backbone, SEQUENCE), config), tmp_path / name)
        if problem is None:
            assert mt.import_adapter(folder, backbone).adapter.method == mt.LoRA(r=4, alpha=3.0)
        else:
            with pytest.raises(mt.AdapterError, match=problem):
                mt.import_adapter(folder, backbone)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(target_modules=["query", "pooler.dense"]), r"adapts the module 'pooler.dense', which is no site"),
        (dict(target_modules=["query"], bias="lora_only"), r"bias='lora_only' trained biases"),
        (dict(target_modules=["query"], init_lora_weights="pissa"), r"init_lora_weights='pissa' changed the base"),
        (dict(target_modules=r".*(0.attention.self.query|1.attention.self.key)"), r"not layer.0.key, whose role"),
        (dict(target_modules=["query"], lora_bias=True), r"lora_bias=True changes what the adapter computes"),
    ],
)
def test_what_our_lora_cannot_express_is_refused_by_name(make_backbone, settings, problem, tmp_path):
    backbone = make_backbone("bert")
    config = peft.LoraConfig(task_type=SEQUENCE, r=2, **settings)
    folder = save(trained(plain(backbone, SEQUENCE), config), tmp_path / "theirs")
    with pytest.raises(mt.AdapterError, match=problem):
        mt.import_adapter(folder, backbone, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.fixture
def lora_folder(make_backbone, tmp_path):
    backbone = make_backbone("distilbert")
    config = peft.LoraConfig(task_type=SEQUENCE, r=2, target_modules=["q_lin"], modules_to_save=["pre_classifier"])
    return backbone, save(trained(plain(backbone, SEQUENCE), config), tmp_path / "theirs")


def test_pickles_are_never_opened(lora_folder):
    backbone, folder = lora_folder
    tensors = load_file(folder / TENSOR_FILE)
    (folder / TENSOR_FILE).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(mt.AdapterError, match="is a pickle") as problem:
        mt.import_adapter(folder, backbone)
    _, code, _ = str(problem.value).split('"')  # the line that converts it does
    exec(code, {})
    assert mt.import_adapter(folder, backbone).check.max_difference < 1e-4


def test_damaged_and_foreign_checkpoints_are_named(lora_folder, tmp_path):
    backbone, folder = lora_folder
    tensors, config = load_file(folder / TENSOR_FILE), json.loads((folder / CONFIG_FILE).read_text())

    def refused(problem, tensors=tensors, config=config, **options):
        save_file(tensors, folder / TENSOR_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        with pytest.raises(mt.MultituneError, match=problem):
            mt.import_adapter(folder, backbone, **options)

    some = next(k for k in tensors if "lora_B" in k)
    refused("only one of the two factors", {k: t for k, t in tensors.items() if k != some})
    less = {k: t for k, t in tensors.items() if not k.endswith("pre_classifier.weight")}
    refused(r"lacks the head's 'pre_classifier.weight'.*modules_to_save=\['classifier', 'pre_classifier'\]", less)
    refused("neither an adapter's tensor nor", tensors | {"base_model.model.distilbert.x.weight": torch.zeros(1)})
    refused("'LOHA' cannot be imported", config=config | {"peft_type": "LOHA"})
    refused("task 'QUESTION_ANS' has a head", config=config | {"task_type": "QUESTION_ANS"})
    refused("3 outputs, but 2 labels", labels=("a", "b"))
    refused(r"no format 'pert' to import. Did you mean 'peft'", source="pert")
    refused("does not compute the same", tensors | {some: tensors[some] * torch.nan})
    (folder / TENSOR_FILE).write_bytes(b"no")
    with pytest.raises(mt.AdapterError, match="damaged"):
        mt.import_adapter(folder, backbone)
    with pytest.raises(mt.AdapterError, match="is not a PEFT checkpoint"):
        mt.import_adapter(tmp_path, backbone)


def test_the_wrong_backbone_does_not_pass_the_check(lora_folder, make_backbone):
    """The checkpoint does not say which weights it was trained on, but a backbone of another shape shows."""
    _, folder = lora_folder
    with pytest.raises(mt.AdapterError, match="which is no site of backbone"):
        mt.import_adapter(folder, make_backbone("bert"))


@pytest.mark.parametrize("name", ["bert", "albert", "llama", "gemma3_text"])
def test_updated_words_go_there_and_back(make_backbone, name, tmp_path, monkeypatch):
    """Beside linear maps, also where the model multiplies its words, and where PEFT saves the frozen table too."""
    backbone = make_backbone(name)
    roles = dict.fromkeys(s.module for s in backbone.find_sites("linear", ("query",)))
    words = backbone.architecture.embedding
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=3, lora_alpha=7, target_modules=[words, *roles])
    folder = save(trained(plain(backbone), config), tmp_path / "theirs")
    theirs = load_file(folder / TENSOR_FILE)
    assert any(".base_layer." in key for key in theirs) == (words == "embed_tokens")
    done = mt.import_adapter(folder, backbone)
    assert done.adapter.method == mt.LoRA(r=3, alpha=7.0, targets=("embedding", "query"))
    assert done.check.by.startswith("PEFT") and done.check.max_difference <= RELATIVE * done.check.max_magnitude
    back = mt.export_adapter(done.adapter, backbone, tmp_path / "back")
    assert back.check.max_difference <= RELATIVE * back.check.max_magnitude
    again = load_file(tmp_path / "back" / TENSOR_FILE)
    assert again.keys() == {key for key in theirs if ".base_layer." not in key}
    assert all(torch.equal(again[key], theirs[key]) for key in again)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    without = mt.import_adapter(tmp_path / "back", backbone).check
    assert "float64" in without.by and without.max_difference <= RELATIVE * without.max_magnitude


def test_of_tables_the_words_alone_are_taken_over(make_backbone, tmp_path):
    backbone = make_backbone("bert")

    def refused(problem, *targets, **settings):
        config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=list(targets), **settings)
        folder = save(trained(plain(backbone), config), tmp_path / str(len(list(tmp_path.iterdir()))))
        with pytest.raises(mt.AdapterError, match=problem):
            mt.import_adapter(folder, backbone)

    refused("adapts the table 'embeddings.position_embeddings'.*only the word embeddings", "position_embeddings")
    refused("use_dora=True on 'embeddings.word_embeddings'", "word_embeddings", use_dora=True)
    words = dict(task_type="FEATURE_EXTRACTION", r=2, target_modules=["word_embeddings"])
    config = peft.LoraConfig(lora_dropout=0.1, **words)  # PEFT drops nothing in front of an embedding
    folder = save(trained(plain(backbone), config), tmp_path / "alone")
    assert mt.import_adapter(folder, backbone).adapter.method == mt.LoRA(r=2, alpha=8.0, targets=("embedding",))
    tensors = load_file(folder / TENSOR_FILE)
    frozen = backbone.word_embeddings.detach() + 0.1
    tensors["base_model.model.embeddings.word_embeddings.base_layer.weight"] = frozen
    save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(mt.AdapterError, match="is not the backbone's word embeddings .*resized or trained"):
        mt.import_adapter(folder, backbone)


def test_a_p_tuning_that_ended_as_a_prompt_is_exported_as_one(bert, random_adapter, tmp_path):
    adapter = random_adapter(bert, mt.PTuningV1(pattern="{p*3} {text}"), 1)
    done = mt.export_adapter(adapter, bert, tmp_path / "out")
    assert done.check.by.startswith("PEFT") and done.check.max_difference <= RELATIVE * done.check.max_magnitude
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["peft_type"] == "PROMPT_TUNING"
    settings = dict(reparametrise=False)
    for method in (
        mt.PTuningV1(pattern="{p*2} good {text}", **settings),
        mt.PTuningV1(pattern="{p} {text} {p}", **settings),
        mt.PTuningV1(pattern="{p} {text}", position=1, **settings),
        mt.PTuningV1(pattern="{p} {text}", slots=("{p}",), **settings),
    ):
        with pytest.raises(mt.AdapterError, match="PEFT's stand in front of the whole text"):
            mt.export_adapter(random_adapter(bert, method, 1), bert, tmp_path / "no")


def test_methods_without_a_counterpart_are_not_exported(bert, random_adapter, tmp_path):
    for method, problem in [
        (mt.AoTFC(r=2), "has no counterpart in PEFT.*can be exported: .*ia3.*lora"),
        (mt.PromptTuning(length=2, position=1), "vectors stand at position=1"),
        (mt.PTuningV2(length=2), "trained with shift_positions=false"),
    ]:
        with pytest.raises(mt.AdapterError, match=problem):
            mt.export_adapter(random_adapter(bert, method, 1), bert, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_head_that_transformers_lacks_is_written_beside(bert, random_adapter, tmp_path):
    done = mt.export_adapter(random_adapter(bert, mt.LoRA(r=2), 1, pooling="mean"), bert, tmp_path / "out")
    assert (done.task, done.head, done.check.outputs) == ("FEATURE_EXTRACTION", "beside", "hidden states")
    with pytest.raises(mt.ConfigError, match="overwrite=True"):
        mt.export_adapter(random_adapter(bert, mt.LoRA(r=2), 1), bert, tmp_path / "out")
    mt.export_adapter(random_adapter(bert, mt.LoRA(r=2), 1), bert, tmp_path / "out", overwrite=True)


def test_a_model_without_a_head_is_taken_over_by_class_and_by_task(make_backbone, tmp_path):
    backbone = make_backbone("electra")
    for i, task in enumerate((None, "FEATURE_EXTRACTION")):
        config = peft.LoraConfig(task_type=task, r=2, target_modules=["query"])
        folder = save(trained(plain(backbone), config), tmp_path / str(i))
        with pytest.raises(mt.AdapterError, match="holds no head that could answer with labels"):
            mt.import_adapter(folder, backbone, labels=("a", "b"))
        done = mt.import_adapter(folder, backbone, fresh_head=True, labels=("a", "b"))
        assert done.check.outputs == "hidden states"
        assert done.adapter.method == mt.LoRA(r=2, alpha=8.0, targets=("query",))


# ---- decoders


def random_config(kind, backbone, task, **more):
    roles = ("query", "value") if kind == "LoraConfig" else ("key", "value", "ffn_out")
    modules = sorted({s.module for s in backbone.find_sites("linear", roles)})
    if kind == "IA3Config":
        more |= {"feedforward_modules": [s.module for s in backbone.find_sites("linear", ("ffn_out",))]}
    return getattr(peft, kind)(task_type=task, target_modules=modules, **more)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "LoraConfig") for n in ("gpt2", "opt", "llama", "qwen3")] + [("llama", "IA3Config"), ("qwen2", "IA3Config")],
)
def test_a_decoder_classifier_there_and_back(make_backbone, name, kind, tmp_path):
    """Also where query, key and value are one projection (GPT-2): one first factor, the second cut in three."""
    backbone = make_backbone(name)
    model = trained(plain(backbone, SEQUENCE), random_config(kind, backbone, SEQUENCE))
    folder = save(model, tmp_path / "theirs")
    done = mt.import_adapter(folder, backbone, tmp_path / "ours")
    assert done.adapter.head.pooling == "last" and done.check.outputs == "logits"
    assert done.check.max_difference <= RELATIVE * done.check.max_magnitude
    if name == "gpt2":
        assert done.adapter.method.targets == ("query", "key", "value")
    back = mt.export_adapter(mt.Adapter.load(tmp_path / "ours", backbone), backbone, tmp_path / "back")
    assert back.task == SEQUENCE and back.check.max_difference <= RELATIVE * back.check.max_magnitude
    first, second = load_file(folder / TENSOR_FILE), load_file(tmp_path / "back" / TENSOR_FILE)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(second[key], first[key])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["LoraConfig", "PrefixTuningConfig", "PromptTuningConfig"])
def test_an_adapter_of_a_language_model_is_taken_over_without_its_head(make_backbone, name, kind, tmp_path):
    backbone = make_backbone(name)
    config = copy.deepcopy(backbone.model.config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    copied = backbone.clone()
    copied.detach()
    base.base_model.load_state_dict(copied.model.state_dict())
    task = "CAUSAL_LM"
    if kind == "LoraConfig":
        settings = random_config(kind, backbone, task)
    else:
        settings = getattr(peft, kind)(task_type=task, num_virtual_tokens=3)
    folder = save(trained(base, settings), tmp_path / "theirs")
    done = mt.import_adapter(folder, backbone)
    assert (done.head, done.adapter.task.kind, done.check.outputs) == ("none", "embedding", "hidden states")
    assert done.check.max_difference <= RELATIVE * done.check.max_magnitude


def test_a_fused_projection_is_exported_whole_or_not_at_all(make_backbone, random_adapter, tmp_path):
    backbone = make_backbone("gpt2")
    for targets, problem in [
        (("query",), "none for layer.0.key"),
        (("query", "key", "value"), "a first factor for each"),
    ]:
        adapter = random_adapter(backbone, mt.LoRA(r=2, targets=targets), 1, pooling="last")
        with pytest.raises(mt.AdapterError, match=problem):
            mt.export_adapter(adapter, backbone, tmp_path / "out")
    model = trained(
        plain(backbone, SEQUENCE), peft.IA3Config(task_type=SEQUENCE, target_modules=["c_attn"], feedforward_modules=[])
    )
    folder = save(model, tmp_path / "theirs")
    with pytest.raises(mt.AdapterError, match="computes query, key, value at once; of such modules only LoRA"):
        mt.import_adapter(folder, backbone)


# ---- what trains otherwise and is served as LoRA


@pytest.mark.parametrize("without_peft", [False, True])
def test_adalora_with_a_rank_of_its_own_for_every_module(make_backbone, tmp_path, monkeypatch, without_peft):
    backbone = make_backbone("bert")
    config = peft.AdaLoraConfig(
        task_type=SEQUENCE, init_r=5, target_r=2, lora_alpha=6, total_step=10, tinit=1, tfinal=1, target_modules=["key"]
    )
    model = trained(plain(backbone, SEQUENCE), config)
    kept = {0: [True, False, True, True, False], 1: [False] * 4 + [True], 2: [False, True, True, False, False]}
    name = "bert.encoder.layer.{}.attention.self.key.lora_E"
    for layer, places in kept.items():  # a finished run has zeros where it pruned
        with torch.no_grad():
            module = model.base_model.model.bert.encoder.layer[layer].attention.self.key
            module.lora_E["default"].mul_(torch.tensor(places)[:, None])
    model.peft_config["default"].rank_pattern = {name.format(i): places for i, places in kept.items()}
    folder = save(model, tmp_path / "theirs")
    if without_peft:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    done = mt.import_adapter(folder, backbone)
    assert done.adapter.method.ranks == (3, 1, 2) and ("PEFT" in done.check.by) != without_peft
    assert done.check.max_difference <= RELATIVE * done.check.max_magnitude
    back = mt.export_adapter(done.adapter, backbone, tmp_path / "back")
    assert json.loads((tmp_path / "back" / CONFIG_FILE).read_text())["peft_type"] == "LORA"
    assert back.check.max_difference <= RELATIVE * back.check.max_magnitude
    again = mt.import_adapter(tmp_path / "back", backbone)
    assert (again.adapter.method.r, again.adapter.method.targets) == (3, ("key",))
    assert again.adapter.method.scale == pytest.approx(6 / 5)


@pytest.mark.parametrize(
    "method", [mt.RsLoRA(r=3), mt.LoRAPlus(r=3), mt.PiSSA(r=2, alpha=3.0), mt.DoRA(r=2)], ids=lambda m: m.name
)
def test_the_lora_family_is_exported(bert, random_adapter, method, tmp_path):
    adapter = random_adapter(bert, method, 1, pooling="pooler")
    done = mt.export_adapter(adapter, bert, tmp_path / "out")
    assert done.task == SEQUENCE and done.check.max_difference <= RELATIVE * done.check.max_magnitude
    again = mt.import_adapter(tmp_path / "out", bert).adapter.method
    assert again.r == (4 if method.name == "pissa" else method.r)
    assert again.scale == pytest.approx(method.scale)


def test_vera_of_other_matrices_is_refused(make_backbone, tmp_path):
    backbone = make_backbone("bert")
    config = peft.VeraConfig(task_type=SEQUENCE, r=4, target_modules=["query"])
    folder = save(trained(plain(backbone, SEQUENCE), config), tmp_path / "theirs")
    tensors = load_file(folder / TENSOR_FILE)
    save_file(tensors | {"base_model.vera_A": tensors["base_model.vera_A"] + 1}, folder / TENSOR_FILE)
    with pytest.raises(mt.AdapterError, match="'vera_A'.* is not the random matrix"):
        mt.import_adapter(folder, backbone)


def test_an_update_of_the_words_alone_is_exported(bert, random_adapter, tmp_path):
    done = mt.export_adapter(random_adapter(bert, mt.RsLoRA(r=2, targets=("embedding",)), 1), bert, tmp_path / "out")
    assert done.check.by.startswith("PEFT") and done.check.max_difference <= RELATIVE * done.check.max_magnitude


# ---- further classifiers


@pytest.mark.parametrize(
    ("name", "task", "more"),
    [
        *((name, task, {}) for name in CLASSIFIERS for task in (SEQUENCE, TOKEN)),
        ("albert", SEQUENCE, {"keep": ["pooler"]}),
        ("deberta", SEQUENCE, {"pooler_hidden_act": "tanh"}),
        ("modernbert", SEQUENCE, {"classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True}),
        ("t5", TOKEN, {}),
        ("t5/gated", TOKEN, {}),
    ],
)
def test_further_classifiers_answer_the_same_here_and_back_in_peft(
    make_backbone, random_rows, name, task, more, tmp_path
):
    keep = more.pop("keep", CLASSIFIERS.get(name, [])) if task == SEQUENCE or name == "modernbert" else []
    backbone = make_backbone(name, **more)
    ids, mask = random_rows(backbone, LENGTHS).padded()
    targets = sorted({s.module for s in backbone.find_sites("linear", ("value", "ffn_out"))})
    config = peft.LoraConfig(task_type=task, r=2, target_modules=targets, modules_to_save=list(keep))
    model = trained(plain(backbone, task), config)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
    done = mt.import_adapter(save(model, tmp_path / "theirs"), backbone, tmp_path / "ours")
    assert (done.head, done.check.outputs) == ("checkpoint", "logits")
    adapter = mt.Adapter.load(tmp_path / "ours", backbone)
    found = logits_here(backbone, adapter, ids, mask)
    for i in (0, 2):
        end = LENGTHS[i] if task == TOKEN else 3
        equal(found[i][:end], expected[i][:end])
    back = mt.export_adapter(adapter, backbone, tmp_path / "back")
    assert (back.task, back.head) == (task, "checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(plain(backbone, task), str(tmp_path / "back")).eval()
    with torch.no_grad():
        again = again(input_ids=ids, attention_mask=mask).logits
    for i in (0, 2):
        equal(again[i][: LENGTHS[i]], expected[i][: LENGTHS[i]])


def test_what_a_classifier_needs_beside_the_adapter_is_said(make_backbone, tmp_path):
    for name, missing, modules in [
        ("modernbert", "head.dense.weight", r"\['classifier', 'head'\]"),
        ("deberta", "pooler.dense.weight", r"\['classifier', 'pooler'\]"),
    ]:
        backbone = make_backbone(name)
        config = peft.LoraConfig(task_type=SEQUENCE, r=2, target_modules=["ffn_out", "output.dense", "mlp.Wo"])
        folder = save(trained(plain(backbone, SEQUENCE), config), tmp_path / name)
        with pytest.raises(mt.AdapterError, match=rf"lacks the head's '{missing}'.*modules_to_save={modules}"):
            mt.import_adapter(folder, backbone)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_classifier_that_reads_the_decoder_is_refused_by_name(make_backbone, name, tmp_path):
    backbone = make_backbone(name)
    targets = sorted({s.module for s in backbone.find_sites("linear", ("value",))})
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForSequenceClassification.from_config(backbone.model.config)
    model = trained(base, peft.LoraConfig(task_type=SEQUENCE, r=2, target_modules=targets))
    folder = save(model, tmp_path / "theirs")
    with pytest.raises(
        mt.AdapterError, match=f"puts on '{name}' for SEQ_CLS reads the decoder, which does not run here"
    ):
        mt.import_adapter(folder, backbone)


def test_a_head_that_a_classifier_has_no_place_for_is_written_beside(make_backbone, random_adapter, tmp_path):
    """ModernBERT's classifier has a norm and no bias in its layer: ours only goes in where it computes the same."""
    backbone = make_backbone("modernbert")
    adapter = random_adapter(backbone, mt.LoRA(r=2, targets=("ffn_out",)), 1)
    width = backbone.hidden_size
    for eps, bias, where in [
        (1e-5, 0.0, "checkpoint"),
        (1e-5, 0.1, "beside"),
        (None, 0.0, "beside"),
        (1e-3, 0.0, "beside"),
    ]:
        head = mt.Head(kind="classification", num_outputs=3, dense="gelu", norm_eps=eps)
        dense = {"dense_weight": torch.eye(width), "dense_bias": torch.full((width,), bias)}
        changed = dataclasses.replace(adapter, head=head, head_params={**adapter.head_params, **dense})
        done = mt.export_adapter(changed, backbone, tmp_path / f"{eps}{bias}")
        assert done.head == where


def test_passes_of_one_module_are_exported_with_one_adapter_or_not_at_all(make_backbone, random_adapter, tmp_path):
    backbone = make_backbone("albert")
    for method in (mt.LoRA(r=2), mt.IA3(), mt.LayerNormTuning()):
        adapter = random_adapter(backbone, method, 1)
        with pytest.raises(mt.AdapterError, match=r"layer.0.\w+ and layer.2.\w+ are passes of one module"):
            mt.export_adapter(adapter, backbone, tmp_path / "apart")
        first = {s.module: s.name for s in reversed(backbone.sites)}
        tied = {}
        for site in method.sites(backbone):
            own = {k: t for k, t in adapter.params.items() if k.startswith(f"{first[site.module]}.")}
            tied |= {k.replace(first[site.module], site.name, 1): t for k, t in own.items()}
        done = mt.export_adapter(dataclasses.replace(adapter, params=tied), backbone, tmp_path / method.name)
        assert done.check.max_difference <= RELATIVE * done.check.max_magnitude
        again = mt.import_adapter(tmp_path / method.name, backbone).adapter
        assert again.params.keys() == tied.keys()
        for key, tensor in tied.items():
            torch.testing.assert_close(again.params[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["DoRA", "LoraConfig"])
def test_a_projection_whose_parts_take_turns_is_cut_and_put_together_again(make_backbone, kind, tmp_path):
    """The first DeBERTa keeps query, key and value head by head in one module."""
    backbone = make_backbone("deberta")
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["in_proj"], use_dora=kind == "DoRA")
    folder = save(trained(plain(backbone), config), tmp_path / "theirs")
    adapter = mt.import_adapter(folder, backbone).adapter
    assert adapter.method.targets == ("query", "key", "value")
    mt.export_adapter(adapter, backbone, tmp_path / "back")
    first, second = load_file(folder / TENSOR_FILE), load_file(tmp_path / "back" / TENSOR_FILE)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(second[key], first[key])
