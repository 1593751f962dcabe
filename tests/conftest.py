"""Fixtures of all tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

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


class LeftOut(logging.Handler):
    """What results were written without since it was last asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if " is left out: " in record.getMessage():
            self.found.append(record.getMessage())

    def take(self) -> list[str]:
        found, self.found = self.found, []
        return found


@pytest.fixture(scope="session")
def left_out_so_far() -> Iterator[LeftOut]:
    handler = LeftOut()
    loggers = [logging.getLogger(f"nbmix.output.{name}") for name in ("scores", "writing")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def nothing_is_left_out(request: pytest.FixtureRequest, left_out_so_far: LeftOut) -> Iterator[None]:
    """A table or picture that fails is a warning to users. Here it is a fault, unless a test says so."""
    yield
    found = left_out_so_far.take()
    assert not found or request.node.get_closest_marker("leaves_out"), found


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks first: they take longest of all files, and another process has the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
