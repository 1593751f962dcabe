"""Settings as arguments: what messages say where a setting was given in Python."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nbmix.errors import InputError


@contextmanager
def settings_as_arguments(renamed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Messages with settings as they are written in Python: layer='counts', not data.layer=counts.

    Args:
        renamed: settings whose arguments have another name, such as tolerance -> tol.
    """
    try:
        yield
    except InputError as error:
        names = renamed or {}
        message = re.sub(r"\bdata\.layer=(\w+)", r"layer='\1'", str(error))
        message = re.sub(r"\b(?:data|model)\.(\w+)", lambda found: names.get(found[1], found[1]), message)
        raise InputError(message.replace("=null", "=None")) from error.__cause__
