"""The head of causal backbones: logits are those of transformers' own language models."""

import copy

import pytest
import torch
import transformers

from multitune import Backbone, BackboneError, DeltaSet, LoRA, Plan, merge

#: name -> transformers' class with the head.
LANGUAGE_MODELS = {
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


@pytest.fixture(scope="module")
def language_model(make_model):
    """`language_model(name, **config)`: transformers' model with a head, all weights random."""

    def make(name, **overrides):
        body = make_model(name, **overrides)
        torch.manual_seed(7)
        whole = getattr(transformers, LANGUAGE_MODELS[name])(body.config)
        whole.base_model.load_state_dict(body.state_dict())
        if not body.config.tie_word_embeddings:
            with torch.no_grad():
                whole.lm_head.weight.normal_(std=0.3)
        return whole.eval()

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_equal_those_of_the_language_model(name, tied, language_model, random_rows):
    whole = language_model(name, tie_word_embeddings=tied)
    backbone = Backbone(copy.deepcopy(whole))
    assert backbone.lm_head.tied == tied
    for lengths in ([6, 6], [6, 3]):
        ids, mask = random_rows(backbone, lengths).padded()
        with torch.no_grad():
            expected = whole(input_ids=ids, attention_mask=mask).logits
            found = backbone.logits(Plan([None] * 2), ids, mask)
        for i, n in enumerate(lengths):
            torch.testing.assert_close(found[i, :n], expected[i, :n], rtol=0, atol=0)


def test_gemmas_last_logits_are_capped(language_model, random_rows):
    backbone = Backbone(language_model("gemma2", final_logit_softcapping=0.5))
    ids, _ = random_rows(backbone, [5]).padded()
    assert 0.3 < backbone.logits(Plan([None]), ids).abs().max() < 0.5


def test_a_projected_opt_has_a_head_as_wide_as_its_embeddings(language_model, random_rows):
    whole = language_model("opt", word_embed_proj_dim=20, do_layer_norm_before=False)
    backbone = Backbone(copy.deepcopy(whole))
    ids, _ = random_rows(backbone, [5]).padded()
    with torch.no_grad():
        torch.testing.assert_close(backbone.logits(Plan([None]), ids), whole(input_ids=ids).logits, rtol=0, atol=0)


def test_the_model_its_names_and_its_fingerprint_are_those_of_the_base_model(language_model, make_model):
    body = Backbone(make_model("gpt2"), name="a")
    whole = Backbone(language_model("gpt2"), name="a")
    assert whole.model.state_dict().keys() == body.model.state_dict().keys()
    assert whole.sites == body.sites
    assert whole.describe() == body.describe()
    assert not any(p.requires_grad for p in whole.lm_head.weight.unsqueeze(0))


def test_a_base_model_with_tied_embeddings_has_a_head_and_one_without_has_none(make_model, random_rows):
    tied = Backbone(make_model("gpt2"))
    ids, _ = random_rows(tied, [4]).padded()
    with torch.no_grad():
        expected = tied.run(Plan([None]), ids) @ tied.word_embeddings.T
        torch.testing.assert_close(tied.logits(Plan([None]), ids), expected)
    untied = Backbone(make_model("llama"), name="small")
    assert not untied.has_lm_head
    with pytest.raises(BackboneError, match=r"'small' \(llama\) has no language-model head: its checkpoint holds the"):
        _ = untied.lm_head


def test_an_encoder_has_no_head(bert):
    with pytest.raises(BackboneError, match=r"no language-model head: it is no causal model\. Load .*smollm2"):
        _ = bert.lm_head


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
def test_a_checkpoint_keeps_its_head_and_its_ends(name, language_model, make_backbone, random_rows, close, tmp_path):
    whole = language_model(name, tie_word_embeddings=name == "gpt2")
    whole.generation_config.eos_token_id = [3, 7]
    whole.save_pretrained(tmp_path)
    make_backbone(name).tokenizer.save_pretrained(tmp_path)
    loaded = Backbone.load(tmp_path)
    assert loaded.eos_ids == (3, 7)
    ids, _ = random_rows(loaded, [5]).padded()
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        for backbone in (loaded, loaded.clone()):
            close(backbone.logits(Plan([None]), ids), expected)  # mapped weights may lie elsewhere than the sums like
    half = Backbone.load(tmp_path, dtype="float16")
    assert half.lm_head.weight.dtype == torch.float16
    assert half.fingerprint == loaded.fingerprint


def test_a_checkpoint_of_a_base_model_alone_gets_no_random_head(make_model, make_backbone, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    make_backbone("llama").tokenizer.save_pretrained(tmp_path)
    loaded = Backbone.load(tmp_path)
    assert not loaded.has_lm_head
    assert loaded.fingerprint == Backbone(make_model("llama")).fingerprint


def test_a_merged_adapter_and_the_same_adapter_routed_give_the_same_logits(
    language_model, random_adapter, random_rows, close, tmp_path
):
    backbone = Backbone(language_model("gpt2"), name="a")
    adapter = random_adapter(backbone, LoRA(), 1)
    deltas = DeltaSet(adapter.method.deltas(adapter.params, backbone))
    ids, _ = random_rows(backbone, [6, 6]).padded()
    with torch.no_grad():
        routed = backbone.logits(Plan([deltas, None]), ids)
        bare = backbone.logits(Plan([None, None]), ids)
    close(routed[1], bare[1])
    assert (routed[0] - bare[0]).abs().max() > 0.1
    merge(adapter, backbone, tmp_path / "merged")
    body = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        close(Backbone(body).logits(Plan([None, None]), ids)[0], routed[0])
