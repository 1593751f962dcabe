"""The run folder: each file whole or not at all, and one run at a time."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nbmix.app.command import one_line
from nbmix.errors import InputError
from nbmix.training.trainer import is_first_rank

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Have a folder to oneself; the system frees it when the process ends, however it does.

    Raises:
        InputError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"hydra.run.dir={folder}: another run is at work in this folder; wait for its end, or choose "
            "another folder"
        ) from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before the release: nobody can hold a file that is gone
        lock.release()


class KeepResults(Callback):
    """Hydra's callback that refuses a folder before anything is written to it.

    That is one in which another run is at work, or which holds the results of other settings, unless
    ``overwrite`` is set or the run goes on from a checkpoint of that folder.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {}  # launchers send it to other processes along with trials; the folder is held in this one

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._check(Path(config.hydra.run.dir), config, ".hydra/config.yaml", hold="search" in config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._check(Path(config.hydra.sweep.dir), config, "multirun.yaml", hold=True)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        self._held.close()

    on_multirun_end = on_run_end

    def _check(self, folder: Path, config: DictConfig, earlier: str, *, hold: bool) -> None:
        self._held = ExitStack()
        atexit.register(self._held.close)  # a sweep may end the process
        if not is_first_rank() or not (hold or folder.exists()):
            return
        try:
            self._held.enter_context(held(folder))
            refuse_other_results(folder, config, folder / earlier)
        except (InputError, OSError) as error:  # Hydra would make a warning of it
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(2)
        if not hold:  # the run will
            self._held.close()


def refuse_other_results(folder: Path, config: DictConfig, earlier: Path) -> None:
    """Raise ``InputError`` where ``folder`` holds results of other settings than ``config``."""
    if not any((folder / name).exists() for name in ("metrics.json", "sweep.csv")) or config.get("overwrite"):
        return
    given = config.get("ckpt_path")
    goes_on = given == "last" or (given and folder.resolve() in Path(str(given)).resolve().parents)
    if config.get("task") == "fit" and goes_on:
        return
    there = _settings(OmegaConf.load(earlier)) if earlier.is_file() else {}
    now = _settings(config)
    other = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if other:
        known = [key for key in other if key in there]  # an earlier version may have had fewer settings
        example = f" ({known[0]}={there[known[0]]})" if known else f" ({other[0]} was unset)" if there else ""
        raise InputError(
            f"hydra.run.dir={folder}: holds the results of a run with other settings{example}; choose "
            "another folder, or set overwrite=true"
        )


def _own_name(target: str) -> str:
    """Of a class or function of nbmix without the module, which an earlier version may have had elsewhere."""
    return target.rpartition(".")[2] if target.startswith("nbmix.") else target


def _settings(config: Any) -> dict[str, str]:
    """Settings by dotted key, those of a sweep included; without what says how to go on."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    hydra = plain.pop("hydra", {})
    if hydra.get("mode") == RunMode.MULTIRUN.name:
        plain["sweep"] = {"params": hydra["sweeper"].get("params"), "task": hydra["overrides"]["task"]}
    flat: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = _own_name(str(value)) if prefix.endswith("_target_") else str(value)

    add("", plain)
    return {key: value for key, value in flat.items() if key not in ("ckpt_path", "overwrite")}
