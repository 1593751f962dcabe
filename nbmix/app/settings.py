"""What kind of value each setting takes, checked before any work.

Modules check what they need themselves; here a text in place of a number is said in the user's words, before
it becomes a comparison of a text with a number somewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from nbmix.errors import InputError

OBJECTS = ("trainer", "data", "model", "start", "logger")

GROUPS = (*OBJECTS, "callbacks", "evaluation")

SUBGROUPS = ("model.m_step", "start.inner")  # where there are any


class Kind(NamedTuple):
    """Values that a setting takes.

    Attributes:
        types: of Python.
        words: what they are, for a message.
        least, most: of a number.
        optional: it may be null.
    """

    types: tuple[type, ...]
    words: str
    least: float = -math.inf
    most: float = math.inf
    optional: bool = False


def whole(least: float, most: float = math.inf, optional: bool = False) -> Kind:
    return Kind((int,), "a whole number", least, most, optional)


def number(least: float = -math.inf, most: float = math.inf) -> Kind:
    return Kind((int, float), "a number", least, most)


ABOVE_0 = math.nextafter(0, 1)

RATE = number(ABOVE_0)

FLAG = Kind((bool,), "true or false")

TEXT = Kind((str,), "a text")

NAME = Kind((str,), "a text (write a number that is one as '\"1\"')", optional=True)

LARGEST_SEED = 2**32 - 1

OF_START = {
    **{name: whole(1) for name in ("n_starts", "max_cells", "max_genes", "n_cells", "iterations")},
    **{name: whole(1) for name in ("n_pcs", "n_init", "folds", "refine_cells")},
    **{name: whole(0) for name in ("n_axes", "random_every")},
    "surplus": number(0),
    "log_inv_disp": number(),
    "path": TEXT,
    "use": TEXT,
}

KINDS: dict[str, Kind] = {
    "task": TEXT,
    "seed": whole(0, LARGEST_SEED),
    "ckpt_path": NAME,
    "overwrite": FLAG,
    "optimized_metric": TEXT,
    "output_dir": TEXT,
    "evaluation.max_umap_cells": whole(0),
    "search.n_trials": whole(1),
    "search.n_jobs": whole(1),
    "trainer.gpus": whole(-1),
    **{f"trainer.{name}": whole(1) for name in ("processes", "num_nodes", "max_epochs")},
    **{
        f"data.{name}": whole(1)
        for name in ("n_cells", "n_genes", "n_components", "min_counts", "batch_size")
    },
    **{f"data.{name}": whole(0, LARGEST_SEED) for name in ("seed", "simulation_seed")},
    **{f"data.{name}": NAME for name in ("path", "layer", "label_key", "prior_key", "gene_symbol_key")},
    **{f"data.{name}": NAME for name in ("size_factor_key", "cache_dir", "genome", "feature_type")},
    **{f"data.{name}": FLAG for name in ("backed", "extra_poisson")},
    "data.mixture": TEXT,
    "data.populations": Kind((list,), "a list of labels, as in [a,b]", optional=True),
    "data.size_factor": RATE,
    "data.subsample": whole(1, optional=True),
    "data.validation_share": number(0, math.nextafter(1, 0)),
    **{f"model.{name}": whole(1) for name in ("folds", "patience", "n_hidden", "n_latent", "n_draws")},
    **{f"model.{name}": whole(0) for name in ("encoder_epochs", "start_epochs", "kl_epochs")},
    **{
        f"model.{name}": RATE
        for name in ("tolerance", "lr", "components_lr", "m_step.lr", "m_step.tolerance")
    },
    **{f"model.{name}": TEXT for name in ("weights", "dtype", "size_factors")},
    "model.weight_precision": number(0),
    "model.train_components": FLAG,
    **{f"model.m_step.{name}": whole(1) for name in ("max_steps", "num_epochs")},
    **{f"start.{name}": kind for name, kind in OF_START.items()},
    **{f"start.inner.{name}": kind for name, kind in OF_START.items()},
    "logger.offline": FLAG,
    "logger.save_dir": TEXT,
}


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for the first setting whose value is of another kind than it takes.

    Args:
        config: plain values in nested dicts, as a config has them; settings that are not there are left out.
    """
    for group in (*GROUPS, *SUBGROUPS):
        found, value = _value(config, group)
        if not isinstance(value, Mapping) and (found or group in GROUPS):
            raise InputError(f"{group}={_shown(value)}: is a group of settings; name one that is in conf/")
        if group in OBJECTS and not isinstance(value.get("_target_"), str):
            raise InputError(f"{group}={_shown(value)}: has no _target_; name one of conf/{group}/")
    for name, callback in config["callbacks"].items():
        if not isinstance(callback, Mapping):
            raise InputError(
                f"callbacks.{name}={_shown(callback)}: must be settings; ~callbacks.{name} drops it"
            )
    for key, kind in KINDS.items():
        found, value = _value(config, key)
        if found and value != "???":  # which Hydra names itself
            check_value(key, value, kind)


def check_value(key: str, value: Any, kind: Kind) -> None:
    """Raise ``InputError`` unless ``value`` is of that kind; ``key`` is the setting."""
    if value is None and kind.optional:
        return
    if not isinstance(value, kind.types) or (isinstance(value, bool) and bool not in kind.types):
        raise InputError(f"{key}={_shown(value)}: must be {kind.words}{' or null' if kind.optional else ''}")
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise InputError(f"{key}={_shown(value)}: must be finite")
        if value < kind.least:
            words = "above 0" if kind.least == ABOVE_0 else f"{kind.least:g} or more"
            raise InputError(f"{key}={_shown(value)}: must be {words}")
        if value > kind.most:
            words = "below 1" if kind.most < 1 else f"at most {kind.most:.0f}"
            raise InputError(f"{key}={_shown(value)}: must be {words}")


def _value(config: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False, None
        value = value[name]
    return True, value


def _shown(value: Any) -> str:
    """As it is on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
