"""Rows for some genes of some origins."""

from __future__ import annotations

import torch

from nbmix.core.origin_genes import OriginGenes


def test_rows_are_gene_by_gene():
    chosen = torch.tensor([[True, False, True], [True, False, False]])
    genes = OriginGenes.where(chosen)
    assert genes.n_rows == 3
    assert genes.first.tolist() == [0, 2, 2, 3]
    assert genes.gene.tolist() == [0, 0, 2] and genes.origin.tolist() == [0, 1, 0]
    assert genes.row.tolist() == [[0, -1, 2], [1, -1, -1]]
    assert chosen[genes.chosen].all() and int(chosen.sum()) == genes.n_rows
