"""What goes on, shown on a terminal or in a notebook, or written as plain lines."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Event, Lock, Thread
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from nbmix.progress import Step, is_heard, listening

SECONDS_A_PICTURE = 0.2  # between two states of a notebook's

Write = Callable[[str], None]


class _Table:
    """A row a phase, with a bar, the time it takes and its state; ended ones stay."""

    def __init__(self, console: Console) -> None:
        whole = Column(no_wrap=True, min_width=7)  # others give way to the state, which is cut
        self.progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=21)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            TextColumn("{task.fields[count]}", table_column=whole.copy()),
            TimeElapsedColumn(table_column=whole.copy()),
            TextColumn(
                "{task.fields[state]}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")
            ),
            console=console,
            expand=True,
        )
        self._task: TaskID

    def begin(self, step: Step) -> None:
        self._task = self.progress.add_task(step.phase, total=step.total, count="", state="")

    def update(self, step: Step) -> None:
        self.progress.update(
            self._task, total=step.total, completed=step.done, count=_count(step), state=step.state
        )

    def end(self, step: Step) -> None:
        """A bar that is full, whatever the phase could have taken."""
        count = "" if step.total is None else f"{step.done:.0f}"
        self.progress.update(self._task, total=1, completed=1, count=count, state=step.state)


class _Notebook(_Table):
    """Such a table below a cell of a notebook, without ipywidgets."""

    def __init__(self, console: Console) -> None:
        from IPython.display import display  # which a notebook has

        super().__init__(console)
        self._handle = display(self.progress.make_tasks_table([]), display_id=True)
        self._next = 0.0
        self._is_over = Event()
        Thread(target=self._tick, daemon=True).start()

    def close(self) -> None:
        self._is_over.set()

    def _tick(self) -> None:
        while not self._is_over.wait(1):  # so that time is seen to pass
            self._show()

    def update(self, step: Step) -> None:
        super().update(step)
        if time.monotonic() >= self._next:
            self._show()

    def end(self, step: Step) -> None:
        super().end(step)
        self._show()

    def _show(self) -> None:
        self._next = time.monotonic() + SECONDS_A_PICTURE
        self._handle.update(self.progress.make_tasks_table(self.progress.tasks))


def _count(step: Step) -> str:
    return "" if step.total is None else f"{int(step.done)}/{int(step.total)}"


class _Display:
    """Listens, and tells a table and whoever writes lines."""

    def __init__(self, table: _Table | None, writers: Sequence[Write]) -> None:
        self._table, self._writers, self._lock = table, writers, Lock()
        self._step: Step | None = None

    def __call__(self, step: Step) -> None:
        with self._lock:
            if self._step is None or step.phase != self._step.phase:
                self._end()
                if self._table is not None:
                    self._table.begin(step)
                self._line(step.phase)
            self._step = step
            if self._table is not None:
                self._table.update(step)
            if step.has_ended:
                self._end()

    def close(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        if self._table is not None:
            self._table.end(step)
        if step.state:
            self._line(f"{step.phase} {step.state}")

    def _line(self, text: str) -> None:
        for write in self._writers:
            write(text)


@contextmanager
def progress_shown(write: Write | None = None, otherwise: Write | None = None) -> Iterator[None]:
    """Show what goes on in a notebook or on the terminal of stderr.

    Where somebody is shown it already, nothing more is.

    Args:
        write: takes plain lines as well: a phase when it begins, and what is known when it ends.
        otherwise: takes them where there is neither notebook nor terminal.
    """
    if is_heard():
        yield
        return
    console = Console(stderr=True)
    with ExitStack() as stack:
        table: _Table | None = None
        if console.is_jupyter:
            table = notebook = _Notebook(console)
            stack.callback(notebook.close)
        elif sys.stderr.isatty() and not console.is_dumb_terminal:  # whatever colours are forced
            table = _Table(console)
            stack.enter_context(table.progress)
            stack.enter_context(_logs_above(console))
        writers = [w for w in (write, None if table is not None else otherwise) if w is not None]
        display = _Display(table, writers)
        stack.callback(display.close)
        stack.enter_context(listening(display))
        yield


@contextmanager
def _logs_above(console: Console) -> Iterator[None]:
    """Have what is logged to the terminal printed above the table, and not into it."""
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    for handler in logging.getLogger().handlers:
        stream = getattr(handler, "stream", None)
        if isinstance(handler, logging.StreamHandler) and stream is not None and stream.isatty():
            moved.append((handler, handler.setStream(sys.stdout)))  # of rich, while the table is shown
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


def lines_on_stderr() -> Write:
    """Prints lines with the seconds since now."""
    began = time.monotonic()
    return lambda text: print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True)


def lines_in_log_files(text: str) -> None:
    """Write a line to the files of the log, and not to the terminal."""
    record = logging.getLogger("nbmix").makeRecord("nbmix", logging.INFO, __file__, 0, text, (), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
