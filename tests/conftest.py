"""Fixtures of all tests."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.problems import Problem, make_problem


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine make tensors of this size forty times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
