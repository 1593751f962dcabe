"""Broken settings and checkpoints end a run in one line, or do not matter."""

from __future__ import annotations

import pytest
import torch

from nbmix.app.run import run
from nbmix.data.checkpoint import write_checkpoint
from nbmix.errors import InputError
from tests.helpers.checkpoints import MODELS, good_checkpoints, outcomes, put
from tests.helpers.running import configure


@pytest.mark.filterwarnings("default")  # of the libraries, about what is broken
@pytest.mark.parametrize("kind", ["settings", "checkpoints"])
def test_random_damage(kind, tmp_path):
    said = list(outcomes(kind, 10, seed=0, folder=tmp_path))
    assert [case for case in said if case[1] not in ("ran", "refused")] == []
    assert "refused" in dict(said).values()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return good_checkpoints(tmp_path_factory.mktemp("good"))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "model, place, value",
    [
        ("em", ("em", "objective"), 1e-30),  # is first used at the end of an epoch
        ("em", ("em", "assigned"), torch.zeros(60, dtype=torch.float16)),
        ("amortized", ("optimizer_states", 0, "state", 1, "exp_avg"), []),  # Adam says all that it has
        ("amortized", ("optimizer_states", 0, "param_groups", 0, "weight_decay"), "/"),
    ],
)
def test_what_a_checkpoint_brings_is_used_in_the_first_epoch(model, place, value, good, tmp_path):
    content = torch.load(good[model], weights_only=True)
    put(content, place, value)
    write_checkpoint(content, tmp_path / "broken.ckpt")
    cfg = configure("logger=csv", *MODELS[model], folder=tmp_path / "run")
    cfg.ckpt_path = str(tmp_path / "broken.ckpt")
    with pytest.raises(InputError, match="is damaged, or of another version of nbmix") as refused:
        run(cfg)
    assert len(str(refused.value)) < 400
