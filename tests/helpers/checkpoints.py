"""Settings and checkpoints that somebody has broken, at random places of their structure.

``python -m tests.helpers.checkpoints N [SEED [KIND ...]]`` starts N runs of each kind, settings and
checkpoints, or of those named, and says what came of them. The tests start a few.

A run has to end with finite numbers, or be refused in one line as bad input, and soon. What a checkpoint is
refused for is its checksum, so half of those that are broken get a new one, as if somebody had meant it.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from nbmix.app.command import is_bad_input, one_line
from nbmix.app.run import run
from nbmix.data.checkpoint import CHECKSUM, SECTION, write_checkpoint
from tests.helpers.running import NO_PICTURES, TINY, configure

SECONDS = 120  # of the processor, that a run may take; each takes one or two
SMALL = (*TINY, NO_PICTURES, "data.batch_size=20", "trainer.max_epochs=3")
MODELS = {
    "em": (*SMALL, "model.folds=2"),
    "amortized": (*SMALL, "model=amortized", "start=kmeans"),
}
STRANGE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 7, 0.5, -0.5, 1e-30, 1e30, math.nan, math.inf, -math.inf),
    *("abc", "", "1", "auto", "1-2", "null", "\n", "\x1b[31m", "/", "last"),
    *([], [1], ["a", None], {}, {"a": 1}),
)
# of settings that name files, code or devices; nothing is learned from what they may do by design
LEFT_ALONE = ("_target_", "output_dir", "dirpath", "save_dir", "default_root_dir", "ckpt_path", "num_nodes")
LEFT_ALONE_TOO = ("gpus", "processes", "logger.version")


class Broken(NamedTuple):
    """A run that something is wrong with."""

    what: str
    settings: tuple[str, ...]
    change: Callable[[Any], None]  # of the config
    may_run: bool = True


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in nested dicts and lists, containers included."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def somewhere(value: Any, rng: np.random.Generator) -> tuple[Any, ...]:
    """A place that is found level by level, so that many of a kind are not all that is found."""
    path: tuple[Any, ...] = ()
    while isinstance(value, dict | list) and value and (not path or rng.random() < 0.8):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        path = (*path, keys[int(rng.integers(len(keys)))])
        value = value[path[-1]]
    return path if path[-1] != CHECKSUM else path[:-1]


def put(container: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        container = container[key]
    container[path[-1]] = value


def look(container: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        container = container[key]
    return container


@functools.cache
def composed(settings: tuple[str, ...]) -> DictConfig:
    return configure("logger=csv", *settings)


# Settings


def broken_settings(rng: np.random.Generator) -> Broken:
    """One or two settings of another value."""
    settings = MODELS[str(rng.choice(list(MODELS)))]
    plain = OmegaConf.to_container(composed(settings))
    changed: dict[tuple[Any, ...], Any] = {}
    own = [p for p in places(plain) if not any(w in ".".join(map(str, p)) for w in LEFT_ALONE)]
    own = [p for p in own if not ".".join(map(str, p)).endswith(LEFT_ALONE_TOO)]
    for _ in range(int(rng.integers(1, 3))):
        path = own[rng.integers(len(own))]
        if not any(path[: len(other)] == other for other in changed):
            changed[path] = STRANGE[rng.integers(len(STRANGE))]

    def change(cfg: Any) -> None:
        for path, value in changed.items():
            OmegaConf.update(cfg, ".".join(map(str, path)), copy.deepcopy(value), merge=False)

    return Broken(f"{changed}", settings, change)


# Checkpoints


def broken_checkpoint(rng: np.random.Generator, good: dict[str, Path], path: Path) -> Broken:
    """One value of a checkpoint lost, or another one; half of them with a checksum that is right."""
    model = str(rng.choice(list(good)))
    content = torch.load(good[model], weights_only=True)
    content = {**content, "state_dict": dict(content["state_dict"])}
    place = somewhere(content, rng)
    value = look(content, place)
    if rng.random() < 0.2 and isinstance(place[-1], str):
        del look(content, place[:-1])[place[-1]]
        what = "deleted"
    else:
        now = _strange_tensor(value, rng) if isinstance(value, torch.Tensor) else None
        now = STRANGE[rng.integers(len(STRANGE))] if now is None else now
        put(content, place, copy.deepcopy(now))
        what = f"{now!r:.60}"
    sealed = bool(rng.random() < 0.5) and isinstance(content.get(SECTION), dict)
    if sealed:
        write_checkpoint(content, path)
    else:
        torch.save(content, path)
    same = "deleted" not in what and _equal(value, look(content, place))
    return Broken(
        f"{model}: {place} {what}{' sealed' if sealed else ''}",
        MODELS[model],
        lambda cfg: OmegaConf.update(cfg, "ckpt_path", str(path)),
        may_run=sealed or same,
    )


def _strange_tensor(value: torch.Tensor, rng: np.random.Generator) -> torch.Tensor | None:
    ways: list[Callable[[], torch.Tensor | None]] = [
        lambda: None,
        lambda: value[None],
        lambda: value.reshape(-1)[:-1],
        lambda: torch.zeros_like(value),
        lambda: value.to(torch.float16),
        lambda: value.to(torch.complex64),
        lambda: torch.full_like(value.double(), math.nan),
        lambda: torch.full_like(value.double(), math.inf),
        lambda: value * -1000 if value.dtype != torch.bool else value,
    ]
    return ways[rng.integers(len(ways))]()


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return type(one) is type(two) and repr(one) == repr(two)


def good_checkpoints(folder: Path) -> dict[str, Path]:
    """Of each model, from the first of three epochs."""
    for model, settings in MODELS.items():
        run(configure("logger=csv", *settings, "trainer.max_epochs=1", folder=folder / model))
    return {model: folder / model / "checkpoints" / "last.ckpt" for model in MODELS}


# What comes of it


def outcome(broken: Broken, folder: Path) -> str:
    """ "ran" or "refused", or what is wrong with how the run ended."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {SECONDS} s, or waits for something")

    cfg = copy.deepcopy(composed(broken.settings))
    cfg.output_dir = str(folder)
    before = [signal.signal(number, too_long) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(20 * SECONDS)
    try:
        broken.change(cfg)
        metrics = run(cfg)
    except Exception as error:
        line = one_line(error)
        if is_bad_input(error) and len(line.splitlines()) == 1:
            return "refused"
        return f"{type(error).__name__}: {line}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
    if not broken.may_run:
        return "ran with what is broken"
    return "ran" if all(math.isfinite(v) for v in metrics.values() if isinstance(v, float)) else "not finite"


def outcomes(kind: str, n_cases: int, seed: int, folder: Path) -> Iterator[tuple[str, str]]:
    """What was broken, and what came of it."""
    rng = np.random.default_rng(seed)
    good = good_checkpoints(folder / "good") if kind == "checkpoints" else {}
    for number in range(n_cases):
        path = folder / "broken.ckpt"
        broken = broken_settings(rng) if kind == "settings" else broken_checkpoint(rng, good, path)
        yield broken.what, outcome(broken, folder / str(number))


def main(n_cases: int, seed: int = 0, *kinds: str) -> int:
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wrong = 0
    for kind in kinds or ("settings", "checkpoints"):
        counted: Counter[str] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for what, said in outcomes(kind, n_cases, seed, Path(folder)):
                if said not in ("ran", "refused"):
                    print(f"{kind}, {what}: {said}", flush=True)
                    wrong += 1
                    said = "WRONG"
                counted[said] += 1
        print(kind, dict(counted), flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:]) > 0)
