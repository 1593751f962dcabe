"""How far products in float32 are from those in float64: every cell of the large matrix.

    python benchmarks/accuracy.py --data pbmc_facs.h5ad --json accuracy.json

The components are those of a few EM iterations, in float64. Then ln p(x_i | k) is computed in blocks of rows,
as large as the batches of a fit, once with float32 and once with float64 products. Differences are given for
the value, in nats; for the contrast between components, that is the value less that of the cell's best
component, which alone decides the responsibilities; and for these. Some cells are compared with the dense
textbook form in float64 too, which no interpolation or table enters. The matrix is that of scale.py, and kept
in --work.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import common
import sources

SHOWN = (
    ("ln p(x | k), nats", "value"),
    ("its contrast, nats", "contrast"),
    ("responsibility", "responsibility"),
)
FORMS = {
    "float32": "float32 against float64",
    "float64_dense": "float64 against dense float64, {} cells",
    "float32_dense": "float32 against dense float64, {} cells",
}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The one measurement, or the making of its data."""
    if name == "build":
        return sources.build_large(arguments)
    import numpy as np
    import torch

    from nbmix.core.batch import Basis, CellBatch, Precision
    from nbmix.core.folds import fold_blocks
    from nbmix.core.likelihood import component_log_likelihood, dense_component_log_likelihood
    from nbmix.core.tables import batch_log_likelihood, likelihood_tables

    data, _ = sources.read_large(arguments)
    components = fitted(data, arguments)

    def by_products(rows: Any, dtype: Any) -> Any:
        return component_log_likelihood(data.counts[rows], data.size_factors[rows], *components, dtype=dtype)

    differences = Differences()
    # the batches of a default fit: those of like size factors take the shortest way
    blocks = fold_blocks(data.size_factors, 5, arguments.block, np.random.default_rng(arguments.seed))
    dtypes = (torch.float32, torch.float64)
    bases = [Basis.of(data.counts, data.size_factors, Precision.of(dtype)) for dtype in dtypes]
    tables = [
        likelihood_tables(basis, *components, dtype) for basis, dtype in zip(bases, dtypes, strict=True)
    ]
    with torch.no_grad():
        for _, rows in blocks:
            narrow, wide = (
                batch_log_likelihood(
                    CellBatch.build(data.counts, data.size_factors, basis, pick=rows), basis, of_basis
                )
                for basis, of_basis in zip(bases, tables, strict=True)
            )
            differences.add("float32", narrow, wide)
        generator = np.random.default_rng(arguments.seed)
        n_dense = min(arguments.dense_cells, data.n_cells)
        some = np.sort(generator.choice(data.n_cells, n_dense, replace=False))
        for part in np.array_split(some, -(-n_dense // 16)) if n_dense else []:
            counts = torch.from_numpy(data.counts[part].toarray()).double()
            sizes = torch.from_numpy(data.size_factors[part])
            exact = dense_component_log_likelihood(counts, sizes, *components)
            for name_, dtype in (("float64_dense", torch.float64), ("float32_dense", torch.float32)):
                differences.add(name_, by_products(part, dtype), exact)
    return {"forms": differences.summary(), "dense_cells": n_dense, "data": sources.describe(data)}


def fitted(data: Any, arguments: argparse.Namespace) -> Any:
    """Components (K, genes) as they are in the middle of a fit."""
    import numpy as np
    import torch

    from nbmix.core.em_loop import run_em
    from nbmix.core.settings import MixtureSettings
    from nbmix.starts.base import choose_cells, new_mixture, prepare

    generator = np.random.default_rng(arguments.seed)
    seen = choose_cells(data, arguments.fit_cells, generator)
    basis, batches = prepare(seen, 1, generator)
    # a pseudo-cell, lest genes silent in a component lie as low as they can
    mixture = new_mixture(seen, MixtureSettings(arguments.components, 1, 1.0), basis)
    q = common.partition(seen, arguments.components, arguments.seed)
    run_em(mixture, batches, responsibilities=q, max_iterations=arguments.iterations)
    return [component.detach().to(torch.float64) for component in mixture.components()]


class Differences:
    """Absolute differences of two (cells, K) log likelihoods, block by block."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, list[Any]]] = {}
        self.moved: dict[str, int] = {}

    def add(self, form: str, approximate: Any, exact: Any) -> None:
        """Note one block."""
        import torch

        best = exact.argmax(1, keepdim=True)
        contrasts = [values - values.gather(1, best) for values in (approximate, exact)]
        others = torch.ones_like(exact, dtype=torch.bool).scatter(1, best, False)  # the best's own is 0
        shares = [torch.softmax(values, 1) for values in (approximate, exact)]
        noted = self.parts.setdefault(form, {key: [] for _, key in SHOWN})
        noted["value"].append((approximate - exact).abs().flatten())
        noted["contrast"].append((contrasts[0] - contrasts[1]).abs()[others])
        noted["responsibility"].append((shares[0] - shares[1]).abs().amax(1))
        moved = int((approximate.argmax(1, keepdim=True) != best).sum())
        self.moved[form] = self.moved.get(form, 0) + moved

    def summary(self) -> dict[str, dict[str, Any]]:
        """Largest, 99.9 % quantile and median of each, and how many cells change their component."""
        import numpy as np
        import torch

        found: dict[str, dict[str, Any]] = {}
        for form, noted in self.parts.items():
            found[form] = {"cells_moved": self.moved[form]}
            for key, blocks in noted.items():
                values = torch.cat(blocks).numpy()
                if values.size:
                    figures = values.max(), np.quantile(values, 0.999), np.median(values)
                    found[form][key] = dict(
                        zip(("largest", "q999", "median"), map(float, figures), strict=True)
                    )
        return found


def show(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the table."""
    lines = []
    for form, found in result["forms"].items():
        for number, (label, key) in enumerate(SHOWN):
            if key in found:
                name = FORMS[form].format(result["dense_cells"]) if number == 0 else ""
                figures = (f"{found[key][part]:.1e}" for part in ("largest", "q999", "median"))
                lines.append([name, label, *figures, None if number else found["cells_moved"]])
    data = result["data"]
    common.show(
        f"{data['n_cells']:,} cells x {data['n_genes']:,} genes, K = {arguments.components}; "
        f"peak {result['peak_gb']:.2f} GB",
        ("", "absolute difference", "largest", "99.9 %", "median", "cells that change component"),
        lines,
    )


def main() -> None:
    parser = common.new_parser(
        __doc__, data="a file with populations in cell_type; default: a simulation", work=True
    )
    parser.add_argument("--components", type=int, default=10, help="K")
    parser.add_argument("--iterations", type=int, default=4, help="of EM that make the components")
    parser.add_argument("--fit-cells", type=int, default=20000, help="that EM sees, at most")
    parser.add_argument("--block", type=int, default=16384, help="cells in a batch at most")
    parser.add_argument("--dense-cells", type=int, default=256, help="compared with the dense form")
    arguments = parser.parse_args()
    if arguments.measure is None:
        sources.ensure_large(arguments)
    results = common.run_all(["accuracy"], measure, arguments)
    if results is None:
        return
    if common.failed(results):
        sys.exit(1)
    show(results["accuracy"], arguments)


if __name__ == "__main__":
    main()
