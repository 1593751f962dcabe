"""Where train.py enters."""

from __future__ import annotations

from tests.helpers.apart import train


def test_a_search_is_not_swept(tmp_path):
    done = train("-m", "sweep=optuna", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == "error: search: runs its trials itself; leave out -m\n"
