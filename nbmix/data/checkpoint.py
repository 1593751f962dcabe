"""Checkpoints read back without executing anything, and genes matched by name."""

from __future__ import annotations

import io
import logging
import os
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nbmix.core.parameters import Components
from nbmix.data.whole_file import whole_file
from nbmix.errors import InputError

SECTION = "nbmix"  # where a checkpoint holds what Lightning does not know of

CHECKSUM = "checksum"  # of all the rest, in that section

UNREADABLE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, OSError, LookupError, TypeError, ValueError),
    *(AttributeError, MemoryError),
)

log = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """What nbmix needs of a checkpoint file.

    Attributes:
        model: its ``kind``, see ``nbmix.models.base``.
        settings: plain keyword arguments of the model.
        gene_names: (genes,) of the components.
        median_size_factor: of the cells that were fitted.
        cells: fingerprint of the cells that were fitted, in their order.
        state: tensors by name.
        choice: of the number of components, where it was left open; see ``nbmix.starts.choice``.
        groups: the joins of the components to groups, and these, see ``MixtureModule.joined_plain``; None
            before they are joined, and where each is a group.
        sealed: the file has a checksum, and it is right.
        origin_names: batches that the fit knows the offsets of.
    """

    model: str
    settings: dict[str, Any]
    gene_names: np.ndarray
    median_size_factor: float
    cells: str
    state: dict[str, torch.Tensor]
    choice: dict[str, Any] | None = None
    groups: dict[str, Any] | None = None
    sealed: bool = False
    origin_names: tuple[str, ...] = ()

    @property
    def section(self) -> dict[str, Any]:
        """What the file says of the model beside its tensors, in plain values."""
        return {
            "model": self.model,
            "settings": self.settings,
            "gene_names": self.gene_names.tolist(),
            "median_size_factor": self.median_size_factor,
            "cells": self.cells,
            "choice": self.choice,
            "groups": self.groups,
        } | ({"batches": list(self.origin_names)} if self.origin_names else {})

    @property
    def components(self) -> Components:
        """The components fitted to all cells, (K, genes)."""
        return Components(self.state["mixture.log_mean"][-1], self.state["mixture.log_inv_disp"][-1])

    @property
    def log_weights(self) -> torch.Tensor:
        """(K,) ln pi of these."""
        return self.state["mixture.log_weights"][-1]


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write ``content`` with a checksum of it, whole or not at all.

    A path that ends in ".part" is written as it is, for a later ``nbmix.data.whole_file.commit``.
    """
    sealed = {**content, SECTION: {**content[SECTION], CHECKSUM: checksum(content)}}
    buffer = io.BytesIO()  # a disk that is full in the midst of torch.save would end the process
    torch.save(sealed, buffer)
    if path.suffix == ".part":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getbuffer())
        return
    with whole_file(path) as part:
        part.write_bytes(buffer.getbuffer())


def update_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the settings and groups of ``checkpoint`` into a file of the same fit; one of another stays."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    shapes, theirs = (
        {name: value.shape for name, value in state.items()}
        for state in (checkpoint.state, content["state_dict"])
    )
    if content[SECTION]["cells"] != checkpoint.cells or shapes != theirs:
        return
    content[SECTION] |= {"settings": checkpoint.settings, "groups": checkpoint.groups}
    write_checkpoint(content, path)


def checksum(value: Any, crc: int = 0) -> int:
    """CRC-32 of plain values and tensors, in dicts and lists of any depth; that of a seal is left out."""
    if isinstance(value, torch.Tensor):
        crc = zlib.crc32(f"{value.dtype}{tuple(value.shape)}".encode(), crc)
        if not value.numel():  # whose strides may be any, which view refuses
            return crc
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return zlib.crc32(content.numpy().data, crc)
    if isinstance(value, Mapping):
        crc = zlib.crc32(f"dict{len(value) - (CHECKSUM in value)}".encode(), crc)
        for key, inner in value.items():
            if key != CHECKSUM:
                crc = checksum(inner, zlib.crc32(repr(key).encode(), crc))
        return crc
    if isinstance(value, list | tuple):
        crc = zlib.crc32(f"list{len(value)}".encode(), crc)
        if all(isinstance(inner, str) for inner in value):  # the same as below, in a tenth of the time
            return zlib.crc32("".join(map(repr, value)).encode(errors="backslashreplace"), crc)
        for inner in value:
            crc = checksum(inner, crc)
        return crc
    return zlib.crc32(repr(value).encode(errors="backslashreplace"), crc)


def load_checkpoint(path: str | os.PathLike[str], setting: str = "ckpt_path") -> Checkpoint:
    """Read a checkpoint with ``weights_only=True``.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint of nbmix.
    """
    where = f"{setting}={path}"
    if not Path(path).is_file():
        raise InputError(f"{where}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        section = content[SECTION]
        seal = section.get(CHECKSUM)
        if seal is not None and seal != checksum(content):
            raise ValueError("checksum")
        return checked_checkpoint(
            Checkpoint(
                section["model"],
                section["settings"],
                np.array(section["gene_names"]),
                section["median_size_factor"],
                section["cells"],
                content["state_dict"],
                section.get("choice"),
                section.get("groups"),
                seal is not None,
                tuple(section.get("batches", ())),
            )
        )
    except UNREADABLE:
        raise InputError(
            f"{where}: is not a checkpoint of nbmix, or is damaged; give one of its .ckpt files"
        ) from None


def checked_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """Itself.

    Raises:
        TypeError, ValueError: what it holds is not what a fit has written.
    """
    for value, kind in (
        (checkpoint.model, str),
        (checkpoint.settings, dict),
        (checkpoint.median_size_factor, float),
        (checkpoint.cells, str),
        (checkpoint.state, dict),
        *((tensor, torch.Tensor) for tensor in checkpoint.state.values()),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{type(value)} in place of {kind}")
    if checkpoint.gene_names.ndim != 1 or checkpoint.gene_names.dtype.kind != "U":
        raise ValueError("genes without names")
    for name, tensor in checkpoint.state.items():
        if tensor.isnan().any() or (name.startswith("mixture.log_") and tensor.isinf().any()):
            raise ValueError(f"{name} is not finite")
    return checkpoint


def align_to_genes(theirs: np.ndarray, ours: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the shared genes in ``theirs`` and in ``ours``, in the order of ``theirs``.

    Logs how many of ``theirs`` are missing.

    Raises:
        InputError: no gene is shared.
    """
    place = {gene: position for position, gene in enumerate(ours.tolist())}
    found = [(i, place[gene]) for i, gene in enumerate(theirs.tolist()) if gene in place]
    if not found:
        raise InputError(
            f"{where}: was fitted to other genes (such as {str(theirs[0])!r}; the data has "
            f"{str(ours[0])!r}); give data with the same gene names"
        )
    if missing := len(theirs) - len(found):
        known = {i for i, _ in found}
        names = [theirs[i] for i in range(len(theirs)) if i not in known][:5]
        log.warning(
            "%s: %d of its %d genes are missing in the data and are left out (%s%s)",
            where,
            missing,
            len(theirs),
            ", ".join(names),
            ", ..." if missing > 5 else "",
        )
    pairs = np.array(found)
    return pairs[:, 0], pairs[:, 1]
