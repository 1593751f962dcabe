"""GPUs and processes, as Lightning wants to hear it; refusals before any work."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.accelerators import CPUAccelerator, CUDAAccelerator
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.connectors import data_connector

from nbmix.errors import InputError
from nbmix.models.mixture_em import MixtureEM
from nbmix.training.trainer import build_trainer
from tests.helpers.running import fit, small_data


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gpus": 2}, r"trainer\.gpus=2: GPUs that torch finds on this machine: 0"),
        ({"gpus": -1}, r"trainer\.gpus=-1: .*trainer\.gpus=0 for the CPU"),
        ({"gpus": -2}, r"trainer\.gpus=-2: must be -1 or more"),
        ({"processes": 0}, r"trainer\.processes=0"),
        ({"num_nodes": 0}, r"trainer\.num_nodes=0"),
        ({"max_epochs": 0}, r"trainer\.max_epochs=0"),
        ({"processes": 2, "multirun": True}, r"torchrun.*submitit"),
        ({"num_nodes": 2, "multirun": True}, r"one device a trial"),
    ],
)
def test_refuses_in_one_line(settings, words):
    with pytest.raises(InputError, match=words) as refused:
        build_trainer(**settings)
    assert "\n" not in str(refused.value)


def test_processes_are_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"trainer\.processes=2 is for the CPU"):
        build_trainer(gpus=1, processes=2)


def test_a_sweep_over_several_gpus_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"-m with 2 processes a trial: .*one device.*torchrun.*submitit"):
        build_trainer(gpus=2, multirun=True)


def test_one_process_on_the_cpu_by_default():
    trainer = build_trainer(enable_checkpointing=False)
    assert isinstance(trainer.accelerator, CPUAccelerator)
    assert (trainer.world_size, trainer.max_epochs, trainer.logger) == (1, 100, None)


def test_a_sweep_may_run_one_process_a_trial():
    assert build_trainer(multirun=True, enable_checkpointing=False).world_size == 1


def test_several_processes_talk_by_gloo():
    trainer = build_trainer(processes=2, enable_checkpointing=False)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy.process_group_backend == "gloo"
    assert trainer.world_size == 2


def test_no_advice_on_cores_and_gpus_that_is_not_ours(monkeypatch):
    """Lightning's, on machines of four cores and more and with a GPU; pytest makes an error of a warning."""
    monkeypatch.setattr(data_connector, "suggested_max_num_workers", lambda n_devices: 15)
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    data = small_data()
    model = MixtureEM(data.gene_names, n_components=2)
    fit(model, data, epochs=2)
    assert model.n_iterations == 2
