"""Random numbers of runs that take turns in one thread or in several."""

import random
import threading

import numpy as np
import pytest
import torch

from multitune.training.process_state import globals_kept
from multitune.training.streams import RandomStream


@pytest.fixture
def stream():
    """`stream(seed)`: one that begins at a seed."""
    with globals_kept():

        def make(seed):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            return RandomStream(torch.device("cpu"))

        yield make


def _draw(stream):
    with stream.drawing_all():
        return float(torch.rand(())), random.random(), float(np.random.rand())


def test_streams_that_take_turns_draw_what_each_draws_alone(stream):
    alone = []
    for seed in (1, 2):
        own = stream(seed)
        alone.append([_draw(own) for _ in range(3)])
    streams = stream(1), stream(2)
    assert [[_draw(s) for s in streams] for _ in range(3)] == [list(turn) for turn in zip(*alone, strict=True)]


def test_a_stream_that_draws_keeps_other_threads_from_drawing(stream):
    one, two = stream(1), stream(2)
    wanted = [_draw(stream(1)), _draw(stream(2))]
    begun, drawn = threading.Event(), []

    def other():
        begun.set()
        drawn.append(_draw(two))

    thread = threading.Thread(target=other)
    with one.drawing_all():
        thread.start()
        assert begun.wait(20)
        thread.join(0.1)
        assert not drawn  # it waits
        with one.drawing():  # within, the same thread does not
            first = float(torch.rand(()))
        mine = (first, random.random(), float(np.random.rand()))
    thread.join(20)
    assert [mine, *drawn] == wanted
