"""What is going on, and who hears it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nbmix.core.settings import MixtureSettings
from nbmix.progress import Count, Step, is_heard, listening, say
from nbmix.starts.random import RandomStart
from tests.helpers.running import small_data


def test_the_innermost_listener_hears_it():
    outer, inner = [], []
    say("nobody listens")
    with listening(outer.append):
        say("reading")
        with listening(inner.append):
            say("fitting", 1, 3, state="well")
        say("drawing", has_ended=True)
    assert not is_heard()
    assert outer == [Step("reading"), Step("drawing", has_ended=True)]
    assert inner == [Step("fitting", 1, 3, "well")]


def test_steps_are_counted_from_any_thread():
    steps = []
    with listening(steps.append), ThreadPoolExecutor(4) as pool:
        count = Count("searching", 100)
        for _ in range(100):
            pool.submit(count)
        pool.shutdown()
    assert [step.done for step in steps] == list(range(101))
    assert all(step[0::2] == ("searching", 100, False) for step in steps)


def test_the_search_for_a_start_counts_to_its_end():
    data, steps = small_data(), []
    with listening(steps.append):
        start = RandomStart(n_starts=2, max_cells=60)
        start(data, MixtureSettings(2, n_groups=2), np.random.default_rng(0))
    assert len(steps) > 5
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert 0.7 < steps[-1].done / steps[-1].total <= 1
