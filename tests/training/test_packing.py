"""Rows of a batch that share rows of the forward pass: the run is the one without, step by step."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multitune import (
    MAM,
    AoTFC,
    BitFit,
    ConfigError,
    FullFineTuning,
    Head,
    Houlsby,
    LayerNormTuning,
    LoRA,
    PromptTuning,
    PTuningV1,
    PTuningV2,
    Task,
    TrainConfig,
    TrainJob,
    get_method,
    train_many,
)
from multitune.language_loss import IGNORED
from multitune.tasks import TaskData
from multitune.training.data import Collator, TaskRows
from multitune.training.idle import idle_settings
from multitune.training.model import TuningModel
from multitune.training.packing import together

WRITE = Task(name="name it", kind="generation", template=("{text} :",), label="answer")
ROWS = [
    {"text": "good film", "answer": "good"},
    {"text": "bad bad film x1 not very good the film", "answer": "bad bad"},
    {"text": "the very good film", "answer": ["good", "very good"]},
    {"text": "not", "answer": "bad"},
    {"text": "the film not good the film very bad", "answer": "not good not bad"},
]
DATA = TaskData(task=WRITE, train=ROWS * 3, validation=ROWS, test=None)
RUN = dict(max_steps=3, learning_rate=1e-2, max_length=40, evaluations_per_epoch=1)
METHODS = [LoRA(r=2), AoTFC(r=4), PTuningV2(length=3), BitFit()]


def writer(make_backbone, name):
    tied = {} if name == "gpt2" else {"tie_word_embeddings": True}
    return make_backbone(name, eos_token_id=3, **tied)


def collated(backbone, room=None):
    rows = TaskRows(backbone, WRITE, ROWS, max_length=40, split="train")
    return Collator("generation", backbone.pad_id, room=room)(rows.items)


def same_curve(mine, theirs):
    """Losses and norms of gradients, step by step."""
    assert [e["step"] for e in mine.history] == [e["step"] for e in theirs.history]
    for a, b in zip(mine.history, theirs.history, strict=True):
        for key in b.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert a[key] == pytest.approx(b[key], rel=2e-4), (key, b["step"])
    assert any("grad_norm" in e for e in theirs.history)


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [
        ("llama", LoRA(r=2, targets=("query", "value", "embedding")), {}),
        ("llama", MAM(), {"gradient_checkpointing": True}),
        ("gpt2", AoTFC(r=4), {}),
        ("gpt2", FullFineTuning(), {"label_smoothing": 0.1}),
        ("gpt2", get_method("sift")(density=0.1), {}),  # chooses its entries by gradients of the first batches
        ("qwen2", get_method("ia3")(), {"gradient_accumulation": 2, "batch_size": 4}),
        ("mistral", LayerNormTuning(), {}),  # eager attention, a window in every layer
        ("gemma2", Houlsby(bottleneck=4), {}),
        ("gemma3_text", get_method("u_tuning")(), {"length_grouped": False}),
        ("opt", BitFit(), {}),
        ("opt", PTuningV2(length=3, shift_positions=True), {}),
        ("gpt2", LoRA(r=2, layers=(1,)), {"cache_frozen": "memory"}),
    ],
    ids=lambda value: getattr(value, "name", value if isinstance(value, str) else ""),
)
def test_a_packed_run_is_the_unpacked_one(name, method, more, make_backbone, quick, one_thread):
    backbone, lines = writer(make_backbone, name), []
    packed = quick(backbone, DATA, method, **(RUN | more), packing=True, report=lines.append)
    same_curve(packed, quick(backbone, DATA, method, **(RUN | more)))
    assert packed.cached_bytes > 0 or "cache_frozen" not in more
    assert any(line.startswith("packing: 18 training rows become ") for line in lines)
    assert packed.adapter.recipe["packing"] is True


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_loss_and_gradients_of_a_packed_batch(method, make_backbone, random_params, one_thread):
    backbone = writer(make_backbone, "qwen2")
    model = TuningModel(backbone, method, random_params(backbone, method), Head.for_task(WRITE), {}).eval()
    found = []
    for room in (None, 40):
        batch = collated(backbone, room)
        model.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.own().items() if p.requires_grad}))
    assert len(batch["input_ids"]) < 6 and batch["input_ids"].shape[1] <= 40
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_a_packed_batch_holds_every_row_once_and_asks_for_its_answer(make_backbone):
    backbone = writer(make_backbone, "gpt2")
    items = TaskRows(backbone, WRITE, ROWS, max_length=40, split="train").items
    batch = collated(backbone, 40)
    real = batch["attention_mask"] > 0 if "attention_mask" in batch else torch.ones_like(batch["pieces"]) > 0
    found = []
    for ids, pieces, targets, own in zip(batch["input_ids"], batch["pieces"], batch["targets"], real, strict=True):
        for number in range(int(pieces.max()) + 1):
            text = own & (pieces == number)
            found.append((ids[text].tolist(), targets[text].tolist()))
    assert bool((batch["targets"][~real] == IGNORED).all())
    wanted = [(ids, [IGNORED] * (len(ids) - n) + ids[-n:]) for ids, n in _texts(items)]
    assert sorted(found) == sorted(wanted)


def _texts(items):
    return [(item.sequences[0].input_ids, item.target) for item in items]


def test_rows_that_do_not_share_stay_as_they_are(make_backbone):
    backbone = writer(make_backbone, "gpt2")
    alone, packed = collated(backbone), collated(backbone, 4)
    assert alone.keys() == packed.keys() and all(torch.equal(t, packed[name]) for name, t in alone.items())


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(4, 60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_rows_are_shared_within_the_room_and_never_for_more_padding(lengths, room):
    rows = together(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    widths = [sum(lengths[i] for i in row) for row in rows]
    assert all(width <= max(room, *(lengths[i] for i in row)) for width, row in zip(widths, rows, strict=True))
    assert len(rows) * max(widths) <= len(lengths) * max(lengths)
    if sum(lengths) <= room:
        assert len(rows) == 1


def test_rows_are_few_and_then_narrow():
    assert together([10, 4, 3, 3, 8, 2], 12) == [[0], [1, 2, 3], [4, 5]]
    assert together([6, 6, 1, 1], 100) == [[0, 1, 2, 3]]
    assert together([7, 1, 1, 1, 4], 8) in ([[0], [1, 2, 3, 4]], [[0, 1], [2, 3, 4]])
    assert together([10, 10, 10], 25) == [[0], [1], [2]]  # two rows would hold ten tokens of padding


# -------------------------------------------------------------------- what is said


def test_what_is_saved_is_said_with_numbers_of_the_epoch(make_backbone, quick):
    lines = []
    backbone = writer(make_backbone, "gpt2")
    quick(backbone, DATA, "ia3", **(RUN | {"max_steps": 1}), packing=True, report=lines.append)
    (line,) = [line for line in lines if line.startswith("packing")]
    rows, count, room, after, before, own = (int(w.replace(",", "")) for w in line.split() if w[0].isdigit())
    assert (rows, room) == (18, 40) and count < 18 and after < before and own > 0


def test_packing_that_saves_nothing_says_what_to_raise(make_backbone, quick):
    lines = []
    short = TaskData(task=WRITE, train=ROWS[:1] * 4, validation=ROWS[:1], test=None)
    backbone = writer(make_backbone, "gpt2")
    quick(backbone, short, "ia3", max_length=11, max_steps=1, packing=True, report=lines.append)
    assert any("packing puts no two of 4 training rows together: in batches of 8 rows and 11" in x for x in lines)


# -------------------------------------------------------------------- together with other jobs


def test_packed_jobs_are_as_if_alone_and_others_leave_packing_out(make_backbone, make_data, quick, one_thread):
    backbone = writer(make_backbone, "qwen2")
    shared = RUN | dict(packing=True, batch_size=8, progress=False)
    jobs = [
        TrainJob(data=DATA, method=LoRA(r=2)),
        TrainJob(data=DATA, method=PTuningV2(length=3), settings={"packing": False}),
        TrainJob(data=DATA, method=PromptTuning(length=2), settings={"packing": False}),
        TrainJob(data=make_data(), method=BitFit()),
        TrainJob(data=DATA, method=PromptTuning(length=2), name="refused"),
    ]
    *done, failed = train_many(backbone, jobs, token_budget=5000, **shared)
    for job, mine in zip(jobs, done, strict=False):
        own = shared | {"packing": False}
        same_curve(mine, quick(backbone, job.data, job.method, **own))
    assert [r.adapter.recipe.get("packing") for r in done] == [True, None, None, None]
    assert isinstance(failed.error, ConfigError) and "inserts vectors into a row" in str(failed.error)


# -------------------------------------------------------------------- refused, and what it was called before


@pytest.mark.parametrize("method", [PromptTuning(length=2), PTuningV1(), "lora+prompt"], ids=str)
def test_prompts_are_refused_before_the_first_step(method, make_backbone, quick, tmp_path):
    with pytest.raises(ConfigError, match=r"packing=True: .* inserts vectors into a row.*packing=False"):
        quick(writer(make_backbone, "llama"), DATA, method, tmp_path / "a", packing=True)
    assert not (tmp_path / "a").exists()


def test_what_has_nothing_to_pack_is_refused_by_name(make_backbone, make_data, quick):
    with pytest.raises(ConfigError, match=r"packing=True .*task 'mood' is of kind classification; leave it out"):
        quick(writer(make_backbone, "gpt2"), make_data(), "lora", packing=True)
    with pytest.raises(ConfigError, match=r"packing=True .*'t5/writes' is an encoder-decoder; leave it out"):
        quick(make_backbone("t5/writes"), DATA, "lora", packing=True)
    config = TrainConfig(packing=True, batch_size=1)
    assert "batch_size=1 has one" in idle_settings(writer(make_backbone, "gpt2"), WRITE, config)["packing"]


def test_runs_without_packing_are_those_from_before_there_was_any(make_backbone, quick, stopping, tmp_path):
    assert TrainConfig(packing=True).identity()["packing"] is True
    left_out = TrainConfig().to_dict().keys() - TrainConfig().identity().keys()
    later = {"packing", "distill_instruction", "distill_new_tokens"}
    assert left_out == {*later, "progress", "keep_checkpoints"}
    backbone = writer(make_backbone, "gpt2")
    with pytest.raises(stopping.error):
        quick(backbone, DATA, stopping(LoRA, 5)(), tmp_path / "a", **RUN)
    assert "packing" not in json.loads((tmp_path / "a/checkpoints/run.json").read_text())["settings"]
    with pytest.raises(ConfigError, match=r"other settings: packing is '\(nothing\)' there and True here"):
        quick(backbone, DATA, LoRA(), tmp_path / "a", **RUN, packing=True)
