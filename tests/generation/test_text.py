"""Text as it grows: pieces add up, characters are whole, and stop strings end a text and are not in it."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from multitune import BackboneError, Bank, ConfigError, Plan
from multitune.generation.text import TextStream


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte, so that most characters come in several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def fallback_tokenizer():
    """One token per byte, as Llama's and Gemma's have them: runs of them are decoded together, or not at all."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    first = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), first])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@given(
    text=st.text(alphabet="abé€😀 \n", max_size=12), stop=st.lists(st.text("abé ", min_size=1, max_size=3), max_size=2)
)
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.parametrize("window", [(32, 4), (1, 1), (3, 2)])
def test_pieces_add_up_and_never_hold_a_stop_string_or_half_a_character(
    byte_tokenizer, monkeypatch, window, text, stop
):
    monkeypatch.setattr("multitune.generation.text._WINDOW", window[0])
    monkeypatch.setattr("multitune.generation.text._CONTEXT", window[1])
    ids = byte_tokenizer(text)["input_ids"]
    stream = TextStream(lambda tokens: byte_tokenizer.decode(list(tokens)), stop)
    pieces, used = [], 0
    for used in range(1, len(ids) + 1):
        done = stream.stopped(ids[:used], grows=True) or used == len(ids)
        pieces.append(stream.piece(ids[:used], last=done))
        if done:
            break
    joined = "".join(pieces)
    assert joined == stream.text(ids[:used])
    assert "�" not in joined
    come = byte_tokenizer.decode(ids[:used])  # another stop string may be complete first than begins first
    firsts = [come.find(s) for s in stop if s in come]
    assert joined == (come[: min(firsts)] if firsts else text)


@pytest.mark.parametrize("window", [(32, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize("text", ["a €😀€ é" * 6, "€é😀" * 12, "b 😀 é" * 9])
def test_pieces_of_runs_of_bytes_add_up(fallback_tokenizer, monkeypatch, window, text):
    monkeypatch.setattr("multitune.generation.text._WINDOW", window[0])
    monkeypatch.setattr("multitune.generation.text._CONTEXT", window[1])
    ids = fallback_tokenizer(text)["input_ids"]
    stream = TextStream(lambda tokens: fallback_tokenizer.decode(list(tokens)))
    pieces = [stream.piece(ids[:n], last=n == len(ids)) for n in range(1, len(ids) + 1)]
    assert "".join(pieces) == text and not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_character_that_breaks_off_spoils_none_in_front_of_it(fallback_tokenizer, missing):
    ids = fallback_tokenizer("a é€😀😀")["input_ids"][:-missing]
    stream = TextStream(lambda tokens: fallback_tokenizer.decode(list(tokens)))
    assert fallback_tokenizer.decode(ids).count("�") > 4  # or there is nothing to mend
    pieces = [stream.piece(ids[:n], last=n == len(ids)) for n in range(1, len(ids) + 1)]
    assert "".join(pieces) == stream.text(ids) == "a é€😀" + "�" * (4 - missing)


def test_a_long_text_is_not_decoded_from_its_beginning_for_every_token(byte_tokenizer):
    sizes = []

    def decode(tokens):
        sizes.append(len(tokens))
        return byte_tokenizer.decode(list(tokens))

    ids = byte_tokenizer("a long text of é and € " * 20)["input_ids"]
    stream = TextStream(decode)
    pieces = [stream.piece(ids[:n], last=n == len(ids)) for n in range(1, len(ids) + 1)]
    assert "".join(pieces) == byte_tokenizer.decode(ids)
    assert sum(n > 50 for n in sizes) == 1  # the last


def test_a_character_that_never_becomes_whole_comes_at_the_end(byte_tokenizer):
    ids = byte_tokenizer("a€")["input_ids"][:-1]
    stream = TextStream(lambda tokens: byte_tokenizer.decode(list(tokens)))
    pieces = [stream.piece(ids[:n], last=n == len(ids)) for n in range(1, len(ids) + 1)]
    assert pieces == ["a", "", "�"]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_stop_string_ends_the_text_of_its_row_alone(lm, make_prompts, beams):
    backbone = lm("llama")
    bank, prompts = Bank(backbone), make_prompts([4, 6])
    chosen = {"max_new_tokens": 10, "stop_at_eos": False, "num_beams": beams}
    whole = bank.generate([(None, p) for p in prompts], chosen)
    half = len(whole[0].text) // 2
    stop = whole[0].text[half : half + 2]
    one, other = bank.generate([(None, p) for p in prompts], [chosen | {"stop": (stop, "nowhere")}, chosen])
    if beams == 1:
        assert one.text == whole[0].text[: whole[0].text.find(stop)] != ""
        assert one.token_ids == whole[0].token_ids[: len(one.token_ids)]
        assert one.finish_reason == "stop"
    assert stop not in one.text
    assert other == whole[1]


def test_a_special_token_may_end_a_text(lm, make_prompts):
    """Although no text holds one."""
    backbone, prompt = lm("llama"), make_prompts([4])[0]
    bank, tokenizer = Bank(backbone), backbone.tokenizer
    special = tokenizer.convert_tokens_to_ids(["[UNK]", "[CLS]", "[SEP]"])
    drawn = [{"max_new_tokens": 20, "temperature": 9.0, "stop_at_eos": False, "seed": seed} for seed in range(12)]
    texts = bank.generate([(None, prompt)] * 12, drawn)
    chosen, whole = next((c, t) for c, t in zip(drawn, texts, strict=True) if set(special) & set(t.token_ids[2:]))
    end = min(i for i, token in enumerate(whole.token_ids) if token in special)
    stop = tokenizer.convert_ids_to_tokens(whole.token_ids[end])
    found = bank.generate([(None, prompt)], chosen | {"stop": (stop, "nowhere")})[0]
    assert (found.token_ids, found.finish_reason) == (whole.token_ids[: end + 1], "stop")
    assert found.text == tokenizer.decode(whole.token_ids[:end], skip_special_tokens=True)
    with pytest.raises(ConfigError, match=r"row 0: stop='a \[SEP\]' holds the special token '\[SEP\]'.*give stop="):
        bank.generate([(None, prompt)], {"stop": "a [SEP]"})


def test_special_tokens_are_listed_once_and_again_when_one_is_added(lm, make_prompts, monkeypatch):
    bank, prompt = Bank(lm("llama")), make_prompts([4])[0]
    tokenizer = copy.deepcopy(bank.backbone.tokenizer)
    monkeypatch.setattr(bank.backbone, "tokenizer", tokenizer)
    kind, reads = type(tokenizer), []
    listed = kind.added_tokens_decoder
    monkeypatch.setattr(kind, "added_tokens_decoder", property(lambda t: reads.append(t) or listed.fget(t)))
    for _ in range(2):
        bank.generate([(None, prompt)] * 3, {"max_new_tokens": 1, "stop": "film"})
    assert len(reads) == 1
    tokenizer.add_tokens(["<over>"], special_tokens=True)
    with pytest.raises(ConfigError, match="holds the special token '<over>'"):
        bank.generate([(None, prompt)], {"max_new_tokens": 1, "stop": "a<over>"})


def test_what_needs_a_tokenizer_says_so(language_model, make_model):
    from multitune import Backbone

    backbone = Backbone(language_model("llama"))
    ids = torch.tensor([[20, 21]])
    assert backbone.generate(Plan([None]), ids, settings={"max_new_tokens": 2})[0].text == ""
    with pytest.raises(BackboneError, match="has no tokenizer"):
        backbone.generate(Plan([None]), ids, settings={"max_new_tokens": 2, "stop": ("a",)})
    with pytest.raises(BackboneError, match=r"row 0: backbone .* has no tokenizer"):
        Bank(backbone).generate([(None, "good")], {"max_new_tokens": 2})


@pytest.mark.slow
def test_smollm2_answers_a_chat_beside_a_text(smollm2):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rows = [(None, chat), (None, "One, two, three, four,")]
    answer, text = Bank(smollm2).generate(rows, [{"max_new_tokens": 12}, {"max_new_tokens": 4, "stop": "."}])
    assert answer.text == "The capital of France is Paris." and answer.finish_reason == "eos"
    assert text.text.startswith(" five")
