"""From texts to padded tensors."""

import pytest
import torch

from multitune import Backbone, BackboneError
from multitune.batching import Encoded, encode, pad


def test_texts_and_pairs_in_one_call_keep_their_order(bert):
    sequences = [("good film",), ("good", "bad film"), ("x",), ("the", "film")]
    encoded = encode(bert, sequences, max_length=30)
    for parts, got in zip(sequences, encoded, strict=True):
        alone = bert.tokenizer(*parts)
        assert got.input_ids == alone["input_ids"]
        assert got.token_type_ids == alone["token_type_ids"]
        assert got.word_starts == ()
        assert len(got) == len(alone["input_ids"])
    assert encode(bert, [], max_length=5) == []


def test_models_without_token_types_get_none(make_backbone):
    (got,) = encode(make_backbone("roberta"), [("good", "film")], max_length=30)
    assert got.token_type_ids is None


@pytest.mark.parametrize("length", [5, 7, 12])
def test_the_longer_text_of_a_pair_is_cut_first(bert, length):
    (got,) = encode(bert, [("good", "bad " * 20)], max_length=length)
    assert len(got) == length
    assert bert.tokenizer.decode(got.input_ids).startswith("[CLS] good [SEP] bad")
    (one,) = encode(bert, [("bad " * 20,)], max_length=length)
    assert len(one) == length
    assert one.input_ids[-1] == bert.tokenizer.sep_token_id


@pytest.mark.parametrize(
    ("words", "max_length", "starts"),
    [
        (("good", "ada", "x"), 30, (1, 2, 5)),
        (("ada",), 30, (1,)),
        (("ada", "lovelace", "x"), 6, (1, 4)),  # the third word is cut off
        (("good", " ", "x"), 30, (1, 2, 2)),  # a word without tokens reads where the next one starts
        ((" ", " ", "x"), 30, (1, 1, 1)),
        (("good", " "), 30, (1,)),
        ((" ",), 30, ()),
    ],
)
def test_word_starts(bert, words, max_length, starts):
    (got,) = encode(bert, [words], max_length=max_length, words=True)
    assert got.word_starts == starts


def test_words_need_a_fast_tokenizer_and_texts_any(make_model, bert):
    with pytest.raises(
        BackboneError, match=r"has no tokenizer, so it takes token ids only; .*Backbone\(model, tokeniz"
    ):
        encode(Backbone(make_model("bert")), [("x",)], max_length=5)


def test_padding(bert):
    batch = pad([Encoded(input_ids=[5, 6, 7]), Encoded(input_ids=[8], token_type_ids=[1])], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0], [1, 0, 0]]
    even = pad([Encoded(input_ids=[5, 6]), Encoded(input_ids=[7, 8])], pad_id=0)
    assert even.attention_mask is None and even.token_type_ids is None
    assert all(t is None or t.dtype == torch.int64 for t in vars(batch).values())
    assert torch.equal(batch.to("cpu").input_ids, batch.input_ids)
