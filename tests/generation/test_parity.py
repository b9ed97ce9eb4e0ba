"""Text of the bare model is transformers' own, and with an exported adapter that of Hugging Face PEFT."""

import copy

import pytest
import torch

from multitune import DeltaSet, LoRA, Plan, PrefixTuning, export_adapter

ENDS = [11, 23, 37, 53, 71, 89]  # of the models in conftest
LENGTHS = [7, 3, 9, 1]
NEW = 12


def theirs(model, row, **settings):
    """transformers' own text for one row."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **settings)[0, len(row) :]


def cut(tokens):
    """Up to and with the end of text: transformers fills rows up behind it."""
    end = next((i for i, token in enumerate(tokens) if token in ENDS), len(tokens))
    return tokens[: end + 1]


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_text_is_transformers_own(lm, language_model, make_prompts, padded, name, side):
    backbone, model = lm(name), language_model(name)
    rows = make_prompts(LENGTHS)
    ours = backbone.generate(Plan([None] * 4), *padded(rows, side), settings={"max_new_tokens": NEW})
    for row, generation in zip(rows, ours, strict=True):
        assert list(generation.token_ids) == cut(theirs(model, row).tolist())
        assert generation.finish_reason == ("eos" if generation.token_ids[-1] in ENDS else "length")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
def test_rows_of_one_length_equal_transformers_batch(lm, language_model, make_prompts, name):
    """Nothing is padded, so that transformers gives no mask at all."""
    ids = torch.tensor(make_prompts([6] * 3))
    ours = lm(name).generate(Plan([None] * 3), ids, settings={"max_new_tokens": NEW})
    batch = language_model(name).generate(ids, max_new_tokens=NEW, do_sample=False)[:, 6:]
    assert [list(g.token_ids) for g in ours] == [cut(row) for row in batch.tolist()]


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_beams=3),
        dict(num_beams=2, early_stopping=True),
        dict(num_beams=3, early_stopping="never", length_penalty=0.0),
        dict(num_beams=4, length_penalty=2.0),
        dict(num_beams=2, length_penalty=-1.0),
        dict(num_beams=3, repetition_penalty=1.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text"])
def test_beams_are_transformers_own(lm, language_model, make_prompts, padded, name, settings):
    backbone, model = lm(name), language_model(name)
    rows = make_prompts([*LENGTHS, 5, 6], seed=1)
    ours = backbone.generate(Plan([None] * 6), *padded(rows), settings={"max_new_tokens": NEW} | settings)
    for row, generation in zip(rows, ours, strict=True):
        assert list(generation.token_ids) == cut(theirs(model, row, **settings).tolist())


def test_some_beams_end_early(lm, make_prompts, padded):
    """Or the parity of beams would say little about ends of text."""
    rows = make_prompts([*LENGTHS, 5, 6], seed=1)
    reasons = set()
    for name in ("gpt2", "llama", "gemma3_text"):
        found = lm(name).generate(Plan([None] * 6), *padded(rows), settings={"max_new_tokens": NEW, "num_beams": 3})
        reasons |= {g.finish_reason for g in found}
    assert reasons == {"eos", "length"}


def test_beam_scores_are_transformers_own(lm, language_model, make_prompts, padded, close):
    rows = make_prompts(LENGTHS, seed=1)
    ours = lm("llama").generate(Plan([None] * 4), *padded(rows), settings={"max_new_tokens": NEW, "num_beams": 3})
    for row, generation in zip(rows, ours, strict=True):
        found = language_model("llama").generate(
            torch.tensor([row]), max_new_tokens=NEW, num_beams=3, return_dict_in_generate=True, output_scores=True
        )
        close(torch.tensor(generation.score), found.sequences_scores[0])


def test_repetition_penalty_is_transformers_own(lm, language_model, make_prompts, padded):
    rows = make_prompts(LENGTHS)
    settings = {"max_new_tokens": NEW, "repetition_penalty": 3.0}
    ours = lm("llama").generate(Plan([None] * 4), *padded(rows), settings=settings)
    for row, generation in zip(rows, ours, strict=True):
        expected = theirs(language_model("llama"), row, repetition_penalty=3.0).tolist()
        assert list(generation.token_ids) == cut(expected)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama", LoRA(r=3)),
        ("opt", LoRA(r=3, targets=("query", "ffn_in", "ffn_out"))),
        ("gpt2", PrefixTuning(length=3, hidden=4, shift_positions=True)),
        ("opt", PrefixTuning(length=5, hidden=4, shift_positions=True)),
        ("llama", PrefixTuning(length=3, hidden=4, shift_positions=True)),
    ],
    ids=["llama-lora", "opt-lora", "gpt2-prefix", "opt-prefix", "llama-prefix"],
)
def test_an_exported_adapter_generates_the_same_in_peft(
    lm, language_model, random_adapter, make_prompts, padded, tmp_path, name, method
):
    peft = pytest.importorskip("peft", reason="PEFT is not installed; pip install 'multitune[parity]'")
    backbone = lm(name)
    adapter = random_adapter(backbone, method, 1)
    with torch.no_grad():
        deltas = DeltaSet(adapter.method.deltas(adapter.params, backbone)).fused(backbone.dtype, backbone.device)
    export_adapter(adapter, backbone, tmp_path / "peft")
    rows = make_prompts(LENGTHS)
    model = copy.deepcopy(language_model(name))
    config = peft.PeftConfig.from_pretrained(tmp_path / "peft")
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", None
    wrapped = peft.get_peft_model(model, config)
    state = peft.utils.load_peft_weights(str(tmp_path / "peft"), device="cpu")
    loaded = peft.set_peft_model_state_dict(wrapped, rename(state, name, wrapped))
    assert set(loaded.unexpected_keys) <= {"prompt_embeddings"}  # PEFT puts those into its prompt encoder
    wrapped.eval()
    for beams in (1, 3):
        settings = {"max_new_tokens": NEW, "num_beams": beams}
        ours = backbone.generate(Plan([deltas, None, deltas, deltas]), *padded(rows), settings=settings)
        for i in (0, 2, 3):
            tokens = wrapped.generate(
                input_ids=torch.tensor([rows[i]]), attention_mask=torch.ones(1, len(rows[i]), dtype=torch.long),
                do_sample=False, **settings,
            )[0, len(rows[i]) :]  # fmt: skip
            assert list(ours[i].token_ids) == cut(tokens.tolist())
    ours = backbone.generate(Plan([deltas, None, deltas, deltas]), *padded(rows), settings={"max_new_tokens": NEW})
    assert list(ours[1].token_ids) == cut(theirs(language_model(name), rows[1]).tolist())


def rename(state, name, wrapped):
    """Names of a base model's adapter as they are in the model with a head."""
    prefix = {"gpt2": "transformer", "llama": "model", "opt": "model"}[name]
    return {key.replace("base_model.model.", f"base_model.model.{prefix}."): t for key, t in state.items()}
