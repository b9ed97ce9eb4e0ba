"""Rows, their order and their targets."""

import pytest
import torch

from multitune import DataError, TrainJob, train_many
from multitune.heads import IGNORED
from multitune.tasks import Task
from multitune.training.data import BatchOrder, Collator, RowLoader, TaskRows


def _order(lengths, *, batch_size=4, accumulation=1, seed=0, grouped=True, epoch=0):
    order = BatchOrder(lengths, batch_size, accumulation=accumulation, seed=seed, grouped=grouped)
    order.set_epoch(epoch)
    return list(order)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("count", [1, 3, 4, 16, 103])
def test_an_epoch_has_every_row_once(grouped, count):
    lengths = [1 + i * 7 % 13 for i in range(count)]
    batches = _order(lengths, grouped=grouped)
    assert sorted(i for b in batches for i in b) == list(range(count))
    assert len(batches) == len(BatchOrder(lengths, 4, accumulation=1, seed=0, grouped=grouped))
    assert all(len(b) == 4 for b in batches[:-1])


def test_order_is_a_function_of_seed_and_epoch():
    lengths = list(range(40))
    assert _order(lengths) == _order(lengths)
    assert _order(lengths) != _order(lengths, epoch=1)
    assert _order(lengths) != _order(lengths, seed=1)


def test_grouping_saves_padding():
    lengths = [1 + i * 37 % 100 for i in range(400)]

    def padded(grouped):
        return sum(max(lengths[i] for i in b) * len(b) for b in _order(lengths, grouped=grouped))

    assert padded(True) < 0.75 * padded(False)


def test_accumulated_small_batches_hold_the_rows_of_a_large_one():
    lengths = [1 + i * 37 % 100 for i in range(64)]
    small, large = _order(lengths, batch_size=8, accumulation=2), _order(lengths, batch_size=16)
    assert [a + b for a, b in zip(small[::2], small[1::2], strict=True)] == large


def test_loading_draws_nothing_from_the_global_random_state(bert, make_data):
    rows = TaskRows(bert, make_data().task, make_data().train, max_length=32, split="train")
    order = BatchOrder([len(r) for r in rows.items], 4, accumulation=1, seed=0, grouped=True)
    before = torch.get_rng_state()
    assert len(list(RowLoader(rows, order, Collator("classification", 0)))) == 5
    assert torch.equal(before, torch.get_rng_state())


def test_tags_stand_at_the_first_token_of_each_word(bert):
    task = Task(name="t", kind="tagging", template=("words",), label="y", labels=("O", "B-PER", "I-PER"))
    table = [{"words": ["good", "cat", "bad"], "y": ["O", "B-PER", "I-PER"]}, {"words": ["film"], "y": ["B-PER"]}]
    rows = TaskRows(bert, task, table, max_length=32, split="train")
    targets = Collator("tagging", 0)([rows[0], rows[1]])["targets"]
    starts = rows[0].sequences[0].word_starts
    assert targets[0, list(starts)].tolist() == [0, 1, 2]
    assert (targets[0] != IGNORED).sum() == 3
    assert (targets[1] != IGNORED).sum() == 1


def test_a_word_without_tokens_takes_no_place_from_the_next(bert):
    task = Task(name="t", kind="tagging", template=("words",), label="y", labels=("O", "B-PER", "I-PER"))
    rows = TaskRows(
        bert, task, [{"words": ["good", " ", "film"], "y": ["O", "B-PER", "I-PER"]}], max_length=32, split="s"
    )
    assert Collator("tagging", 0)([rows[0]])["targets"].tolist() == [[IGNORED, 0, 2, IGNORED]]


def test_cut_off_words_have_no_target(bert):
    task = Task(name="t", kind="tagging", template=("words",), label="y", labels=("O", "B-PER", "I-PER"))
    rows = TaskRows(bert, task, [{"words": ["good"] * 9, "y": ["O"] * 9}], max_length=5, split="train")
    assert (Collator("tagging", 0)([rows[0]])["targets"] != IGNORED).sum() == 3


def test_errors_name_the_split(bert, make_data):
    task = make_data().task
    with pytest.raises(DataError, match="no validation rows"):
        TaskRows(bert, task, [], max_length=32, split="validation")
    with pytest.raises(DataError, match="train rows of task 'mood', row 2"):
        TaskRows(bert, task, [{"text": "a", "y": "bad"}, {"text": "a", "y": "worse"}], max_length=32, split="train")


def test_rows_longer_than_what_a_run_reads_are_counted(tiny, make_data, quick):
    data, lines = make_data(), []
    numbers = [
        [len(tiny.tokenizer(row["text"])["input_ids"]) for row in rows] for rows in (data.train, data.validation)
    ]
    long = [sum(number > 6 for number in of_split) for of_split in numbers]
    assert min(long) > 0
    says = (
        f"{long[0]} of 20 training rows and {long[1]} of 8 validation rows are longer than 6 tokens, and what is "
        f"beyond is not read; max_length (--max-length) raises that, up to the backbone's 40 positions"
    )
    quick(tiny, data, report=lines.append, max_length=6)
    assert lines[0] == says
    jobs = [TrainJob(data=data, method="lora", name="a")]
    train_many(tiny, jobs, report=lines.append, max_length=6, max_steps=1, progress=False)
    assert f"a: {says}" in lines
    lines.clear()
    quick(tiny, data, report=lines.append)
    assert not any("longer than" in line for line in lines)
    lines.clear()
    data.train[0]["text"] *= 40
    quick(tiny, data, report=lines.append, max_length=500)  # what no setting raises
    assert lines[0] == (
        "1 of 20 training rows are longer than 40 tokens, and what is beyond is not read; the backbone's 40 positions "
        "leave no more"
    )
