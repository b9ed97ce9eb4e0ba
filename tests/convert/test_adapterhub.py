"""Checkpoints of AdapterHub's library, made by it in an environment of its own: taken over, they compute the same."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import multitune as mt
from multitune.cli import app
from multitune.convert.adapterhub import reference
from multitune.convert.adapterhub.check import _older, _write_job

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MULTITUNE_ADAPTERS_PYTHON", ROOT / ".venv-adapters/bin/python"))
needs_adapters = pytest.mark.skipif(
    not PYTHON.exists(), reason="no environment with the library adapters: make adapterhub-env"
)

RELATIVE = 1e-5
LENGTHS = [6, 4, 9]
NAMES = ["bad", "good", "mixed"]
PLAIN = {"type": "classification", "num_labels": 3, "layers": 2, "names": NAMES}
COMPACTER = {"reduction_factor": 4, "phm_rank": 2, "phm_init_range": 0.5}
PREFIX = {"prefix_length": 3, "bottleneck_size": 8}
ENCODERS = ["bert", "roberta", "electra", "distilbert", "deberta-v2/v3", "deberta"]
DECODERS = ["gpt2", "llama"]

#: name -> (the library's configuration classes with settings, backbones, what of our method to expect)
METHODS = {
    "seq_bn": (
        {"SeqBnConfig": {"reduction_factor": 8}},
        [*ENCODERS, "xlm-roberta", "albert"],
        ("pfeiffer", {"reads": "norm"}),
    ),
    "double_seq_bn": (
        {"DoubleSeqBnConfig": {"reduction_factor": 8, "scaling": 1.5}},
        [*ENCODERS, *DECODERS, "mistral"],
        ("houlsby", {"bottleneck": 4, "reads": "output", "activation": "silu"}),
    ),
    "par_bn": ({"ParBnConfig": {}}, [*ENCODERS, "albert"], ("parallel", {"scale": 4.0, "bottleneck": 16})),
    "scaled_par_bn": (
        {"ParBnConfig": {"scaling": "learned", "leave_out": [0]}},
        ["bert"],
        ("parallel", {"layers": (1, 2), "learn_scale": True}),
    ),
    "scaled_by_feature": ({"ParBnConfig": {"scaling": "channel"}}, ["bert"], ("parallel", {"learn_scale": False})),
    "both_in_parallel": (
        {"ParBnConfig": {"mh_adapter": True}},
        ["bert"],
        ("parallel", {"sublayers": ("attention", "ffn")}),
    ),
    "learned_seq_bn": ({"SeqBnConfig": {"scaling": "learned"}}, ["bert"], ("pfeiffer", {"layers": None})),
    "both_behind_norms": (
        {"SeqBnConfig": {"mh_adapter": True, "non_linearity": "gelu_new"}},
        ["bert", "distilbert"],
        ("houlsby", {"reads": "norm", "activation": "gelu_new"}),
    ),
    "compacter": ({"CompacterConfig": COMPACTER}, ["bert", "distilbert", "gpt2"], ("compacter", {"rank": 2})),
    "compacter_pp": (
        {"CompacterPlusPlusConfig": COMPACTER | {"factorized_phm_rule": True, "scaling": 2.0}},
        ["roberta"],
        ("compacter_pp", {"bottleneck": 8, "reads": "norm"}),
    ),
    "compacter_without_bias": ({"CompacterConfig": COMPACTER | {"phm_bias": False}}, ["bert"], ("compacter", {})),
    "lora": (
        {"LoRAConfig": {"r": 3, "alpha": 7, "attn_matrices": ["q", "k"], "intermediate_lora": True}},
        [*ENCODERS[:5], "llama", "mistral"],
        ("lora", {"r": 3, "alpha": 7.0}),
    ),
    "lora_everywhere": (
        {"LoRAConfig": {"r": 2, "attn_matrices": ["q", "v"], "intermediate_lora": True, "output_lora": True}},
        ["gpt2", "albert"],
        ("lora", {"r": 2, "alpha": 8.0, "targets": ("query", "value", "ffn_in", "ffn_out")}),
    ),
    "ia3": ({"IA3Config": {}}, [*ENCODERS[:5], *DECODERS, "albert"], ("ia3", {"inputs": ()})),
    "prefix": (
        {"PrefixTuningConfig": PREFIX},
        [name for name in ENCODERS if name != "distilbert"],
        ("ptuning_v2", {"length": 3}),
    ),
    "flat_prefix": (
        {"PrefixTuningConfig": PREFIX | {"flat": True, "leave_out": [1]}},
        ["bert"],
        ("ptuning_v2", {"layers": (0, 2), "shift_positions": False}),
    ),
    "mam": (
        {"PrefixTuningConfig": PREFIX, "ParBnConfig": {}},
        ["roberta"],
        ("ptuning_v2+parallel", {"ptuning_v2.length": 3, "parallel.scale": 4.0}),
    ),
}
#: name -> (settings of a head or a class of transformers', backbone, our head)
HEADS = {
    "one_layer": (PLAIN | {"layers": 1}, "bert", {"pooling": "cls", "dense": "none"}),
    "relu": (PLAIN | {"activation_function": "relu"}, "roberta", {"dense": "relu"}),
    "pooler": (PLAIN | {"use_pooler": True}, "bert", {"pooling": "pooler", "dense": "tanh"}),
    "last_token": (PLAIN, "gpt2", {"pooling": "last", "dense": "tanh"}),
    "one_output": (
        {"type": "classification", "num_labels": 1, "names": ["score"]},
        "bert",
        {"kind": "regression", "num_outputs": 1},
    ),
    "multilabel": (
        PLAIN | {"type": "classification", "multilabel": True},
        "bert",
        {"kind": "multilabel", "num_outputs": 3},
    ),
    "tagging": (PLAIN | {"type": "tagging", "layers": 1}, "electra", {"kind": "tagging"}),
    "of_transformers": ("BertForSequenceClassification", "bert", {"pooling": "pooler", "dense": "none"}),
    "of_transformers_with_a_layer": ("RobertaForSequenceClassification", "roberta", {"dense": "tanh"}),
    "of_transformers_for_tokens": ("BertForTokenClassification", "bert", {"kind": "tagging"}),
}


def file_name(backbone):
    return backbone.replace("/", "-")


def cases():
    for name, (config, backbones, _) in METHODS.items():
        for backbone in backbones:
            yield f"{name}.{file_name(backbone)}", config, backbone, PLAIN if backbone == backbones[0] else None
    for name, (head, backbone, _) in HEADS.items():
        yield f"head.{name}", {"LoRAConfig": {"r": 2}}, backbone, head


@pytest.fixture(scope="session")
def theirs(tmp_path_factory, make_backbone, random_rows):
    """A folder with every case as a checkpoint, and what it computes; one run of the library makes them all."""
    if not PYTHON.exists():
        pytest.skip("no environment with the library adapters: make adapterhub-env")
    root = tmp_path_factory.mktemp("adapterhub")
    described = []
    for case, config, name, head in cases():
        folder = root / "backbones" / file_name(name)
        backbone = ours(make_backbone, name)
        if not folder.exists():
            ids, mask = random_rows(backbone, LENGTHS).padded()
            bare = backbone.clone()
            bare.detach()
            bare.model.save_pretrained(folder)
            file = folder / "config.json"
            file.write_text(json.dumps(_older(json.loads(file.read_text()))))
            save_file({"input_ids": ids, "attention_mask": mask}, folder / "rows.safetensors")
        described.append(
            {"id": case, "config": config, "backbone": str(folder), "head": head, "pad_id": backbone.pad_id}
        )
    (root / "cases.json").write_text(json.dumps(described))
    run_there(Path(__file__).with_name("make_adapterhub.py"), str(root))
    return root


def run_there(script, *arguments):
    command = [str(PYTHON), "-I", str(script), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BACKBONES = {}


def ours(make_backbone, name):
    if name not in BACKBONES:
        wide = {"head_dim": 8} if name in ("llama", "mistral") else {}  # the library knows no heads of another width
        BACKBONES[name] = make_backbone(name, **wide)
    return BACKBONES[name]


def converted(folder, tmp_path):
    """A copy of a checkpoint whose pickles, if any, went through the line that the refusal gives."""
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    return copied


def take(make_backbone, theirs, case, name, tmp_path, **options):
    backbone, folder = ours(make_backbone, name), converted(theirs / case, tmp_path)
    for _ in range(2):
        try:
            return backbone, mt.import_adapter(folder, backbone, source="adapters", **options).adapter
        except mt.AdapterError as error:
            if "is a pickle" not in str(error):
                raise
            exec(str(error).split('"')[1], {})  # the line that converts it
    return backbone, mt.import_adapter(folder, backbone, source="adapters", **options).adapter


def equal(found, expected):
    assert torch.isfinite(found).all() and found.shape == expected.shape
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


def check_outputs(backbone, adapter, theirs, case):
    """In a batch with rows of the bare backbone, whose padding other rows' adapters do not reach."""
    rows = load_file(theirs / "backbones" / file_name(backbone.name) / "rows.safetensors")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    expected = load_file(theirs / f"{case}.safetensors")
    deltas = adapter.delta_set(backbone)
    head = (adapter.head, adapter.head_params)
    with torch.no_grad():
        bare = backbone.run(mt.Plan([None] * 3), ids, mask)
        for used in ((0, 1, 2), (0, 2)):
            hidden = backbone.run(mt.Plan([deltas if i in used else None for i in range(3)]), ids, mask)
            logits = mt.heads.mixed_logits(backbone, [head] * 3, hidden, mask)
            for i in used:
                assert (hidden[i] - bare[i])[: LENGTHS[i]].abs().max() > 1e-3
                if "hidden" in expected:
                    equal(hidden[i, : LENGTHS[i]], expected["hidden"][i, : LENGTHS[i]])
                elif adapter.head.kind == "tagging":
                    equal(logits[i][: LENGTHS[i]], expected["logits"][i, : LENGTHS[i]])
                else:
                    equal(logits[i], expected["logits"][i])


@needs_adapters
@pytest.mark.parametrize(("method", "name"), [(m, n) for m, (_, names, _) in METHODS.items() for n in names])
def test_a_checkpoint_computes_the_same_here(theirs, make_backbone, tmp_path, method, name):
    case = f"{method}.{file_name(name)}"
    backbone, adapter = take(make_backbone, theirs, case, name, tmp_path)
    expected, settings = METHODS[method][2]
    assert adapter.method.name == expected
    found = adapter.method.settings()
    assert {k: tuple(found[k]) if isinstance(found[k], list) else found[k] for k in settings} == settings
    check_outputs(backbone, adapter, theirs, case)
    again = mt.Adapter.load(adapter.save(tmp_path / "ours").path, backbone)
    check_outputs(backbone, again, theirs, case)


@needs_adapters
@pytest.mark.parametrize("head", HEADS)
def test_a_head_answers_the_same_here(theirs, make_backbone, tmp_path, head):
    name, expected = HEADS[head][1:]
    backbone, adapter = take(make_backbone, theirs, f"head.{head}", name, tmp_path)
    assert {k: getattr(adapter.head, k) for k in expected} == expected
    if isinstance(HEADS[head][0], dict) and adapter.head.kind != "regression":
        assert adapter.task.labels == tuple(HEADS[head][0]["names"])
    check_outputs(backbone, adapter, theirs, f"head.{head}")


@needs_adapters
def test_the_command_line_compares_by_the_librarys_own_python(theirs, make_backbone, tmp_path):
    backbone = ours(make_backbone, "bert").clone()
    backbone.detach()
    backbone.model.save_pretrained(tmp_path / "backbone")
    backbone.tokenizer.save_pretrained(tmp_path / "backbone")
    folder = theirs / "seq_bn.bert"
    args = ["import", folder, "--from", "adapters", "--backbone", tmp_path / "backbone", "--out", tmp_path / "ours"]
    done = CliRunner().invoke(app, [str(a) for a in (*args, "--check-with", PYTHON, "--json")])
    assert done.exit_code == 0, (done.stderr, done.exception)
    facts = json.loads(done.stdout)
    assert (facts["method"], facts["head"], facts["compared"]) == ("pfeiffer", "checkpoint", "logits")
    assert facts["with"] == "adapters 1.3.0" and facts["max_difference"] <= RELATIVE * facts["max_magnitude"]
    other = mt.import_adapter(folder, ours(make_backbone, "bert"), source="adapters")
    assert other.check is None and "give that environment's Python" in other.unchecked


# ---- what needs no library: checkpoints written by hand, in its format

ARCHITECTURES = {
    "bn": {"mh_adapter": False, "output_adapter": True, "reduction_factor": 8, "non_linearity": "relu"},
    "lora": {"architecture": "lora", "r": 2, "alpha": 4, "attn_matrices": ["q"]},
    "prefix": {"architecture": "prefix_tuning", "flat": True, "prefix_length": 3},
}


def tensors_of(kind, name="mood", layers=3, width=4):
    g = torch.Generator().manual_seed(0)
    found = {}
    for i in range(layers):
        at = f"bert.encoder.layer.{i}"
        if kind == "bn":
            found |= {
                f"{at}.output.adapters.{name}.adapter_down.0.weight": torch.randn(width, 32, generator=g),
                f"{at}.output.adapters.{name}.adapter_down.0.bias": torch.randn(width, generator=g),
                f"{at}.output.adapters.{name}.adapter_up.weight": torch.randn(32, width, generator=g),
                f"{at}.output.adapters.{name}.adapter_up.bias": torch.randn(32, generator=g),
            }
        elif kind == "lora":
            found[f"{at}.attention.self.query.loras.{name}.lora_A"] = torch.randn(2, 32, generator=g)
            found[f"{at}.attention.self.query.loras.{name}.lora_B"] = torch.randn(32, 2, generator=g)
        else:
            pool = f"{at}.attention.self.prefix_tuning.pool.prefix_tunings.{name}.self_prefix"
            found[f"{pool}.control_trans"] = torch.arange(3.0 * layers * 2 * 32)
    return found


def written(folder, kind, settings=None, tensors=None, version="adapters.1.3.0", head=None):
    folder.mkdir(exist_ok=True)
    config = {"config": ARCHITECTURES[kind] | (settings or {}), "name": "mood", "version": version}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors_of(kind) if tensors is None else tensors, folder / "adapter.safetensors")
    if head is not None:
        config, tensors = head
        (folder / "head_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model_head.safetensors")
    return folder


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        ("bn", {"use_gating": True}, "use_gating=True closes the adapter by a gate"),
        ("bn", {"ln_before": True}, "ln_before=True gives the adapter a layer norm of its own"),
        ("bn", {"ln_after": True}, "ln_after=True gives"),
        ("bn", {"inv_adapter": "nice"}, "inv_adapter='nice' puts an invertible adapter"),
        ("bn", {"original_ln_after": False}, "original_ln_after=False leaves out the norm"),
        ("bn", {"original_ln_before": True, "residual_before_ln": "post_add"}, "residual_before_ln='post_add' adds"),
        ("bn", {"original_ln_before": True, "residual_before_ln": False}, "residual_before_ln=False adds"),
        ("bn", {"non_linearity": "leakyrelu"}, "non_linearity='leakyrelu' is none of gelu, relu"),
        ("bn", {"cross_adapter": True}, "cross_adapter=True changes what the adapter computes in a way"),
        ("bn", {"phm_layer": True, "is_parallel": True}, "phm_layer=True is not there for parallel adapters"),
        ("bn", {"phm_layer": True, "shared_W_phm": True}, "shared_W_phm=True has the adapters of all layers share"),
        ("bn", {"phm_layer": True, "factorized_phm_W": False}, "factorized_phm_W=False is another form"),
        ("bn", {"phm_layer": True}, "holds an unknown tensor 'adapter_down.0.bias'|lacks tensor"),
        ("bn", {"scaling": "learned"}, "lacks tensor 'scaling'"),
        ("bn", {"architecture": "reft"}, "architecture 'reft' of adapters cannot be imported"),
        ("lora", {"use_gating": True}, "use_gating=True closes the update by a gate"),
        ("lora", {"use_dora": True}, "use_dora=True is another DoRA than the paper's"),
        ("lora", {"vera_d": 0.1}, "vera_d=0.1 is VeRA with random matrices"),
        ("lora", {"composition_mode": "scale"}, "holds the tensor 'lora_A'"),
        ("lora", {"future": True}, "future=True changes what"),
        ("prefix", {"use_gating": True}, "use_gating=True closes the prefix"),
        ("prefix", {"prefix_length": 4}, "holds 576 values where 768 are expected: 4 keys and values of width 32"),
        ("prefix", {"flat": False}, "the prefix lacks its tensor 'wte.weight'"),
    ],
)
def test_what_our_methods_cannot_express_is_refused_by_name(bert, tmp_path, kind, settings, problem):
    with pytest.raises(mt.AdapterError, match=problem):
        mt.import_adapter(written(tmp_path / "theirs", kind, settings), bert, tmp_path / "ours", source="adapters")
    assert not (tmp_path / "ours").exists()


def test_what_depends_on_the_model_is_refused_by_name(make_backbone, tmp_path):
    def refused(name, kind, problem, settings=None, tensors=None):
        folder = written(tmp_path / "theirs", kind, settings, tensors)
        with pytest.raises(mt.AdapterError, match=problem):
            mt.import_adapter(folder, make_backbone(name), source="adapters")

    own = tensors_of("bn")
    gpt2 = {
        k.replace("bert.encoder.layer.", "transformer.h.").replace("output.", "output_adapters."): t
        for k, t in own.items()
    }
    refused("gpt2", "bn", "is_parallel=True reads what is in front", {"is_parallel": True}, gpt2)
    refused("gpt2", "bn", "original_ln_before=True reads the sum", {"original_ln_before": True}, gpt2)
    refused("gpt2", "bn", "adapts 'bert.encoder.layer.0.output', which is no place of backbone 'gpt2'", None, own)
    group = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.attention_adapters"
    albert = {f"{group}.{k.partition('.output.')[2]}": t for k, t in own.items() if ".0.output." in k}
    refused(
        "albert", "bn", "mh_adapter=True has another meaning where layers share weights", {"mh_adapter": True}, albert
    )
    refused("distilbert", "prefix", "means different things in batches with and without padding on 'distilbert'")
    refused("modernbert", "lora", "cannot be imported for 'modernbert'.*They can for bert, ")
    fused = "deberta.encoder.layer.0.attention.self.in_proj.loras.mood.lora_"
    deberta = {f"{fused}A": torch.ones(2, 32), f"{fused}B": torch.ones(32, 2)}
    refused("deberta", "lora", r"attn_matrices=\['q'\] means thirds of a projection", None, deberta)
    narrow = {k: t for k, t in tensors_of("bn", width=3).items() if "layer.1" in k}
    refused("bert", "bn", r"gives layers different widths \(3 at layer.1.ffn_sublayer, 4 at", None, own | narrow)
    problem = "reduction_factor=1.6 gives a width of 20, which no whole factor does"
    refused("bert", "bn", problem, {"reduction_factor": 1.6}, tensors_of("bn", width=20))
    alone = {k.replace(".output.adapters", ".attention.output.adapters"): t for k, t in own.items()}
    refused("bert", "bn", "leaves attention alone with a serial adapter", {"output_adapter": False}, alone)
    more = own | {"bert.pooler.dense.weight": torch.ones(1)}
    refused("bert", "bn", "'bert.pooler.dense.weight' is no tensor of an adapter 'mood'", None, more)
    more = own | tensors_of("lora")
    refused("bert", "bn", "'encoder.layer.0.attention.self.query.loras.lora_A' is no tensor of its method", None, more)
    refused("bert", "bn", "holds no tensors of its bottleneck", None, {})
    less = {k: t for k, t in own.items() if not k.endswith("layer.2.output.adapters.mood.adapter_down.0.bias")}
    refused("bert", "bn", "the adapter at 'encoder.layer.2.output' lacks tensor 'adapter_down.0.bias'", None, less)


def test_pickles_and_foreign_files_are_named(bert, tmp_path):
    folder = written(tmp_path / "theirs", "bn")
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(mt.AdapterError, match=r"pytorch_adapter.bin is a pickle.*python -c"):
        mt.import_adapter(folder, bert, source="adapters")
    (folder / "pytorch_adapter.bin").unlink()
    with pytest.raises(mt.AdapterError, match="adapter.safetensors is missing"):
        mt.import_adapter(folder, bert, source="adapters")
    with pytest.raises(mt.AdapterError, match="`--from adapters` reads checkpoints of AdapterHub's library"):
        mt.import_adapter(folder, bert)
    for text, problem in [
        ('{"peft_type": "LORA"}', "is of PEFT.*`--from peft` reads it"),
        ('{"name": "mood"}', "is not of adapters: it lacks 'config'"),
        ('{"config": {}}', "is not of adapters: it lacks 'name'"),
        ("[]", "is damaged: it holds no settings"),
        ("{", "is damaged"),
    ]:
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(mt.AdapterError, match=problem):
            mt.import_adapter(folder, bert, source="adapters")
    with pytest.raises(mt.AdapterError, match="is no checkpoint of adapters: it has no adapter_config.json"):
        mt.import_adapter(tmp_path, bert, source="adapters")


def test_heads_that_ours_cannot_express_are_refused_by_name(bert, tmp_path):
    linear = {"heads.mood.1.weight": torch.ones(2, 32), "heads.mood.1.bias": torch.ones(2)}
    plain = {"head_type": "classification", "layers": 1, "num_labels": 2, "activation_function": None}

    def refused(problem, config=None, tensors=linear, error=mt.AdapterError, model_class="BertAdapterModel", **options):
        config = {"config": plain if config is None else config, "name": "mood", "model_class": model_class}
        folder = written(tmp_path / "theirs", "lora", head=(config, tensors))
        with pytest.raises(error, match=problem):
            mt.import_adapter(folder, bert, source="adapters", **options)
        return folder

    refused("a head for causal_lm is not supported here", plain | {"head_type": "causal_lm"})
    refused("a head of 3 layers with activation tanh", plain | {"layers": 3, "activation_function": "tanh"})
    refused("a head of 2 layers with activation swish", plain | {"layers": 2, "activation_function": "swish"})
    refused("the head lacks its bias", tensors={"heads.mood.1.weight": torch.ones(2, 32)})
    refused("holds 'heads.mood.7.weight'", tensors=linear | {"heads.mood.7.weight": torch.ones(1)})
    refused("is for classification or regression, not 'tagging'", error=mt.ConfigError, kind="tagging")
    folder = refused("2 outputs, but 3 labels", error=mt.ConfigError, labels=("a", "b", "c"))
    (folder / "head_config.json").write_text(json.dumps({"config": None, "model_class": "BertForQuestionAnswering"}))
    with pytest.raises(mt.AdapterError, match="the head of a BertForQuestionAnswering is not supported here"):
        mt.import_adapter(folder, bert, source="adapters")
    done = mt.import_adapter(folder, bert, source="adapters", fresh_head=True, labels=("a", "b"))
    assert done.head == "fresh" and done.adapter.task.labels == ("a", "b")


def test_a_scale_that_an_old_version_ignored_is_ignored(bert, tmp_path):
    """Until 1.1.0 the library scaled LoRA by one whatever alpha said, and its own later versions load it so."""
    for version, alpha in [("adapters.1.3.0", 4.0), ("adapters.1.1.0", 4.0), ("adapters.1.0.1", 2.0), ("3.2.1", 4.0)]:
        folder = written(tmp_path / version, "lora", version=version)
        assert mt.import_adapter(folder, bert, source="adapters").adapter.method.alpha == alpha


def test_without_a_head_an_adapter_embeds(bert, tmp_path):
    done = mt.import_adapter(written(tmp_path / "theirs", "prefix"), bert, tmp_path / "ours", source="adapters")
    assert (done.head, done.check, done.adapter.task.kind) == ("none", None, "embedding")
    assert "pip install adapters" in done.unchecked
    keys = done.adapter.params["layer.1.attention.keys"]
    assert keys[1].tolist() == [float(v) for v in range(192 + 64, 192 + 96)]  # position 1, layer 1, keys


def test_the_python_to_compare_with_is_tried_and_named(bert, tmp_path):
    folder = written(tmp_path / "theirs", "lora")
    for python, problem in [
        (tmp_path / "no-python", "cannot be run: .*No such file"),
        (
            Path(shutil.which("false") or "/bin/false"),
            "cannot run the checkpoint with the library adapters: it says nothing",
        ),
    ]:
        with pytest.raises(mt.ConfigError, match=problem):
            mt.import_adapter(folder, bert, tmp_path / "ours", source="adapters", check_with=python)
        assert not (tmp_path / "ours").exists()
    with pytest.raises(mt.ConfigError, match="check_with is for adapters"):
        mt.import_adapter(folder, bert, check_with=PYTHON)


# ---- and back

POST_NORM = ["bert", "roberta", "distilbert", "deberta", "albert"]
#: name -> (method, backbones, more of the adapter)
EXPORTS = {
    "houlsby": (mt.Houlsby(bottleneck=5, activation="silu"), ["bert", "distilbert", "gpt2", "llama"], {}),
    "houlsby_reading_norms": (mt.Houlsby(bottleneck=4, reads="norm", layers=(0, 2)), ["bert"], {"pooling": "pooler"}),
    "pfeiffer": (mt.Pfeiffer(reduction_factor=8, reads="norm"), POST_NORM, {}),
    "parallel": (mt.ParallelAdapter(bottleneck=6), POST_NORM, {}),
    "learned": (mt.ParallelAdapter(bottleneck=6, learn_scale=True, sublayers=("attention", "ffn")), ["electra"], {}),
    "compacter": (mt.Compacter(bottleneck=8, rank=2), ["bert"], {"kind": "tagging"}),
    "compacter_pp": (mt.CompacterPP(bottleneck=8, reads="norm"), ["roberta"], {"kind": "multilabel"}),
    "lora": (mt.LoRA(r=3, alpha=7, targets=("query", "value", "ffn_out")), ["bert", "gpt2", "llama", "albert"], {}),
    "rslora": (mt.RsLoRA(r=4, targets=("key", "ffn_in")), ["deberta-v2/v3"], {"kind": "regression"}),
    "ia3": (mt.IA3(outputs=("key", "value", "ffn_in"), inputs=()), ["bert", "llama"], {}),
    "prefix": (mt.PrefixTuning(length=3, hidden=8), ["bert"], {}),
    "ptuning_v2": (mt.PTuningV2(length=3, layers=(1,)), ["deberta-v2/v3"], {}),
}
EXPORTED = [(method, name) for method, (_, names, _) in EXPORTS.items() for name in names]


def tied(adapter, backbone):
    """The adapter with the tensors of the first pass in every pass of a shared module, as the library has them."""
    first = {(s.kind, s.module): s.name for s in reversed(backbone.sites)}
    names = {s.name: first[s.kind, s.module] for s in backbone.sites if s.shared}

    def source(key):
        site, dot, own = key.rpartition(".")
        return names.get(site, site) + dot + own

    return dataclasses.replace(adapter, params={key: adapter.params[source(key)] for key in adapter.params})


def one_of_ours(make_backbone, random_adapter, method, name):
    backbone = ours(make_backbone, name)
    pooling = {"pooling": "last"} if backbone.causal else {}
    adapter = random_adapter(backbone, EXPORTS[method][0], 1, **pooling, **EXPORTS[method][2])
    return backbone, tied(dataclasses.replace(adapter, name="bad.mood"), backbone)


@pytest.mark.parametrize(("method", "name"), EXPORTED)
def test_what_is_exported_comes_back(make_backbone, random_adapter, tmp_path, method, name):
    backbone, adapter = one_of_ours(make_backbone, random_adapter, method, name)
    done = mt.export_adapter(adapter, backbone, tmp_path / "theirs", target="adapters")
    assert done.head == "checkpoint" and done.check is None and "pip install adapters" in done.unchecked
    kind = "regression" if adapter.task.kind == "regression" else None
    again = mt.import_adapter(tmp_path / "theirs", backbone, source="adapters", kind=kind).adapter
    head, tensors = adapter.head.folded(adapter.head_params)  # the library has no place for mean and deviation
    assert (again.head, again.task.labels) == (head, adapter.task.labels)
    for key, expected in tensors.items():
        equal(again.head_params[key], expected)
    finished, params = adapter.method.finish(adapter.params, backbone)
    one, other = mt.DeltaSet(finished.deltas(params, backbone)), again.delta_set(backbone)
    ids = torch.arange(5, 12)[None].repeat(2, 1)
    with torch.no_grad():
        equal(*(backbone.run(mt.Plan([s, s]), ids) for s in (other, one)))


@pytest.fixture(scope="session")
def by_the_library(tmp_path_factory, make_backbone, random_adapter, random_rows):
    """What the library computes with our exports, by case; one run for them all."""
    if not PYTHON.exists():
        pytest.skip("no environment with the library adapters: make adapterhub-env")
    root = tmp_path_factory.mktemp("exports")
    jobs = []
    for method, name in EXPORTED:
        backbone, adapter = one_of_ours(make_backbone, random_adapter, method, name)
        job = root / f"{method}.{file_name(name)}"
        job.mkdir()
        mt.export_adapter(adapter, backbone, job / "theirs", target="adapters")
        _write_job(job, backbone, job / "theirs", head=True)
        ids, mask = random_rows(backbone, LENGTHS).padded()
        save_file({"input_ids": ids, "attention_mask": mask}, job / "rows.safetensors")
        jobs.append(str(job))
    run_there(reference.__file__, *jobs)
    return root


@needs_adapters
@pytest.mark.parametrize(("method", "name"), EXPORTED)
def test_the_library_computes_the_same_with_an_export(by_the_library, make_backbone, random_adapter, method, name):
    backbone, adapter = one_of_ours(make_backbone, random_adapter, method, name)
    job = by_the_library / f"{method}.{file_name(name)}"
    rows, expected = load_file(job / "rows.safetensors"), load_file(job / "outputs.safetensors")["outputs"]
    deltas = adapter.delta_set(backbone)
    with torch.no_grad():
        hidden = backbone.run(mt.Plan([deltas] * 3), rows["input_ids"], rows["attention_mask"])
        heads = [(adapter.head, adapter.head_params)] * 3
        found = mt.heads.mixed_logits(backbone, heads, hidden, rows["attention_mask"])
    for i, length in enumerate(LENGTHS):
        end = length if adapter.head.kind == "tagging" else None
        equal(found[i][:end], expected[i][:end])


@pytest.mark.parametrize(
    ("name", "method", "problem"),
    [
        ("bert", mt.AoTFC(r=2), "has no counterpart that is written; what can be: pfeiffer"),
        ("bert", mt.Houlsby(layer_norms=True), "it trained layer norms too"),
        ("bert", mt.IA3(), "it rescales the input of ffn_out, and the library rescales outputs only"),
        (
            "bert",
            mt.LoRA(r=2, targets=("attention_output",)),
            "it adapts attention_output, where the library has no LoRA",
        ),
        ("bert", mt.LoRA(r=2, targets=("embedding",)), "it adapts embedding, where the library has no LoRA"),
        ("bert", mt.ParallelAdapter(sublayers=("block",)), "stands behind layer.0.block_sublayer"),
        ("bert", mt.PTuningV2(length=2, shift_positions=True), "it shifts the positions of the text"),
        ("gpt2", mt.ParallelAdapter(), "it reads what is behind the sub-layer's norm"),
        ("gpt2", mt.PTuningV2(length=2), "on 'gpt2' the library masks prefixes wrongly"),
        ("deberta", mt.LoRA(r=2), "query, key and value take turns head by head"),
        ("albert", mt.Houlsby(), "passes of one module, which the library adapts once"),
        ("modernbert", mt.LoRA(r=2), "not for 'modernbert', only for bert, roberta"),
    ],
)
def test_what_the_library_cannot_express_is_not_exported(
    make_backbone, random_adapter, tmp_path, name, method, problem
):
    backbone = make_backbone(name)
    with pytest.raises(mt.AdapterError, match=rf"cannot be exported to adapters: .*{problem}"):
        mt.export_adapter(random_adapter(backbone, method, 1), backbone, tmp_path / "out", target="adapters")
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_library_lacks_is_written_beside(bert, random_adapter, tmp_path):
    adapter = random_adapter(bert, mt.LoRA(r=2), 1, pooling="mean")
    done = mt.export_adapter(adapter, bert, tmp_path / "out", target="adapters")
    assert (done.task, done.head) == ("none", "beside")
    written = {"adapter_config.json", "adapter.safetensors", "head.safetensors", "head.json"}
    assert {p.name for p in done.path.iterdir()} == written
    assert json.loads((done.path / "head.json").read_text())["pooling"] == "mean"


def test_an_adapter_that_computes_something_else_is_not_written(bert, random_adapter, tmp_path):
    """A Python that answers with zeros stands for a library that disagrees."""
    script, python = tmp_path / "zeros.py", tmp_path / "python"
    script.write_text(
        "import sys, numpy, safetensors.numpy as s\n"
        "rows = s.load_file(sys.argv[-1] + '/rows.safetensors')['input_ids']\n"
        "found = numpy.zeros((len(rows), 3), dtype='float32')\n"
        "s.save_file({'outputs': found}, sys.argv[-1] + '/outputs.safetensors', {'version': '0'})\n"
    )
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    adapter = random_adapter(bert, mt.LoRA(r=2), 1)
    with pytest.raises(mt.AdapterError, match=r"does not compute the same: its logits differ .*\(adapters 0\)"):
        mt.export_adapter(adapter, bert, tmp_path / "out", target="adapters", check_with=python)
    assert not (tmp_path / "out").exists()
    mt.export_adapter(adapter, bert, tmp_path / "theirs", target="adapters")
    with pytest.raises(mt.AdapterError, match="does not compute the same"):
        mt.import_adapter(tmp_path / "theirs", bert, tmp_path / "ours", source="adapters", check_with=python)
    assert not (tmp_path / "ours").exists()
