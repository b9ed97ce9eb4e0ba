"""Evaluation by written texts: the finished adapter's own texts, the best of them kept, nothing else changed."""

from dataclasses import replace

import pytest

from multitune import Bank, ConfigError, DataError, LoRA, Task, TrainConfig, TrainJob, get_method, train_many
from multitune.generation import evaluate_texts
from multitune.tasks import TaskData

WRITE = Task(name="echo", kind="generation", template=("{text} :",), label="y", metric="rouge_l", format="plain")
WORDS = ["good", "bad", "film", "the", "not", "very"]
ROWS = [{"text": f"{a} {b}", "y": f"{b} {a}"} for a in WORDS for b in WORDS if a != b]
VALIDATION = [
    {"text": "good film", "y": "film good"},
    {"text": "the very bad film", "y": ["film bad very", "film bad"]},
    {"text": "good film", "y": "film"},
    {"text": "not the film", "y": "the not"},
]
SETTINGS = dict(
    max_steps=None,
    epochs=3,
    evaluations_per_epoch=2,
    learning_rate=0.05,
    max_length=24,
    eval_texts=3,
    eval_new_tokens=5,
)


@pytest.fixture
def llama(make_backbone, one_thread):
    return make_backbone("llama", tie_word_embeddings=True)


@pytest.fixture
def data():
    return TaskData(task=WRITE, train=ROWS, validation=VALIDATION)


@pytest.mark.parametrize("name", ["lora", "prefix", "aot_fc", "prompt", "full", "pissa"])
def test_the_score_is_that_of_the_finished_adapter(name, llama, data, quick):
    task = replace(WRITE, metric="chrf")  # of characters, so that other texts have other scores
    bare = evaluate_texts(Bank(llama), None, VALIDATION, {"max_new_tokens": 5}, task=task)
    result = quick(llama, replace(data, task=task), get_method(name)(), **SETTINGS | dict(epochs=1))
    bank = Bank(llama)
    bank.add("it", result.adapter)
    served = evaluate_texts(bank, "it", VALIDATION, {"max_new_tokens": 5})
    assert [row.text for row in served.rows] != [row.text for row in bare.rows]
    assert len(served.rows) == 3 and served.rows[0].references == ("film good", "film")
    assert result.metric == "chrf"
    assert result.best_metric == pytest.approx(served.scores["chrf"], abs=1e-12)
    assert set(result.adapter.metrics) == {"loss", "perplexity", "chrf"}


def test_the_best_texts_are_kept_and_not_the_lowest_perplexity(llama, data, quick):
    settings = SETTINGS | dict(epochs=6, seed=1)
    unwritten = settings | dict(eval_texts=0, eval_new_tokens=64)
    by_text, by_loss = (quick(llama, data, LoRA(), **s) for s in (settings, unwritten))
    assert by_loss.metric == "perplexity" and "rouge_l" not in by_loss.adapter.metrics
    judged = {e["step"]: e for e in by_text.history if "eval_rouge_l" in e}
    assert len(judged) == 12
    best = max(judged.values(), key=lambda e: (e["eval_rouge_l"], -e["eval_loss"]))
    assert (by_text.best_step, by_text.best_metric) == (best["step"], best["eval_rouge_l"])
    assert by_loss.best_step == min(judged.values(), key=lambda e: e["eval_loss"])["step"] != by_text.best_step
    plain = [{k: v for k, v in e.items() if "rouge" not in k} for e in by_text.history]
    assert plain == by_loss.history  # writing draws no random number and changes no tensor


def test_a_run_that_was_stopped_ends_as_one_that_was_not(llama, data, quick, stopping, same_tensors, tmp_path):
    whole = quick(llama, data, LoRA(), tmp_path / "whole", **SETTINGS)
    with pytest.raises(stopping.error):
        quick(llama, data, stopping(LoRA, 16)(), tmp_path / "broken", **SETTINGS)
    assert list((tmp_path / "broken").glob("checkpoints/step-*"))
    resumed = quick(llama, data, LoRA(), tmp_path / "broken", **SETTINGS)
    same_tensors(whole.adapter, resumed.adapter)
    assert resumed.history == whole.history and resumed.adapter.metrics == whole.adapter.metrics


def test_jobs_that_train_together_are_judged_as_alone(llama, data, quick, same_tensors):
    alone = quick(llama, data, LoRA(), **SETTINGS)
    jobs = [TrainJob(data=data, method=LoRA(), name="a"), TrainJob(data=data, method="bitfit", name="b")]
    config = TrainConfig(progress=False, batch_size=8)
    together, _ = train_many(llama, jobs, config=config, **SETTINGS)
    assert together.metric == "rouge_l" and together.best_step == alone.best_step
    assert together.adapter.metrics == pytest.approx(alone.adapter.metrics, rel=1e-4)


def test_long_prompts_lose_their_front_as_when_served(llama, quick):
    rows = [{"text": "bad " * 30 + "film", "y": "film"}]
    data = TaskData(task=WRITE, train=ROWS, validation=rows)
    with pytest.warns(UserWarning, match="front"):
        result = quick(llama, data, LoRA(), **SETTINGS | dict(epochs=1))
    bank = Bank(llama)
    bank.add("it", result.adapter)
    with pytest.warns(UserWarning, match="cut off"):
        served = evaluate_texts(bank, "it", rows, {"max_new_tokens": 5})
    assert result.best_metric == pytest.approx(served.scores["rouge_l"], abs=1e-12)


def test_checkpointing_and_mixed_precision_write_too(llama, data, quick):
    plain = quick(llama, data, LoRA(), **SETTINGS | dict(epochs=1))
    recomputed = quick(llama, data, LoRA(), gradient_checkpointing=True, **SETTINGS | dict(epochs=1))
    assert recomputed.best_metric == plain.best_metric
    assert quick(llama, data, LoRA(), precision="bf16", **SETTINGS | dict(epochs=1)).metric == "rouge_l"


@pytest.mark.parametrize(
    ("metric", "settings", "message"),
    [
        ("perplexity", dict(eval_texts=3), "perplexity judges no texts.*--metric rouge_l"),
        ("rouge_l", dict(eval_texts=-1), "eval_texts=-1 is not possible; give at least 0"),
        ("rouge_l", dict(eval_texts=2, eval_new_tokens=100_000), "no room for a prompt.*lower it"),
    ],
)
def test_what_cannot_be_is_refused(metric, settings, message, llama, quick):
    task = Task.from_dict({**WRITE.to_dict(), "metric": metric})
    with pytest.raises(ConfigError, match=message):
        quick(llama, TaskData(task=task, train=ROWS, validation=VALIDATION), LoRA(), **settings)


def test_a_prompt_without_room_is_named(llama, data, quick):
    settings = SETTINGS | dict(eval_new_tokens=llama.max_length - 1)
    with pytest.raises(DataError, match="validation prompt 0: not a word of its prompt fits.*eval_new_tokens"):
        quick(llama, data, LoRA(), **settings)


def test_other_kinds_write_nothing(bert, make_data, quick):
    with pytest.raises(ConfigError, match="eval_texts=2 is for generation, and task 'mood' is of kind"):
        quick(bert, make_data(), "lora", eval_texts=2)
