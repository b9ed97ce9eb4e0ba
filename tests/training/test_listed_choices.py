"""Multiple choices whose rows have their choices in a list, so that rows differ in how many there are."""

import pytest
import torch

from multitune import Bank, LoRA, Task, TaskData, TrainJob, evaluate, train, train_many
from multitune.heads import IGNORED, Head, by_row, loss
from multitune.training.data import Collator, TaskRows
from multitune.training.model import TuningModel

WORDS = ["good", "bad", "film", "the", "not", "very", "cat", "dog"]
TASK = Task(name="pick", kind="multiple_choice", template=("{text} so",), label="y", choices=("{options}",))


def rows(count: int, seed: int, most: int = 5) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    def text() -> str:
        return " ".join(WORDS[number(0, len(WORDS))] for _ in range(number(2, 6)))

    found = []
    for _ in range(count):
        options = [f"{text()} {place}" for place in range(number(2, most + 1))]
        found.append({"text": text(), "options": options, "y": sorted({number(0, len(options)) for _ in range(2)})})
    return found


def test_the_loss_is_that_of_all_right_choices_together():
    values = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.5, -torch.inf]], requires_grad=True)
    targets = torch.tensor([[1, 0, 1], [0, 1, IGNORED]])
    head = Head(kind="multiple_choice", num_outputs=1)
    found = loss(head, values, targets)
    first, second = values[0].softmax(0), values[1, :2].softmax(0)
    expected = -(torch.log(first[0] + first[2]) + torch.log(second[1])) / 2
    torch.testing.assert_close(found, expected)
    (got,), (wanted,) = (torch.autograd.grad(x, values, retain_graph=True) for x in (found, expected))
    torch.testing.assert_close(got, wanted)
    assert bool(torch.isfinite(got).all())


def test_with_one_right_choice_it_is_the_cross_entropy():
    values, head = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        Head(kind="multiple_choice", num_outputs=1),
    )
    answers = torch.tensor([2, 0, 1, 1])
    torch.testing.assert_close(loss(head, values, torch.nn.functional.one_hot(answers, 3)), loss(head, values, answers))


def test_logits_of_sequences_become_rows():
    targets = torch.tensor([[0, 1, IGNORED], [1, 0, 0], [1, IGNORED, IGNORED]])
    found = by_row(torch.arange(6.0), 1, targets)
    inf = float("inf")
    assert found.tolist() == [[0, 1, -inf], [2, 3, 4], [5, -inf, -inf]]
    assert by_row(torch.arange(6.0), 3, None).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_batch_says_which_choices_of_each_row_are_right(bert):
    table = [
        {"text": "a", "options": ["x", "y", "z"], "y": ["z", "x"]},
        {"text": "b", "options": ["x", "y"], "y": "y"},
    ]
    batch = Collator(TASK.kind, bert.pad_id)(TaskRows(bert, TASK, table, max_length=16, split="train").items)
    assert batch["targets"].tolist() == [[1, 0, 1], [0, 1, IGNORED]]
    assert len(batch["input_ids"]) == 5


def test_a_ragged_batch_is_its_rows_one_by_one(bert, random_params, close):
    head, method = Head.for_task(TASK), LoRA()
    model = TuningModel(bert, method, random_params(bert, method), head, head.init(bert, torch.Generator()))
    model.eval()
    items = TaskRows(bert, TASK, rows(6, seed=0), max_length=32, split="train").items
    collate = Collator(TASK.kind, bert.pad_id)
    assert len({len(item.sequences) for item in items}) > 1
    batch = model(**collate(items))
    alone = [model(**collate([item])) for item in items]
    close(batch["loss"], torch.stack([one["loss"] for one in alone]).mean())
    for row, item, one in zip(batch["logits"], items, alone, strict=True):
        close(row[: len(item.sequences)], one["logits"][0])
        assert bool((row[len(item.sequences) :] == -torch.inf).all())


def test_a_list_trains_as_columns_do(tiny, make_data, quick, same_tensors):
    data = make_data("multiple_choice")

    def listed(table: list[dict]) -> list[dict]:
        return [{"text": r["text"], "options": [r["one"], r["two"], r["three"]], "y": r["y"]} for r in table]

    as_lists = TaskData(task=TASK, train=listed(data.train), validation=listed(data.validation))
    runs = [quick(tiny, d, "lora", max_steps=6, learning_rate=1e-2) for d in (data, as_lists)]
    assert [e["eval_accuracy"] for e in runs[0].history if "eval_loss" in e] == [
        e["eval_accuracy"] for e in runs[1].history if "eval_loss" in e
    ]
    for name, tensor in runs[0].adapter.params.items():
        torch.testing.assert_close(runs[1].adapter.params[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_served_scores_are_those_of_training(method, tiny, quick, tmp_path):
    data = TaskData(task=TASK, train=rows(20, seed=1), validation=rows(9, seed=2))
    result = quick(tiny, data, method, tmp_path / "out", max_steps=4, learning_rate=1e-2)
    scores = evaluate(tiny, tmp_path / "out", data)
    assert scores == pytest.approx({k: v for k, v in result.adapter.metrics.items() if k != "loss"})
    bank = Bank(tiny)
    bank.add("pick", tmp_path / "out")
    row = {"text": "good film", "options": ["cat", "dog", "the bad", "very"]}
    (answer,) = bank.predict([("pick", row)])
    assert set(answer.probabilities) == {"0", "1", "2", "3"} and answer.logits.shape == (4,)


def test_a_grouped_metric_chooses_the_best_tensors(tiny, quick, tmp_path):
    task = Task(
        name="answers",
        kind="classification",
        template=("question", "answer"),
        label="y",
        labels=("no", "yes"),
        metric="f1a_and_em",
        group=("question",),
    )
    words = [f"{a} {b}" for a in WORDS[:4] for b in WORDS]
    table = [{"question": w.split()[0], "answer": w, "y": int("film" in w or i % 3 == 0)} for i, w in enumerate(words)]
    data = TaskData(task=task, train=table, validation=table[::2])
    result = quick(tiny, data, "lora", tmp_path / "out", max_steps=4, learning_rate=1e-2)
    assert result.metric == "f1a_and_em" and {"f1a", "question_em"} <= set(result.adapter.metrics)
    scores = evaluate(tiny, tmp_path / "out", data)
    assert scores == pytest.approx({k: v for k, v in result.adapter.metrics.items() if k != "loss"})


def test_rows_with_lists_train_beside_others_as_alone(tiny, make_data):
    data = TaskData(task=TASK, train=rows(12, seed=3), validation=rows(5, seed=4))
    settings = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "progress": False}
    alone = train(tiny, data, "lora", **settings)
    jobs = [TrainJob(data=data, method="lora"), TrainJob(data=make_data(), method="bitfit")]
    together, _ = train_many(tiny, jobs, **settings)
    assert together.best_metric == pytest.approx(alone.best_metric)
    for name, tensor in alone.adapter.params.items():
        torch.testing.assert_close(together.adapter.params[name], tensor, rtol=1e-3, atol=1e-5)
