"""Processes of their own that have imported everything already, which takes longer than what they do.

They come from a server without threads: one forked from the tests waits forever for the OpenMP threads of a
fit that they have made before.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only

from tests.helpers.running import NO_PICTURES, ROOT

SECONDS = 300  # in which a fit of a few epochs ends on any machine
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "tests.helpers.faults", "nbmix.app.main"])
OF_OTHERS = ("HYDRA_", "NBMIX_", "WANDB_", "SLURM_")  # what the environment may say about other runs


def apart(work: Callable[..., Any], *arguments: Any) -> int:
    """Do something in a process of its own, which it may end; the status, below 0 for a signal.

    Args:
        work: a function of a module, so that it can be sent.
        arguments: its own.
    """
    process = _begin(work, *arguments)
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{work.__name__} took more than {SECONDS} s")
    return process.exitcode


def train(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python train.py`` with these words, in such a process; pictures are left to other tests."""
    (done,) = train_together([environment], *arguments)
    return done


def train_together(
    environments: Sequence[dict[str, str]], *arguments: str
) -> list[subprocess.CompletedProcess[str]]:
    """The same command in several processes at a time, as torchrun or SLURM start them; all end if one fails.

    Args:
        environments: that of each, beside what all have.
        arguments: of train.py.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(rank) for rank in range(len(environments))]
        begun = [
            _begin(_train, arguments, environment, output)
            for environment, output in zip(environments, outputs, strict=True)
        ]
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and any(process.exitcode is None for process in begun):
            connection.wait([p.sentinel for p in begun if p.exitcode is None], until - time.monotonic())
            if any(process.exitcode for process in begun):
                break  # the others would wait for it
        for process in begun:
            process.kill()
            process.join()
        return [
            subprocess.CompletedProcess(
                arguments, process.exitcode, *(Path(f"{output}.{fd}").read_text() for fd in (1, 2))
            )
            for process, output in zip(begun, outputs, strict=True)
        ]


def _begin(work: Callable[..., Any], *arguments: Any) -> Any:
    process = SERVER.Process(target=_with_threads, args=(torch.get_num_threads(), work, *arguments))
    process.start()
    return process


def _with_threads(n_threads: int, work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(n_threads)
    work(*arguments)


def _train(arguments: Sequence[str], environment: dict[str, str], output: Path) -> None:
    """Become ``python train.py``, with stdout and stderr in ``output``.1 and .2, and without pictures."""
    for fd in (1, 2):
        os.dup2(os.open(f"{output}.{fd}", os.O_WRONLY | os.O_CREAT), fd)
    for name in [name for name in os.environ if name.startswith(OF_OTHERS)]:
        del os.environ[name]
    os.environ |= {"OMP_NUM_THREADS": "1"} | environment
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))  # read when Python began
    torch.set_num_threads(1)
    # Lightning has read it when it was imported
    rank_zero_only.rank = int(environment.get("RANK", environment.get("SLURM_PROCID", "0")))
    os.chdir(ROOT)
    sys.argv = ["train.py", *arguments, NO_PICTURES]
    try:
        runpy.run_path("train.py", run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves them out
