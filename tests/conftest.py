"""Fixtures of all tests."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy and scikit-learn read it when they are imported

import pytest
import torch

from tests.helpers.problems import Problem, make_problem


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine make tensors of this size forty times slower.

    The variable above is not enough where a launcher has set another one.
    """
    torch.set_num_threads(1)


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks first: they take longest of all files, and another process has the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
