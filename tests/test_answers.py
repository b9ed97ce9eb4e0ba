"""Prompts and answers as token ids: formats, what ends an answer, and what is cut."""

import pytest

from multitune import ConfigError, DataError, Task
from multitune.answers import PromptFormat, encode_answered, settle_format
from multitune.errors import DataWarning
from multitune.generation.prompts import encode_for_task

PLAIN = Task(name="w", kind="generation", template=("{text}",), label="y", format="plain")
CHAT = Task(name="w", kind="generation", template=("{text}",), label="y", format="chat")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} x {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(scope="module")
def gpt2(make_backbone):
    return make_backbone("gpt2")


@pytest.fixture(scope="module")
def talking(make_backbone):
    backbone = make_backbone("gpt2")
    backbone.tokenizer.chat_template = TEMPLATE
    return backbone


def words(backbone, ids):
    return " ".join(backbone.tokenizer.convert_ids_to_tokens(ids)).replace(" ##", "")


def test_auto_is_a_chat_where_the_tokenizer_has_a_template(gpt2, talking):
    auto = Task(name="w", kind="generation", template=("{text}",), label="y", format="auto", system="be good")
    assert settle_format(gpt2, auto) == PLAIN
    assert (settle_format(talking, auto).format, settle_format(talking, auto).system) == ("chat", "be good")
    assert settle_format(talking, PLAIN) is PLAIN
    with pytest.raises(ConfigError, match=r"has no chat template; set format='plain' \(--format plain\)"):
        settle_format(gpt2, CHAT)


def test_a_chat_is_written_by_the_template(talking):
    task = Task(name="w", kind="generation", template=("{text}",), label="y", format="chat", system="be good")
    ids = list(encode_for_task(talking, task, {"text": " bad film ", "y": "never read"}, 40, "row 0"))
    assert words(talking, ids) == "s be good x u bad film x a"
    (row,) = encode_answered(talking, task, task.examples([{"text": "bad", "y": "no"}]), max_length=40, split="train")
    assert words(talking, row.input_ids) == "s be good x u bad x a no [SEP]" and row.num_answer == 3


def test_a_line_break_stands_between_prompt_and_answer_unless_there_is_white_space(smollm2):
    tokenizer = smollm2.tokenizer
    for text in ("Data: a", "Data: a ", "Data: a\n"):
        ids = list(encode_for_task(smollm2, PLAIN, text, 40, "row 0"))
        assert tokenizer.decode(ids) == (text if text[-1].isspace() else text + "\n")
    (row,) = encode_answered(
        smollm2, PLAIN, PLAIN.examples([{"text": "Data: a", "y": " Yes. "}]), max_length=40, split="x"
    )
    assert tokenizer.decode(row.input_ids) == "Data: a\nYes.<|im_end|>"


def test_smollm2_reads_a_chat_as_its_own_template_gives_it(smollm2):
    messages = [{"role": "user", "content": "Two plus two?"}]
    ids = list(encode_for_task(smollm2, CHAT, "Two plus two?", 100, "row 0"))
    theirs = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert ids == theirs["input_ids"]
    rows = CHAT.examples([{"text": "Two plus two?", "y": "Four."}])
    (row,) = encode_answered(smollm2, CHAT, rows, max_length=100, split="train")
    said = [*messages, {"role": "assistant", "content": "Four."}]
    whole = smollm2.tokenizer.apply_chat_template(said, return_dict=True)["input_ids"]
    assert row.input_ids == whole[: len(row.input_ids)]  # up to its end of turn; then the template breaks the line
    assert row.input_ids[-1] in smollm2.eos_ids


def test_the_token_that_ends_a_chat_is_the_templates_own(make_backbone):
    backbone = make_backbone("gpt2", eos_token_id=[3, 30])
    backbone.tokenizer.chat_template = TEMPLATE
    backbone.eos_ids = (3, *backbone.tokenizer.convert_tokens_to_ids(["x"]))
    assert PromptFormat(backbone, CHAT).end_id == backbone.eos_ids[1]
    assert PromptFormat(backbone, PLAIN).end_id == 3


@pytest.mark.parametrize("task", [PLAIN, CHAT])
def test_as_few_words_are_cut_as_must_be(task, talking):
    text = " ".join(["good", "bad", "film", "the"] * 6)
    writer = PromptFormat(talking, task)
    (whole,) = writer.prompts([text])
    frame = len(whole) - 24
    for room in range(frame + 1, len(whole)):
        with pytest.warns(
            DataWarning, match=rf"row 0: its prompt has {len(whole)} tokens and there is room for {room}"
        ):
            ids = list(encode_for_task(talking, task, text, room, "row 0"))
        assert len(ids) == room
        assert ids[-(room - frame + 1) :] == whole[-(room - frame + 1) :]
    with pytest.raises(DataError, match="not a word of its prompt fits"):
        encode_for_task(talking, task, text, frame, "row 0")


def test_a_text_without_spaces_is_cut_between_characters(gpt2):
    with pytest.warns(DataWarning, match="words at its front are cut off"):
        ids = list(encode_for_task(gpt2, PLAIN, "abcdefgh", 6, "row 0"))
    assert words(gpt2, ids) == "[CLS] efgh [SEP]"


def test_an_answer_is_never_cut(gpt2):
    rows = PLAIN.examples([{"text": "good film", "y": "good"}, {"text": "good film", "y": "good " * 9}])
    with pytest.raises(DataError, match=r"answers of 1 of 2 leave no room.*\(rows 1,.*max_length=14 \(--max"):
        encode_answered(gpt2, PLAIN, rows, max_length=12, split="train")
    found = encode_answered(gpt2, PLAIN, rows, max_length=14, split="train")
    assert [a.num_answer for a in found] == [2, 10] and [a.row for a in found] == [0, 1]
