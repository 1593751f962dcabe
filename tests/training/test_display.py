"""What goes on: a table on a terminal, plain lines elsewhere, nothing where nobody asked."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys

import pytest

import nbmix
from nbmix.errors import InputError
from nbmix.progress import is_heard, say
from nbmix.training.display import lines_in_log_files, progress_shown
from tests.helpers.running import ROOT, TINY, run_here

CALLS = [
    ("reading", {}),
    ("fit", {"done": 1, "total": 100}),
    ("fit", {"done": 10, "total": 100, "state": "converged after 10 iterations", "has_ended": True}),
    ("drawing", {"done": 0, "total": 2}),
    ("drawing", {"done": 1, "total": 2}),
]


def test_colours_that_are_forced_make_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_shown():
        say("reading")
    assert capsys.readouterr() == ("", "")


def test_lines():
    everywhere, elsewhere = [], []
    with progress_shown(everywhere.append, elsewhere.append):
        for phase, step in CALLS:
            say(phase, **step)
    assert everywhere == ["reading", "fit", "fit converged after 10 iterations", "drawing"]
    assert elsewhere == everywhere
    assert not is_heard()


def test_it_is_shown_once_and_ends_with_an_error(capsys):
    lines, inner = [], []
    with pytest.raises(InputError), progress_shown(lines.append), progress_shown(inner.append):
        say("reading", state="half of it")
        raise InputError("no counts")
    assert lines == ["reading", "reading half of it"] and not inner
    assert not is_heard()
    assert capsys.readouterr() == ("", "")


SCRIPT = f"""
import logging, sys
from nbmix.progress import say
from nbmix.training.display import progress_shown
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
with progress_shown():
    for phase, step in {CALLS!r}:
        say(phase, **step)
    logging.getLogger("a").info("a line of the log")
print("after")
"""


def on_a_terminal(script):
    """What a script writes to a terminal of 120 columns."""
    outer, inner = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=inner, stderr=inner, stdin=inner, env=environment) as process:
        os.close(inner)
        written = b""
        while True:
            try:
                part = os.read(outer, 65536)
            except OSError:  # how Linux says that nobody writes any more
                break
            if not part:
                break
            written += part
    os.close(outer)
    assert process.returncode == 0
    return written.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="has no such terminals")
def test_on_a_terminal_phases_stay_and_bars_are_full():
    last = on_a_terminal(SCRIPT).rpartition("a line of the log")[2]
    rows = [row for row in last.splitlines() if "0:00:" in row][-3:]
    for row, words in zip(rows, ("reading", "fit", "drawing"), strict=True):
        assert words in row
    assert "converged after 10 iterations" in rows[1] and "10/100" not in rows[1]
    assert last.rstrip().endswith("after")


def test_a_notebook_shows_a_table(monkeypatch):
    """As IPython's display says it."""
    shown = []

    class Handle:
        def update(self, table):
            shown.append(table)

    class ZMQInteractiveShell:
        """As the kernel of a notebook calls its shell."""

    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: Handle())
    with progress_shown():
        for phase, step in CALLS:
            say(phase, **step)
    text = shown[-1]._repr_mimebundle_([], [])["text/plain"]
    assert "converged after 10 iterations" in text and "drawing" in text


def test_log_files_get_plain_lines(tmp_path, capsys):
    root, stream = logging.getLogger(), io.StringIO()
    handlers = [logging.FileHandler(tmp_path / "a.log"), logging.StreamHandler(stream)]
    for handler in handlers:
        root.addHandler(handler)
    try:
        run_here(tmp_path / "run", *TINY, "evaluation.pictures=[]", "trainer.max_epochs=30")
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
    text = (tmp_path / "a.log").read_text()
    assert all(c.isprintable() or c == "\n" for c in text)
    phases = ["reading cells", "searching for a start", "fit", "assigning cells", "writing result.h5ad"]
    lines = text.splitlines()
    assert [line for line in lines if line in phases] == phases
    assert sum(line.startswith("fit converged after ") for line in lines) == 1
    assert not any(line in stream.getvalue().splitlines() for line in phases)
    err = capsys.readouterr().err.splitlines()
    assert [line for line in err if line.startswith("fit")] == [
        line for line in lines if line.startswith("fit ")
    ]


def test_verbose_in_python(capsys):
    counts = nbmix.simulate(n=60, p=40, k=2, seed=1).counts
    settings = {"n_components": 2, "start": "kmeans", "folds": 3}
    quiet = nbmix.NBMixture(**settings).fit(counts)
    assert capsys.readouterr() == ("", "")
    loud = nbmix.NBMixture(**settings, verbose=True).fit(counts)
    out, err = capsys.readouterr()
    assert out == "" and all(c.isprintable() or c == "\n" for c in err)
    assert [line[10:] for line in err.splitlines()][:3] == [
        "reading cells",
        "searching for a start",
        "fit",
    ]
    assert f"fit converged after {loud.n_iter_} iterations; objective" in err
    assert (loud.log_mean_ == quiet.log_mean_).all()


def test_lines_go_to_no_terminal(capsys):
    lines_in_log_files("quiet")
    assert capsys.readouterr() == ("", "")
