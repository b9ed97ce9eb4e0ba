"""Exemplars in prompts: the nearest rows, never the row itself nor a duplicate, and a soft prompt trained in front."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from multitune import Bank, ConfigError, DataError, PromptTuning, Task, TaskError, train
from multitune.generation import evaluate_texts
from multitune.generation.prompts import encode_prompt
from multitune.prompting import (
    BM25Examples,
    ExemplarPrompts,
    NeighbourExamples,
    Pattern,
    RandomExamples,
    as_generation,
    with_examples,
)
from multitune.tasks import TaskData

WRITE = Task(name="w", kind="generation", template=("{text} :",), label="y", metric="exact_match", format="plain")
POOL = [
    {"text": "red good film", "y": "first"},
    {"text": "Red  GOOD film!", "y": "a duplicate in other letters"},
    {"text": "“red good film”.", "y": "a duplicate in quotation marks"},
    {"text": "red good cat", "y": ["near", "also right"]},
    {"text": "blue dog", "y": "far"},
    {"text": "red dog", "y": "between"},
]
FINDERS = [BM25Examples, RandomExamples]


@pytest.fixture
def data():
    return TaskData(
        task=WRITE,
        train=Dataset.from_list([{**r, "y": r["y"] if isinstance(r["y"], list) else [r["y"]]} for r in POOL]),
        validation=[{"text": "RED good film", "y": ["x"]}, {"text": "blue dog sat", "y": ["y"]}],
        test=[{"text": "blue dog", "y": "far"}],
    )


@pytest.mark.parametrize("find", FINDERS)
def test_no_row_is_shown_itself_or_a_duplicate(find, data):
    made = with_examples(data, k=4, find=find)
    for table, source in ((made.train, data.train), (made.validation, data.validation), (made.test, data.test)):
        for row, original in zip(table, source, strict=True):
            *shown, own = row["prompt"].split("\n\n")
            assert own == f"{original['text']} :"
            if "film" in own:  # the three that read alike are all left out
                assert not any("film" in part for part in shown) and len(shown) == 3
            assert not any(part.startswith(own) for part in shown)


def test_neighbours_leave_duplicates_out_too(minilm, data):
    made = with_examples(data, k=3, find=lambda rows, k: NeighbourExamples(rows, k, minilm))
    assert not any("film" in part.lower() for part in made.validation[0]["prompt"].split("\n\n")[:-1])


@given(st.integers(0, 5), st.sampled_from([str.upper, str.title, lambda t: f" {t}  ", lambda t: t.replace(" ", "\n")]))
def test_a_planted_duplicate_is_found_however_it_is_written(place, change):
    rows = [{"text": f"{w} film", "y": w} for w in ("a", "b", "c", "d", "e")]
    rows.insert(place, {"text": change("the very good film"), "y": "planted"})
    writer = ExemplarPrompts(WRITE, BM25Examples(rows, k=5))
    assert "planted" not in writer.text({"text": "the very good film"})
    assert "planted" in writer.text({"text": "the very good cat"})


def test_signs_and_decimal_points_make_another_question():
    rows = [{"text": t, "y": t} for t in ("3 - 4", "3 + 4", "1.5", "15", "-4")]
    writer = ExemplarPrompts(WRITE, RandomExamples(rows, k=5))
    for row in rows:
        assert len(writer.text(row).split("\n\n")) == 5  # the four others and itself


def test_the_most_similar_stands_last_and_training_sees_any_order(data):
    made = with_examples(data, k=2, instruction="Say it.")
    assert made.validation[1]["prompt"] == "Say it.\n\nred dog :\nbetween\n\nblue dog :\nfar\n\nblue dog sat :"
    assert made.validation[1]["answers"] == ["y"] and made.train[3]["answers"] == ["near", "also right"]
    orders = {with_examples(data, k=2, seed=seed).train[5]["prompt"] for seed in range(8)}
    assert len(orders) == 2 and len({tuple(sorted(p.split("\n\n"))) for p in orders}) == 1
    assert with_examples(data, k=2, seed=1).train[:] == with_examples(data, k=2, seed=1).train[:]


def test_the_least_similar_go_where_there_is_no_room(make_backbone, data):
    backbone = make_backbone("gpt2")
    whole = with_examples(data, k=3).validation[1]["prompt"]
    shorter = with_examples(data, k=3, backbone=backbone, max_prompt=30).validation[1]["prompt"]
    assert len(shorter.split("\n\n")) < 4 and whole.endswith(shorter)
    count = len(encode_prompt(backbone, shorter + "\n"))
    longer = "\n\n".join(whole.split("\n\n")[-len(shorter.split("\n\n")) - 1 :])
    assert count <= 30 < len(encode_prompt(backbone, longer + "\n"))
    alone = with_examples(data, k=3, backbone=backbone, max_prompt=1).validation[1]["prompt"]
    assert alone == "blue dog sat :"


def test_a_soft_prompt_is_trained_in_front_of_exemplars_alone(make_backbone, data):
    backbone = make_backbone("gpt2", n_positions=256)
    before = {k: t.clone() for k, t in backbone.model.state_dict().items()}
    made = with_examples(data, k=2)
    result = train(
        backbone,
        made,
        PromptTuning(length=4, start="uniform"),
        max_steps=3,
        batch_size=4,
        max_length=200,
        progress=False,
    )
    assert result.num_method_parameters == 4 * backbone.hidden_size
    assert all((before[k] == t).all() for k, t in backbone.model.state_dict().items())
    bank = Bank(backbone)
    bank.add("ipt", result.adapter)
    done = evaluate_texts(bank, "ipt", made.validation, {"max_new_tokens": 3})
    assert [row.prompt for row in done.rows] == [row["prompt"] for row in made.validation]


def test_the_bare_model_and_another_template_are_judged_alike(make_backbone, data):
    backbone = make_backbone("gpt2", n_positions=256)
    made = with_examples(data, k=1)
    done = evaluate_texts(Bank(backbone), None, made.validation, {"max_new_tokens": 3}, task=made.task)
    by_hand = Bank(backbone).generate([(None, f"{row['prompt']}\n") for row in made.validation], {"max_new_tokens": 3})
    assert [row.text for row in done.rows] == [g.text.strip() for g in by_hand]
    assert done.adapter == "bare"
    trained = train(backbone, data, "lora", max_steps=1, batch_size=4, max_length=60, progress=False)
    bank = Bank(backbone)
    bank.add("lora", trained.adapter)
    few = evaluate_texts(bank, "lora", made.validation, {"max_new_tokens": 3}, task=made.task)
    ids = [encode_prompt(backbone, f"{row['prompt']}\n") for row in made.validation]
    assert [r.text for r in few.rows] == [
        g.text.strip() for g in bank.generate([("lora", list(i)) for i in ids], {"max_new_tokens": 3})
    ]
    with pytest.raises(DataError, match="no task of its own"):
        evaluate_texts(bank, None, made.validation)


def test_labels_become_texts_to_write():
    task = Task(name="mood", kind="classification", template=("text",), label="y", labels=("bad", "good"))
    rows = [{"text": "film", "y": "good"}, {"text": "x", "y": 0}]
    data = TaskData(task=task, train=rows, validation=rows)
    made = as_generation(data, Pattern("{text} is", {"good": "very good"}, instruction="Judge."))
    assert made.train[:] == {"prompt": ["Judge.\n\nfilm is", "Judge.\n\nx is"], "answers": [["very good"], ["bad"]]}
    with pytest.raises(TaskError, match="exemplars stand in prompts of tasks that write.*as_generation"):
        with_examples(data)


def test_what_cannot_be_is_refused(make_backbone, data):
    with pytest.raises(ConfigError, match="backbone and max_prompt go together"):
        with_examples(data, backbone=make_backbone("gpt2"))
    with pytest.raises(ConfigError, match="k=0"):
        with_examples(data, k=0)
    with pytest.raises(DataError, match="6 rows are too few for 7"):
        with_examples(data, k=7)
    with pytest.raises(DataError, match="no answer in column 'y'|no label column 'y'"):
        with_examples(TaskData(task=WRITE, train=data.train, validation=[{"text": "x"}]))
