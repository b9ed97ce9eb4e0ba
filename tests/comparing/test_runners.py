"""Other processes: the same scores there, and nothing lost when one is killed."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

from multitune import MultituneError, compare
from multitune.comparing.run import load
from multitune.comparing.runners import make_runner

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_processes_give_what_one_process_gives(recipe, tmp_path, contents):
    given = recipe(methods={"lora": {"r": [2, 4]}, "ptuning_v2": {"length": 2}, "full": {}}, seeds=1)
    one = compare(given, tmp_path / "one")
    two = compare(given, tmp_path / "two", runner="processes", workers=2)
    assert contents(two.records) == contents(one.records)


def test_an_error_in_a_process_comes_out_of_it(recipe, tmp_path):
    (tmp_path / "missing").mkdir()
    plan = load(recipe(seeds=1))
    runner = make_runner(
        "processes", plan.backbone, str(tmp_path / "missing"), workers=1, max_jobs=None, token_budget=None, passes=None
    )
    try:
        with pytest.raises(MultituneError, match="cannot load backbone"):
            runner.run(plan.finals(), lambda job, outcome: None, lambda line: None)
    finally:
        runner.close()


def test_a_process_that_is_killed_is_named_and_what_was_finished_is_kept(recipe, tmp_path):
    plan = load(recipe(seeds=1))
    runner = make_runner(
        "processes", plan.backbone, plan.recipe.backbone, workers=1, max_jobs=None, token_budget=None, passes=None
    )
    done = []

    def watch(job, outcome):
        done.append(job.trial.key)
        runner._workers[0].process.kill()

    try:
        with pytest.raises(MultituneError, match="a process ended with code -9 in the trial of"):
            runner.run(plan.finals(), watch, lambda line: None)
    finally:
        runner.close()
    assert len(done) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_kills_lose_nothing_and_repeat_nothing(values, moods, tmp_path):
    pytest.importorskip("optuna", reason="the extra [compare] is not installed")
    spec = importlib.util.spec_from_file_location("kill_compare", ROOT / "benchmarks" / "kill_compare.py")
    kill_compare = importlib.util.module_from_spec(spec)
    sys.modules["kill_compare"] = kill_compare
    spec.loader.exec_module(kill_compare)
    given = values(methods={"lora": {"r": [1, 2, 4]}, "bitfit": {}}, search={"trials": 2}, seeds=4)
    verdict = kill_compare.killed(given, tmp_path, kills=3, seed=0)
    del sys.modules["kill_compare"]
    assert verdict.kills == 3 and verdict.trials == 9
    assert verdict.differing == () and verdict.repeated == ()


@pytest.fixture
def cluster(monkeypatch):
    """A local Ray cluster of two nodes with a processor each."""
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    yield ray
    ray.shutdown()
    made.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own, about its settings and the files it leaves open
def test_a_cluster_of_two_nodes_gives_what_one_process_gives(cluster, recipe, tmp_path, contents):
    given = recipe(methods={"lora": {"r": [2, 4]}, "bitfit": {}}, seeds=1)
    deadline = time.monotonic() + 60
    while cluster.cluster_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len([n for n in cluster.nodes() if n["Alive"]]) == 2
    one = compare(given, tmp_path / "one")
    nodes = compare(given, tmp_path / "cluster", runner="ray")
    assert contents(nodes.records) == contents(one.records)
    again = []
    compare(given, tmp_path / "cluster", runner="ray", watch=lambda p: again.append(p.known))
    assert all(again) and len(again) == 3
