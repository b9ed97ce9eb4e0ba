"""Worked solutions: every chain ends in the answer, what does not add up is left out, answers are found in texts."""

import re

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from multitune import DataError
from multitune.tasks import compute
from multitune.tasks.final_answers import final_answer, read_answer, same_answer
from multitune.tasks.reasoning import READERS, load_questions, question_rows

SOLVED = {
    "question": " How many in all? ",
    "answer": "She has 12 x 2 = <<12*2=24>>24 pens.\nSo 1,000 - 24 = $<<1000-24=976>>976.\n#### 976",
}


def gsm8k(answer):
    return READERS["gsm8k"]({"question": "?", "answer": answer})


def test_a_worked_solution_is_told_in_three_ways():
    question = READERS["gsm8k"](SOLVED)
    assert (question.text, question.answer) == ("How many in all?", "976")
    assert question.chains == (
        "She has 12 x 2 = 24 pens.\nSo 1,000 - 24 = $976.",
        "12*2 = 24\n1000-24 = 976",
        "1000-(12*2) = 976",
    )


@pytest.mark.parametrize(
    "answer",
    [
        "<<2+2=5>>5\n#### 5",  # a step that is false
        "<<2+2=4>>4\n#### 5",  # steps that end elsewhere
        "<<__import__('os')=4>>4\n#### 4",  # no arithmetic
        "<<1/0=4>>4\n#### 4",
        "no markup\n#### 4",
    ],
)
def test_steps_that_do_not_add_up_give_no_chain_of_their_own(answer):
    assert len(gsm8k(answer).chains) == 1


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(1, 9)), min_size=1, max_size=5), st.integers(1, 50))
def test_every_made_chain_of_arithmetic_is_true(turns, start):
    value, lines = start, []
    for sign, number in turns:
        before, value = value, eval(f"{value}{sign}{number}")
        if before < 0:  # the data set writes no negative operands
            return
        lines.append(f"so <<{before}{sign}{number}={value}>>{value}")
    chains = gsm8k("\n".join(lines) + f"\n#### {value}").chains
    assert "<<" not in chains[0]
    for chain in chains[1:]:
        for line in chain.splitlines():
            left, right = line.split(" = ")
            assert eval(left) == float(right)
        assert line.endswith(f"= {value}")


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_coins_are_followed_to_the_right_side(turns):
    names = ["Ann", "Bo", "Cy", "Di", "Ed", "Flo"][: len(turns)]
    said = " ".join(f"{n} {'flips' if t else 'does not flip'} the coin." for n, t in zip(names, turns, strict=True))
    heads = sum(turns) % 2 == 0
    row = {"question": f"A coin is heads up. {said} Is it still heads up?", "answer": "yes" if heads else "no"}
    chains = READERS["coin_flip"](row).chains
    assert len(set(chains)) == 3
    assert chains[0].endswith("heads up." if heads else "tails up.")
    assert ("no longer" in chains[1]) is not heads and chains[2].endswith("heads up." if heads else "tails up.")
    wrong = row | {"answer": "no" if heads else "yes"}
    assert READERS["coin_flip"](wrong).chains == ()


def test_letters_that_the_row_counts_otherwise_give_no_chain():
    row = {"question": 'Take the last letters of each words in "Ace Rosy" and concatenate them.', "answer": "ey"}
    chains = READERS["last_letters"](row).chains
    assert len(set(chains)) == 3 and all("ey" in chain for chain in chains)
    assert READERS["last_letters"](row | {"answer": "e"}).chains == ()


def test_options_lose_their_letters_and_a_rationale_its_answer():
    row = {"question": "x?", "options": ["A)1", "B) 2 (two)"], "rationale": "1 + 1 = 2\nAnswer: B", "correct": "B"}
    question = READERS["aqua_rat"](row)
    assert (question.options, question.answer, question.chains) == (("1", "2 (two)"), "B", ("1 + 1 = 2",))
    row = {"question": "x?", "choices": ["p", "q", "r"], "label": 2}
    assert READERS["commonsense_qa"](row).answer == "C"


def test_questions_are_read_by_name(tmp_path):
    folder = tmp_path / "reasoning" / "gsm8k"
    folder.mkdir(parents=True)
    Dataset.from_list([SOLVED]).to_parquet(folder / "train.parquet")
    assert load_questions("reasoning/gsm8k", "train", tmp_path) == load_questions("gsm8k", "train", tmp_path)
    with pytest.raises(DataError, match="no questions 'gsm8'.*gsm8k"):
        load_questions("gsm8", "train", tmp_path)
    with pytest.raises(DataError, match="no split 'test'"):
        load_questions("gsm8k", "test", tmp_path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("steps 1 2\n#### 1,234", "1,234"),
        ("The answer is 3. No, the answer is: 4.\nMore", "4"),
        ("[Answer 1] 5\n[Answer 2] the answer is 7\n\n[Final answer] 6", "6"),
        ("first line\nlast line.\n", "last line"),
        ("", ""),
    ],
)
def test_the_final_answer_stands_behind_the_surest_marker(text, found):
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("2 + 2 = 4", "4", True),
        ("The answer is $4.00 for 2 pens", "#### 4", True),
        ("it is 4, not 5", "4", False),  # without a marker the last number counts
        ("[Final answer] (B)", "B", True),
        ("The answer is B) 12", "B", True),
        ("A dog, so the answer is C", "A", False),
        ("I'd say B", "B", True),
        ("So the answer is no. Yes", "yes", False),
        ("Yes.", "yes", True),
        ("no letter here", "B", False),
        ("the answer is The Film!", "film", True),
        ("", "film", False),
        ("The answer is an.", "an", True),  # two last letters, and no article
        ("The answer is on.", "an", False),
        ("", "an", False),
    ],
)
def test_answers_are_compared_by_their_kind(text, reference, same):
    assert same_answer(text, reference) is same


def test_the_metric_takes_any_of_the_references():
    scores = compute("answer_match", ["so 4", "so 5", "nothing"], [("4",), ("1", "5"), ("2",)])
    assert scores == {"answer_match": pytest.approx(2 / 3)}
    assert read_answer("nothing", "2") is None


def test_chains_carry_no_markup():
    assert not any(re.search("<<|####", chain) for chain in READERS["gsm8k"](SOLVED).chains)


def test_sets_are_judged_by_their_final_answers(tmp_path):
    folder = tmp_path / "reasoning" / "aqua_rat"
    folder.mkdir(parents=True)
    row = {"question": "x?", "options": ["A)1", "B)2"], "rationale": "so\nAnswer: B", "correct": "B"}
    Dataset.from_list([row]).to_parquet(folder / "test.parquet")
    task, rows = question_rows("reasoning/aqua_rat", "test", tmp_path)
    assert rows == [{"question": "x?\n(A) 1\n(B) 2", "answer": "B"}]
    (example,) = task.examples(rows)
    assert (example.texts[0][0], example.target) == ("x?\n(A) 1\n(B) 2", ("B",))
    assert (task.metric, task.format) == ("answer_match", "auto")
