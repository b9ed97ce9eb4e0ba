"""Things done side by side: all of them once, in order, and nothing left behind when one fails."""

import threading
import time

import pytest
import torch

from multitune.training.lanes import Lanes


@pytest.fixture
def four_threads():
    """As on a machine that gives torch four threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_what_is_found_stands_in_the_order_of_the_items(count):
    def slow(number):
        time.sleep(0.002 * (number % 3))
        return number, threading.current_thread().name

    with Lanes(count) as lanes:
        for items in (range(12), range(1), range(0), range(3)):
            found = lanes.map(slow, items)
            assert [number for number, _ in found] == list(items)
            assert len({name for _, name in found}) <= count


def test_lanes_run_at_the_same_time():
    both = threading.Barrier(2, timeout=20)  # broken unless two are in it together
    with Lanes(2) as lanes:
        assert sorted(lanes.map(lambda _: both.wait(), range(2))) == [0, 1]


def test_each_lane_has_its_share_of_torchs_threads(four_threads):
    wait = threading.Barrier(2, timeout=20)

    def threads(_):
        wait.wait()
        return threading.current_thread().name, torch.get_num_threads()

    seen = []
    with Lanes(2) as lanes:
        found = dict(lanes.map(threads, range(2)))
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
    assert len(found) == 2 and set(found.values()) == {2}
    assert torch.get_num_threads() == 4 and seen == [4]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["the caller's lane", "another lane"])
def test_after_a_failure_nothing_runs_and_nothing_begins(error, where, four_threads):
    main, begun, ended = threading.current_thread(), [], []
    both = threading.Barrier(2, timeout=20)

    def work(number):
        begun.append(number)
        if len(begun) <= 2:
            both.wait()
        if (threading.current_thread() is main) == (where == "the caller's lane"):
            raise error
        time.sleep(0.05)
        ended.append(number)

    with Lanes(2) as lanes:
        with pytest.raises(type(error)):
            lanes.map(work, range(50))
        count = len(begun)
        assert torch.get_num_threads() == 4 and len(ended) == count - 1
        time.sleep(0.1)
        assert len(begun) == count < 50
        assert lanes.map(str, range(3)) == ["0", "1", "2"]
    assert not [t for t in threading.enumerate() if t.name.startswith("multitune-pass")]
