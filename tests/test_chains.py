"""DCoT: its format, its rows beside the baseline's, answers from the last line alone, votes at equal cost."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from multitune import Bank, ConfigError, DataError, Task, train
from multitune.prompting import answer, chain_data, cot_rows, dcot_rows, sample_chains, vote
from multitune.prompting.chains import _without_answer, prompt, response
from multitune.tasks.reasoning import Question

TWO = Question(text="1 + 1?", answer="2", chains=("one and one", "a pair", "count: 1 2"))
ONE = Question(text="which?", answer="B", options=("red", "blue"), chains=("blue it is",))
NONE = Question(text="why?", answer="no")
ASKS = 'End with "The answer is", followed by the answer alone.'


@pytest.fixture(scope="module")
def llama(make_backbone):
    return make_backbone("llama", tie_word_embeddings=True, max_position_embeddings=400)


@pytest.fixture(scope="module")
def bank(llama):
    rows = dcot_rows([TWO, ONE])
    bank = Bank(llama)
    trained = train(
        llama, chain_data("chains", rows, rows), "lora", max_steps=2, max_length=256, progress=False, batch_size=2
    )
    bank.add("chains", trained.adapter)
    return bank


def test_the_format_is_that_of_the_paper():
    assert prompt(ONE, 2) == "[Question] which?\n[Options] A) red B) blue\n[Number of answers] 2\n[Answer 1]"
    assert prompt(TWO) == "[Question] 1 + 1?\n[Number of answers] 1\n[Answer 1]"
    assert response(["x", "y", "z"], "2") == "x\n[Answer 2] y\n[Answer 3] z\n\n[Final answer] 2"
    assert response(["x"], "2") == "x\n\n[Final answer] 2"


def test_a_question_with_c_chains_has_a_row_for_every_number_up_to_c():
    rows = dcot_rows([TWO, NONE, ONE], draws=20, seed=3)
    assert len(rows) == 20 * (3 + 1)
    asked = Counter(row["prompt"] for row in rows)
    assert asked == {prompt(TWO, 1): 20, prompt(TWO, 2): 20, prompt(TWO, 3): 20, prompt(ONE, 1): 20}
    written = {row["response"] for row in rows if row["prompt"] == prompt(TWO, 2)}
    ordered = {response([a, b], "2") for a in TWO.chains for b in TWO.chains if a != b}
    assert written <= ordered and len(written) > 3  # drawn anew, in either order, no chain twice
    assert len(dcot_rows([TWO], most=2)) == 2
    assert dcot_rows([TWO], seed=5, draws=9) == dcot_rows([TWO], seed=5, draws=9) != dcot_rows([TWO], seed=6, draws=9)


def test_the_baseline_has_as_many_rows_of_the_same_chains():
    rows = cot_rows([TWO, NONE, ONE], draws=4)
    assert len(rows) == len(dcot_rows([TWO, NONE, ONE], draws=4))
    assert Counter(r["response"] for r in rows) == {
        response([chain], q.answer): 4 for q in (TWO, ONE) for chain in q.chains
    }
    assert {r["prompt"] for r in rows} == {prompt(TWO, 1), prompt(ONE, 1)}


def test_the_task_is_judged_by_the_final_answer(bank):
    task = bank.adapter("chains").task
    assert (task.metric, task.columns, task.label) == ("answer_match", ("prompt",), "response")
    with pytest.raises(DataError, match="questions without chains give none"):
        chain_data("empty", dcot_rows([NONE]), dcot_rows([TWO]))


def test_answers_are_what_the_bank_writes(bank):
    found = answer(bank, "chains", [TWO, ONE], k=2, settings={"max_new_tokens": 6})
    rows = [("chains", {"prompt": prompt(q, 2)}) for q in (TWO, ONE)]
    by_hand = bank.generate(rows, {"max_new_tokens": 6})
    assert found.texts == tuple((g.text.strip(),) for g in by_hand)
    assert found.num_tokens == sum(len(g.token_ids) for g in by_hand)
    assert found.num_unfinished == sum(g.finish_reason == "length" for g in by_hand)
    assert found.accuracy == sum(found.right) / 2


def test_what_was_answered_is_kept_and_saved(bank, tmp_path):
    settings = {"max_new_tokens": 6, "temperature": 1.5}
    found = answer(bank, "chains", [TWO, ONE], samples=3, settings=settings)
    first, second = found.rows
    assert first.prompt == "1 + 1?" and second.prompt == "which?\n(A) red\n(B) blue"
    assert (first.answers, second.answers) == (("2",), ("B",)) and (first.texts, second.texts) == found.texts
    assert tuple(row.right for row in found.rows) == found.right
    large = replace(found, answers=(1234567.0, 0.1))
    assert [row.answer for row in large.rows] == ["1234567", "0.1"]
    place = found.save(tmp_path / "answered")
    assert json.loads((place / "scores.json").read_text()) == {"accuracy": found.accuracy}
    assert len((place / "predictions.jsonl").read_text().splitlines()) == 2
    assert "which?" in (place / "predictions.html").read_text()


def test_samples_differ_and_are_the_same_again(bank):
    settings = {"max_new_tokens": 6, "temperature": 1.5}
    first = answer(bank, "chains", [TWO, ONE], samples=4, settings=settings, seed=1)
    assert [len(texts) for texts in first.texts] == [4, 4] and len(set(first.texts[0])) > 1
    again = answer(bank, "chains", [TWO, ONE], samples=4, settings=settings, seed=1, batch_size=3)
    assert first.texts == again.texts and first.answers == again.answers
    assert answer(bank, "chains", [TWO, ONE], samples=4, settings=settings, seed=2).texts != first.texts


def test_one_text_per_question_is_drawn_by_the_seed_too(bank):
    settings = {"max_new_tokens": 6, "temperature": 1.5}
    first, again, other = (answer(bank, "chains", [TWO, ONE, TWO], settings=settings, seed=s) for s in (1, 1, 2))
    assert first.texts == again.texts != other.texts
    assert first.texts[0] != first.texts[2]  # one question, drawn twice
    fixed = answer(bank, "chains", [TWO, ONE, TWO], settings=settings | {"seed": 1})
    assert fixed.texts[0] == fixed.texts[2]


def test_an_adapter_of_another_task_is_refused_by_what_it_reads(bank):
    other = Task(name="facts", kind="generation", template=("{facts} :",), label="said", format="plain")
    here = Bank(bank.backbone)
    here.add("facts", replace(bank.adapter("chains"), task=other))
    with pytest.raises(
        DataError, match="adapter 'facts' was trained on task 'facts' of kind generation, which reads fa"
    ):
        answer(here, "facts", [ONE], settings={"max_new_tokens": 2})


def test_the_bare_model_answers_zero_shot(bank):
    found = answer(bank, None, [TWO, ONE], settings={"max_new_tokens": 4})
    text = 'which?\n(A) red\n(B) blue\nEnd with "The answer is", followed by the answer alone.\n'
    tokenizer = bank.backbone.tokenizer
    trigger = tokenizer("Let's think step by step.", add_special_tokens=False)["input_ids"]
    (by_hand,) = bank.generate([(None, [*tokenizer(text)["input_ids"], *trigger])], {"max_new_tokens": 4})
    assert found.texts[1] == (by_hand.text.strip(),)


def test_in_a_chat_the_trigger_begins_the_answer(make_backbone):
    backbone = make_backbone("llama", tie_word_embeddings=True, max_position_embeddings=400)
    messages = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    backbone.tokenizer.chat_template = messages + "{% if add_generation_prompt %}said {% endif %}"
    found = answer(Bank(backbone), None, [NONE], settings={"max_new_tokens": 4})
    said = 'user : why?\nEnd with "The answer is", followed by the answer alone. said '
    ids = [backbone.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (said, "Let's think step by step.")]
    (by_hand,) = Bank(backbone).generate([(None, ids[0] + ids[1])], {"max_new_tokens": 4})
    assert found.texts == ((by_hand.text.strip(),),)


@pytest.mark.parametrize("name", ["t5/writes", "bart/writes"])
def test_an_encoder_reads_the_trigger_in_front_of_the_end_of_its_text(make_backbone, name):
    backbone = make_backbone(name, max_position_embeddings=100)
    (by_hand,) = Bank(backbone).generate([(None, f"why?\n{ASKS}\nLet's think step by step.")], {"max_new_tokens": 4})
    found = answer(Bank(backbone), None, [NONE], settings={"max_new_tokens": 4})
    assert found.texts == ((by_hand.text.strip(),),)


@pytest.mark.parametrize("make", [dcot_rows, cot_rows])
def test_questions_that_can_be_read_once_are_drawn_as_often_as_a_list(make):
    assert make((q for q in (TWO, ONE)), draws=3) == make([TWO, ONE], draws=3)
    assert len(make(iter([TWO]), draws=3)) == 9
    with pytest.raises(ConfigError, match="most=0 is not possible"):
        make([], most=0)


def test_the_most_frequent_answer_wins_and_silence_has_no_voice():
    assert vote([3.0, None, 4.0, 4.0, None, None]) == 4.0
    assert vote(["b", "a", "a", "b"]) == "b"  # of equals the first
    assert vote([None, None]) is None


def test_only_right_chains_are_kept(bank):
    """What the model writes decides the answer here, so that just that question keeps the chain."""
    settings = {"max_new_tokens": 8, "temperature": 1.5, "seed": 4}
    ((written,),) = answer(bank, None, [NONE], settings=settings).texts
    right = Question(text=NONE.text, answer=written.upper() + " !", chains=("own",))
    wrong = Question(text=NONE.text, answer="zebra")
    kept, other = sample_chains(bank, [right, wrong], triggers=("Let's think step by step.",), settings=settings)
    assert len(written.split()) > 2
    assert kept.chains == ("own", written) and other.chains == ()


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("Two and two. That is 4. So the answer is 4.", "Two and two. That is 4."),
        ("2 + 2 = 4\nThe answer is 4", "2 + 2 = 4"),
        ("The answer is 4.", ""),
        ("2 + 2 = 4", "2 + 2 = 4"),
    ],
)
def test_a_chain_does_not_state_its_answer_twice(text, chain):
    assert _without_answer(text) == chain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(k=0), "k=0 chains are not possible"),
        (dict(samples=0), "samples=0 is not possible"),
        (dict(samples=3), "samples=3 of greedy decoding are all the same.*temperature"),
        (
            dict(samples=3, settings={"temperature": 1.0, "seed": 4}),
            r"samples=3 with one seed of settings are all the same; .*answer\(\.\.\., seed=4\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(bank, arguments, message):
    with pytest.raises(ConfigError, match=message):
        answer(bank, "chains", [TWO], **arguments)


def test_the_bare_model_gives_no_several_chains(bank):
    with pytest.raises(ConfigError, match="k=2: the bare model was not trained"):
        answer(bank, None, [TWO], k=2)
    with pytest.raises(DataError, match="no questions"):
        answer(bank, "chains", [])
    with pytest.raises(ConfigError, match="draws=0"):
        dcot_rows([TWO], draws=0)
