"""Fit a mixture, or apply one: ``python train.py model=em data=mix4 data.path=counts.h5ad``."""

import sys

import hydra
from omegaconf import DictConfig

from nbmix.app.command import one_line_errors
from nbmix.app.words import readable


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    with one_line_errors():
        from nbmix.app.main import main as run  # here: help and --cfg do without torch

        return run(cfg)


if __name__ == "__main__":
    with one_line_errors(whole_process=True):
        sys.argv[1:] = readable(sys.argv[1:])
        main()
