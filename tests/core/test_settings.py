"""Settings of a mixture."""

from __future__ import annotations

import math

import pytest

from nbmix.core.declared import shown
from nbmix.core.settings import MixtureSettings
from nbmix.errors import InputError


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("n_components", 0),
        ("n_components", -2),
        ("folds", 0),
        ("n_components", "abc"),
        ("n_components", 2.5),
        ("folds", True),
        ("pseudo_cells", -1.0),
        ("pseudo_cells", math.nan),
        ("pseudo_cells", math.inf),
        ("pseudo_cells", "many"),
        ("weights", "equal"),
        ("dtype", "float16"),
    ],
)
def test_an_impossible_setting_is_one_line_that_names_it(setting, value):
    with pytest.raises(InputError, match=f"model.{setting}={shown(value)}") as caught:
        MixtureSettings(**({"n_components": 3} | {setting: value}))
    assert "\n" not in str(caught.value)
