"""Nothing is lost: a run that is stopped anywhere goes on to the bits of an undisturbed one."""

import json
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from multitune import Adapter, AdapterError, ConfigError, LoRA, PromptTuning, get_method

SETTINGS = dict(epochs=3, max_steps=None, evaluations_per_epoch=2)  # 20 rows, batches of 8: 3 steps an epoch


def _no_pickle(folder: Path) -> None:
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files and {p.suffix for p in files} <= {".json", ".safetensors"}, files


@pytest.mark.parametrize("after", [4, 9, 12, 15])
@pytest.mark.parametrize("name", ["lora", "full", "sift"])
def test_resumed_equals_undisturbed(name, after, tiny, make_data, quick, same_tensors, tmp_path, stopping):
    data, method = make_data(), get_method(name)
    whole = quick(tiny, data, method(), tmp_path / "whole", **SETTINGS)
    with pytest.raises(stopping.error):
        quick(tiny, data, stopping(method, after)(), tmp_path / "broken", **SETTINGS)
    assert not tiny.model.training and not (tmp_path / "broken" / "adapter.json").exists()
    _no_pickle(tmp_path / "broken")
    assert len(list((tmp_path / "broken").glob("checkpoints/step-*"))) <= 2
    resumed = quick(tiny, data, method(), tmp_path / "broken", **SETTINGS)
    same_tensors(whole.adapter, resumed.adapter)
    assert resumed.history == whole.history
    assert (resumed.best_step, resumed.best_metric) == (whole.best_step, whole.best_metric)
    assert resumed.adapter.metrics == whole.adapter.metrics
    assert not (tmp_path / "broken" / "checkpoints").exists()


def test_a_regression_goes_on_in_its_unit_and_with_no_other(tiny, make_data, quick, same_tensors, tmp_path, stopping):
    data = make_data("regression")
    cents = replace(data, train=[row | {"y": 100 * row["y"]} for row in data.train])
    whole = quick(tiny, data, LoRA(), tmp_path / "whole", **SETTINGS)
    with pytest.raises(stopping.error):
        quick(tiny, data, stopping(LoRA, 9)(), tmp_path / "broken", **SETTINGS)
    with pytest.raises(ConfigError, match="train_rows|head.target_"):
        quick(tiny, cents, LoRA(), tmp_path / "broken", **SETTINGS)
    resumed = quick(tiny, data, LoRA(), tmp_path / "broken", **SETTINGS)
    same_tensors(whole.adapter, resumed.adapter)
    assert resumed.adapter.head == whole.adapter.head and resumed.adapter.head.rescales
    assert resumed.history == whole.history


@pytest.mark.parametrize("after", [10, 13])
def test_accumulation_and_early_stopping_survive_a_stop(
    after, tiny, make_data, quick, same_tensors, tmp_path, stopping
):
    settings = SETTINGS | dict(gradient_accumulation=2, batch_size=4, early_stopping=3, scheduler="cosine", epochs=6)
    whole = quick(tiny, make_data(), PromptTuning(), tmp_path / "whole", **settings)
    with pytest.raises(stopping.error):
        quick(tiny, make_data(), stopping(PromptTuning, after)(), tmp_path / "broken", **settings)
    resumed = quick(tiny, make_data(), PromptTuning(), tmp_path / "broken", **settings)
    same_tensors(whole.adapter, resumed.adapter)
    assert resumed.history == whole.history


@pytest.mark.parametrize("after", [0, 30, 45])
def test_of_equal_scores_the_lowest_loss_is_kept_also_after_a_stop(
    after, tiny, make_data, quick, same_tensors, tmp_path, stopping
):
    data, settings = make_data(validation=2), SETTINGS | dict(epochs=8, evaluations_per_epoch=3, learning_rate=3e-3)
    whole = quick(tiny, data, LoRA(), tmp_path / "whole", **settings)
    judged = [e for e in whole.history if "eval_accuracy" in e]
    tied = [e for e in judged if e["eval_accuracy"] == whole.best_metric]
    best = min(tied, key=lambda e: (e["eval_loss"], -e["step"]))
    assert whole.best_metric == max(e["eval_accuracy"] for e in judged)
    assert whole.best_step == best["step"] != tied[0]["step"]
    assert whole.adapter.metrics["loss"] == best["eval_loss"]
    if after:
        with pytest.raises(stopping.error):
            quick(tiny, data, stopping(LoRA, after)(), tmp_path / "broken", **settings)
        resumed = quick(tiny, data, LoRA(), tmp_path / "broken", **settings)
        assert resumed.best_step == whole.best_step
        same_tensors(whole.adapter, resumed.adapter)


def test_patience_counts_from_the_metric_and_not_from_the_loss(tiny, make_data, quick):
    settings = SETTINGS | dict(epochs=8, evaluations_per_epoch=3, early_stopping=4)
    result = quick(tiny, make_data(validation=2), LoRA(), **settings)
    judged = [e for e in result.history if "eval_accuracy" in e]
    first = next(i for i, e in enumerate(judged) if e["eval_accuracy"] == result.best_metric)
    assert len(judged) == first + 1 + 4


def test_a_run_killed_after_its_last_step_only_publishes(tiny, make_data, quick, same_tensors, tmp_path, stopping):
    out = tmp_path / "out"
    whole = quick(tiny, make_data(), LoRA(), out, keep_checkpoints=True, **SETTINGS)
    run_file = out / "checkpoints" / "run.json"
    run = json.loads(run_file.read_text())
    assert run["finished"] is True
    run_file.write_text(json.dumps(run | {"finished": False}))
    (out / ".curve.png.x1y2").write_text("half a picture")
    (out / "adapter.json").unlink()  # as if killed just before it was written
    again = quick(tiny, make_data(), stopping(LoRA, 1)(), out, **SETTINGS)  # one call finds the prompt's length
    same_tensors(whole.adapter, again.adapter)
    assert again.history == whole.history
    assert {p.name for p in out.iterdir()} == {"adapter.json", "adapter.safetensors", "curve.png", "history.json"}


_SCRIPT = """
import sys
import torch
from multitune import Backbone, load_task, train
from multitune.tasks import TaskData

def run(backbone, out):
    data = load_task("demo/sentiment")
    data = TaskData(task=data.task, train=data.train.select(range(32)), validation=data.validation.select(range(8)))
    settings = dict(epochs=4, batch_size=8, max_length=12, evaluations_per_epoch=4)
    return train(backbone, data, "bitfit", out, progress=False, **settings)

if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Backbone.load("minilm"), sys.argv[1])
"""


def test_sigkill_loses_nothing(minilm, one_thread, same_tensors, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(_SCRIPT)
    broken = tmp_path / "broken"
    process = subprocess.Popen([sys.executable, str(script), str(broken)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(broken.glob("checkpoints/step-*4")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "adapter.json").exists()
    run = runpy.run_path(str(script))["run"]
    resumed, whole = run(minilm, broken), run(minilm, tmp_path / "whole")
    same_tensors(resumed.adapter, whole.adapter)
    assert (broken / "history.json").read_text() == (tmp_path / "whole" / "history.json").read_text()


def test_a_finished_adapter_is_not_overwritten_by_accident(tiny, make_data, quick, tmp_path):
    first = quick(tiny, make_data(), "lora", tmp_path / "out")
    with pytest.raises(ConfigError, match="holds a finished adapter.*overwrite=True"):
        quick(tiny, make_data(), "lora", tmp_path / "out")
    again = quick(tiny, make_data(), "head", tmp_path / "out", overwrite=True)
    assert Adapter.load(tmp_path / "out", tiny).method == again.adapter.method != first.adapter.method


def test_a_stopped_overwrite_leaves_the_old_adapter(tiny, make_data, quick, same_tensors, tmp_path, stopping):
    first = quick(tiny, make_data(), "lora", tmp_path / "out")
    with pytest.raises(stopping.error):
        quick(tiny, make_data(), stopping(LoRA, 5)(), tmp_path / "out", overwrite=True, seed=1, **SETTINGS)
    same_tensors(Adapter.load(tmp_path / "out", tiny), first.adapter)


def test_an_unfinished_run_of_other_settings_is_refused_by_name(tiny, make_data, quick, tmp_path, stopping):
    out = tmp_path / "out"
    with pytest.raises(stopping.error):
        quick(tiny, make_data(), stopping(LoRA, 5)(), out, **SETTINGS)
    with pytest.raises(AdapterError, match="unfinished training run.*give its train command again"):
        Adapter.load(out)
    with pytest.raises(ConfigError, match=r"other settings: learning_rate is 0.003 there and 0.5 here.*overwrite=True"):
        quick(tiny, make_data(), LoRA(), out, learning_rate=0.5, **SETTINGS)
    with pytest.raises(ConfigError, match=r"method\.r is 8 there and 2 here"):
        quick(tiny, make_data(), LoRA(r=2), out, **SETTINGS)
    with pytest.raises(ConfigError, match="train_rows"):
        quick(tiny, make_data(train=21), LoRA(), out, **SETTINGS)
    assert quick(tiny, make_data(), LoRA(r=2), out, overwrite=True, **SETTINGS).adapter.method == LoRA(r=2)


def test_a_folder_of_something_else_is_left_alone(tiny, make_data, quick, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"thesis\.txt"):
            quick(tiny, make_data(), "lora", tmp_path, overwrite=overwrite)
    with pytest.raises(ConfigError, match="is a file"):
        quick(tiny, make_data(), "lora", tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_named(tiny, make_data, quick, tmp_path, stopping):
    out = tmp_path / "out"
    with pytest.raises(stopping.error):
        quick(tiny, make_data(), stopping(LoRA, 5)(), out, **SETTINGS)
    last = sorted(out.glob("checkpoints/step-*"))[-1] / "state.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    with pytest.raises(AdapterError, match=r"state\.safetensors is not the file that was saved"):
        quick(tiny, make_data(), LoRA(), out, **SETTINGS)
    last.write_bytes(content[:50])
    with pytest.raises(AdapterError, match="damaged"):
        quick(tiny, make_data(), LoRA(), out, **SETTINGS)


def test_kept_checkpoints_are_the_last_and_the_best(tiny, make_data, quick, tmp_path):
    result = quick(tiny, make_data(), "lora", tmp_path / "out", keep_checkpoints=True, **SETTINGS)
    kept = {int(p.name[5:]) for p in (tmp_path / "out" / "checkpoints").glob("step-*")}
    assert kept == {result.best_step, result.num_steps}
    _no_pickle(tmp_path / "out" / "checkpoints")
