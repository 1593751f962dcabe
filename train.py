"""Fit a mixture, or apply one: ``python train.py model=em data=mix4 data.path=counts.h5ad``."""

import gc
import sys

import hydra
from omegaconf import DictConfig

from nbmix.app.command import one_line_errors
from nbmix.app.words import readable


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> float | None:
    with one_line_errors():
        from nbmix.app.main import main as run  # here: help and --cfg do without torch

        if not gc.isenabled():
            gc.freeze()  # what modules hold stays to the end, and no search for garbage goes through it
            gc.enable()
        return run(cfg)


if __name__ == "__main__":
    gc.disable()  # until all is imported: a million objects, in which a search for garbage finds nothing
    with one_line_errors(whole_process=True):
        sys.argv[1:] = readable(sys.argv[1:])
        main()
