"""Fixtures of all tests."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.problems import Problem, make_problem


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine make tensors of this size forty times slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def no_figures():
    """Runs in this process draw none: they would take most of the time, where they are not what is tested."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nbmix.output.results.draw", lambda *_: {})
        yield


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
