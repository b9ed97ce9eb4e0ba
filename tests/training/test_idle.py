"""Settings that nothing in a run reads."""

import pytest

from multitune import ConfigError, Task, TrainConfig, TrainJob, train_many
from multitune.tasks import TaskData
from multitune.training.idle import idle_settings, without_idle

WRITE = Task(name="name it", kind="generation", template=("{text} :",), label="answer")
TAG = Task(name="tag", kind="tagging", template=("words",), label="y", labels=("O", "B"))


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"cache_bytes": 10**6}, "give cache_frozen too, or leave it out"),
        ({"eval_new_tokens": 5}, "give eval_texts too, or leave it out"),
        ({"distill_weight": 0.5}, "give distill_examples or distill_instruction too, or leave it out"),
    ],
)
def test_a_part_of_what_was_not_asked_for_is_refused(tiny, make_data, quick, setting, why):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"training setting {name}=.*{why}"):
        quick(tiny, make_data(), "lora", **setting)


@pytest.mark.parametrize(
    ("task", "idle"), [(WRITE, {"pooling", "head_dropout"}), (TAG, {"pooling"})], ids=["generation", "tagging"]
)
def test_settings_of_a_head_are_idle_where_it_does_not_read_them(make_backbone, task, idle):
    backbone = make_backbone("gpt2")
    config = TrainConfig(pooling="mean", head_dropout=0.3, epochs=2)
    assert set(idle_settings(backbone, task, config)) == idle
    left = without_idle(backbone, task, config)
    assert idle_settings(backbone, task, left) == {} and left.epochs == 2
    assert left.head_dropout == (0.1 if "head_dropout" in idle else 0.3)


def test_a_writing_task_refuses_settings_of_a_head(make_backbone, quick):
    data = TaskData(
        task=WRITE, train=[{"text": "x", "answer": "y"}], validation=[{"text": "x", "answer": "y"}], test=None
    )
    with pytest.raises(
        ConfigError,
        match="pooling='mean' makes one vector of a text, and task 'name it' of kind generation has no head",
    ):
        quick(make_backbone("gpt2"), data, "lora", pooling="mean")


def test_jobs_that_share_settings_leave_out_what_is_idle_and_refuse_their_own(tiny, make_data):
    data = make_data()
    shared = dict(max_steps=1, progress=False, eval_new_tokens=5)
    (done,) = train_many(tiny, [TrainJob(data=data, method="lora")], **shared)
    assert done.adapter.recipe["eval_new_tokens"] == TrainConfig.eval_new_tokens
    with pytest.raises(ConfigError, match="job 'a': training setting eval_new_tokens=5 is the length"):
        train_many(tiny, [TrainJob(data=data, method="lora", name="a", settings={"eval_new_tokens": 5})], max_steps=1)
