"""What is in an HDF5 file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np


def content(path: Path) -> dict[str, tuple]:
    """Type, shape, attributes and bytes of everything in a file, by its name."""
    found = {}

    def keep(name, item):
        attributes = {key: np.asarray(value).tolist() for key, value in item.attrs.items()}
        if isinstance(item, h5py.Dataset):
            value = item[()]
            as_bytes = value.tobytes() if item.dtype.kind != "O" else np.asarray(value).tolist()
            found[name] = (item.dtype, item.shape, item.chunks, item.compression, attributes, as_bytes)
        else:
            found[name] = (attributes,)

    with h5py.File(path) as file:
        file.visititems(keep)
    return found
