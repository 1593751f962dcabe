"""Threads that compiled loops share, and how rows are dealt out to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Helpers:
    """Threads that stay and wait for work: to start one takes as long as many a loop."""

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):  # Windows has no forks
            os.register_at_fork(after_in_child=self.forget)  # where they do not exist

    def forget(self) -> None:
        self._lock = Lock()
        self._coming: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._n_threads = 0

    def ask(self, job: Callable[[], None], n_threads: int) -> None:
        """Have up to ``n_threads`` threads do the same job, which must not raise."""
        with self._lock:
            try:
                while self._n_threads < n_threads:
                    Thread(target=self._serve, args=(self._coming,), daemon=True).start()
                    self._n_threads += 1
            except RuntimeError:  # the system gives no more: those that are there will do
                n_threads = self._n_threads
        for _ in range(n_threads):
            self._coming.put(job)

    @staticmethod
    def _serve(coming: SimpleQueue[Callable[[], None]]) -> None:
        while True:
            coming.get()()


HELPERS = Helpers()


def in_threads(work: Callable[[int], T], n_items: int, helpers: Helpers = HELPERS) -> list[T]:
    """``[work(0), work(1), ...]``, on as many threads as torch uses, this one among them.

    For compiled loops; torch, called in ``work``, would keep threads of its own for each of these.
    """
    results: list[Any] = [None] * n_items
    coming = iter(range(n_items))
    failures: list[BaseException] = []
    lock, last_is_done = Lock(), Event()
    n_helping, is_over = 0, False

    def take() -> None:
        try:
            for index in coming:
                results[index] = work(index)
        except BaseException as failure:
            failures.append(failure)
            for _ in coming:  # leave nothing for the others
                pass

    def help_out() -> None:
        nonlocal n_helping
        with lock:
            if is_over:
                return
            n_helping += 1
        take()
        with lock:
            n_helping -= 1
            if is_over and n_helping == 0:
                last_is_done.set()

    n_helpers = min(torch.get_num_threads(), n_items) - 1
    try:
        if n_helpers > 0:
            helpers.ask(help_out, n_helpers)
        take()
    finally:
        # one that has not come has nothing to do, and may never come: it may be waiting for this thread
        with lock:
            is_over = True
            must_wait = n_helping > 0
    if must_wait:
        last_is_done.wait()
    if failures:
        raise failures[0]
    return results


def side_by_side(work: Callable[[int], T], n_items: int) -> list[T]:
    """``in_threads`` for work in which torch computes, each on one thread."""
    n_threads = torch.get_num_threads()

    def alone(index: int) -> T:
        torch.set_num_threads(1)
        return work(index)

    try:
        return in_threads(alone, n_items)
    finally:
        torch.set_num_threads(n_threads)


def over_rows(kernel: Callable[..., None], n_rows: int, rows_at_once: int, *arguments: Any) -> None:
    """Call ``kernel(begin, end, *arguments)`` on ranges that cover ``n_rows``."""

    def part(index: int) -> None:
        kernel(index * rows_at_once, min((index + 1) * rows_at_once, n_rows), *arguments)

    in_threads(part, -(-n_rows // rows_at_once))
