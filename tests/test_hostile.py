"""Broken settings and checkpoints end a run in one line, or do not matter."""

from __future__ import annotations

import pytest

from tests.hostile import outcomes


@pytest.mark.filterwarnings("default")  # of the libraries, about what is broken
@pytest.mark.parametrize("kind", ["settings", "checkpoints"])
def test_random_damage(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("nbmix.evaluation.results.draw", lambda *_: {})  # it would take most of the time
    said = list(outcomes(kind, 10, seed=0, folder=tmp_path))
    assert [case for case in said if case[1] not in ("ran", "refused")] == []
    assert "refused" in dict(said).values()
