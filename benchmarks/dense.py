"""The dense form that the source's library takes, beside this one: EM, and steps on the ELBO.

    python benchmarks/dense.py --data pbmc_facs.h5ad --json dense.json

The cells are some of mix4 out of a file with their labels in cell_type, or, without --data, a simulation of
the same size and sparsity.

EM: both sides begin at the same random responsibilities, take the same number of iterations with uniform
weights and neither cross-fitting nor pseudo-cells, and are scored by one function in float64. An iteration of
the dense form is 50 epochs of Adam at rate 1e-2 on the expected log likelihood, through tensors of (cells, K,
genes), and a dense E step. The source gives all cells to every gradient step (--dense-batch 0); minibatches
are kinder to it, since an epoch then takes many steps for the same work.

Amortized: a step on the ELBO with an encoder of 128 hidden units and Adam at 1e-3, at several batch sizes,
cutting the batch out of the counts included.

Every measurement has a process of its own. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import common
import sources

N_GENES, DENSITY = 13705, 0.040  # mix4 of pbmc_facs, for the simulation
EM_NAMES = {"em_dense": "EM, dense", "em_ours": "EM, nbmix"}
LEAST_COUNTS = 0.01  # in a component of a silent gene, whose log mean would be -inf


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in the process that it has to itself."""
    kind, size = name.rsplit("_", 1)
    if name in EM_NAMES:
        data = read(arguments.cells, arguments)
        measured = (em_dense if name == "em_dense" else em_ours)(data, arguments)
    else:
        data = read(max(arguments.batch_sizes), arguments)
        steps = (amortized_dense if kind == "amortized_dense" else amortized_ours)(data, int(size), arguments)
        measured = steps | {"batch_size": int(size)}
    return measured | {"data": sources.describe(data)}


def read(n_cells: int, arguments: argparse.Namespace) -> Any:
    """``n_cells`` of mix4, or a simulation like them."""
    from nbmix.data.read import read_h5ad

    if arguments.data is None:
        return sources.simulated(n_cells, N_GENES, arguments.components, density=DENSITY, seed=arguments.seed)
    return read_h5ad(arguments.data, populations=common.MIX4, subsample=n_cells, seed=arguments.seed)


# EM


def start(data: Any, arguments: argparse.Namespace) -> Any:
    """(cells, K) the responsibilities at which both sides begin."""
    import numpy as np

    from nbmix.starts.base import random_responsibilities

    generator = np.random.default_rng(arguments.seed)
    return random_responsibilities(data.n_cells, arguments.components, generator)


def em_ours(data: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain EM by sparse products, preparing them included."""
    import numpy as np

    from nbmix.core.settings import MixtureSettings
    from nbmix.starts.base import new_mixture, prepare

    settings = MixtureSettings(arguments.components, 1, 0.0, weights="uniform")
    begin = start(data, arguments)
    clock = common.Clock(arguments.device)

    def fit() -> Any:
        with clock("prepare"):
            generator = np.random.default_rng(arguments.seed)
            basis, batches = prepare(data, 1, generator, dtype=settings.torch_dtype)
            mixture = new_mixture(data, settings, basis).to(arguments.device)
            batches = [batch.to(arguments.device) for batch in batches]
        q = begin.to(arguments.device)
        for iteration in range(arguments.dense_iterations):
            with clock("iteration"):
                mixture.reset_statistics()
                for batch in batches:
                    mixture.collect(batch, q[batch.rows])
                mixture.m_step(warm=iteration > 0, whole=True)
                q = q.clone()
                for batch in batches:
                    q[batch.rows] = mixture.posterior(batch).responsibilities
        return mixture.components()

    fit()
    clock = common.Clock(arguments.device)  # the first fit was the warm up
    for _ in range(arguments.repeats):
        components = fit()
    return em_figures(clock, data, components, arguments)


def em_dense(data: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """EM of the source: a gradient M step and an E step, both dense; the counts are made dense beforehand."""
    import torch

    from nbmix.core.likelihood import dense_component_log_likelihood

    device = arguments.device
    counts = torch.from_numpy(data.counts.toarray()).to(device)
    sizes = torch.from_numpy(data.size_factors).float().to(device)
    q = start(data, arguments).float().to(device)
    batch_size = arguments.dense_batch or data.n_cells
    log_mean = torch.log((q.T @ counts).clamp(min=LEAST_COUNTS) / (q.T @ sizes)[:, None])
    log_inv_disp = torch.ones_like(log_mean)
    parameters = [log_mean.requires_grad_(), log_inv_disp.requires_grad_()]
    batches = torch.arange(data.n_cells).split(batch_size)

    def gradient_step(rows: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        terms = dense_component_log_likelihood(counts[rows], sizes[rows], *parameters)
        (-(q[rows] * terms).sum() / len(rows)).backward()
        optimizer.step()

    # at rate 0, so that the warm up moves nothing
    gradient_step(batches[0], torch.optim.Adam(parameters, lr=0.0))
    clock = common.Clock(device)
    for _ in range(arguments.dense_iterations):
        with clock("iteration"):
            optimizer = torch.optim.Adam(parameters, lr=arguments.dense_lr)
            for _ in range(arguments.dense_epochs):
                with clock("epoch"):
                    for rows in batches:
                        gradient_step(rows, optimizer)
            with clock("e_step"), torch.no_grad():
                terms = [dense_component_log_likelihood(counts[r], sizes[r], *parameters) for r in batches]
                q = torch.softmax(torch.cat(terms), 1)
    more = {
        "batch_size": batch_size,
        "epochs": arguments.dense_epochs,
        "epoch_seconds": clock.seconds("epoch"),
        "e_step_seconds": clock.seconds("e_step"),
    }
    return em_figures(clock, data, [p.detach() for p in parameters], arguments) | more


def em_figures(
    clock: common.Clock, data: Any, components: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Mean seconds of an iteration, and what the components reach; the peak is that of the fit alone."""
    peak = common.peak_gb()
    prepare = clock.seconds("prepare") if "prepare" in clock.wall else 0.0
    return {
        "prepare_seconds": prepare,
        "iterations": arguments.dense_iterations,
        "seconds": statistics.mean(clock.wall["iteration"]),  # the first differs from the others
        "all_seconds": clock.wall["iteration"],
        "cpu_seconds": statistics.mean(clock.cpu["iteration"]),
        "peak_gb": peak,
        "log_likelihood": log_likelihood(data, *components),
    }


def log_likelihood(data: Any, log_mean: Any, log_inv_disp: Any) -> float:
    """Mean over cells of ln sum_k p(x_i | k) / K, nats: the textbook form in float64."""
    import math

    import torch

    from nbmix.core.likelihood import dense_component_log_likelihood

    components = log_mean.cpu().double(), log_inv_disp.cpu().double()
    total = 0.0
    for begin in range(0, data.n_cells, 64):
        rows = slice(begin, begin + 64)
        counts = torch.from_numpy(data.counts[rows].toarray()).double()
        sizes = torch.from_numpy(data.size_factors[rows])
        terms = dense_component_log_likelihood(counts, sizes, *components)
        total += float(torch.logsumexp(terms, 1).sum())
    return total / data.n_cells - math.log(len(log_mean))


# Amortized inference


def amortized_ours(data: Any, batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of ``AmortizedMixture``."""
    return common.time_amortized_steps(
        data,
        batch_size,
        arguments.components,
        steps=arguments.steps,
        seed=arguments.seed,
        device=arguments.device,
    )


def amortized_dense(data: Any, batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps on the same ELBO through (cells, K, genes) tensors, with an encoder of dense counts."""
    import numpy as np
    import torch
    from torch import nn

    from nbmix.core.likelihood import dense_component_log_likelihood

    torch.manual_seed(arguments.seed)
    generator = np.random.default_rng(arguments.seed)
    n_components, device = arguments.components, arguments.device
    encoder = nn.Sequential(
        nn.Linear(data.n_genes, 128), nn.ReLU(), nn.Linear(128, n_components), nn.LogSoftmax(1)
    ).to(device)
    q = common.partition(data, n_components, arguments.seed).numpy()
    means = np.maximum(data.counts.T @ q, LEAST_COUNTS).T / (q.T @ data.size_factors)[:, None]
    log_mean = torch.from_numpy(np.log(means)).float().to(device).requires_grad_()
    log_inv_disp = torch.ones_like(log_mean).detach().requires_grad_()
    log_weights = torch.zeros(n_components, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([*encoder.parameters(), log_mean, log_inv_disp, log_weights], lr=1e-3)
    warm_up, steps = 2, arguments.dense_steps
    clock = common.Clock(device)
    for step in range(warm_up + steps):
        kind = " (warm up)" if step < warm_up else ""
        with clock(f"batch{kind}"):
            rows = np.sort(generator.choice(data.n_cells, batch_size, replace=False))
            counts = torch.from_numpy(data.counts[rows].toarray()).to(device)
            sizes = torch.from_numpy(data.size_factors[rows]).float().to(device)
        with clock(f"step{kind}"):
            optimizer.zero_grad()
            log_q = encoder(torch.log1p(counts))
            terms = dense_component_log_likelihood(counts, sizes, log_mean, log_inv_disp)
            elbo = (log_q.exp() * (terms + torch.log_softmax(log_weights, 0) - log_q)).sum(1)
            (-elbo.mean()).backward()
            optimizer.step()
    return common.step_figures(clock, batch_size, steps)


def show(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print both tables and the ratios."""
    good = {name: result for name, result in results.items() if "error" not in result}
    if em := {name: good[name] for name in EM_NAMES if name in good}:
        data = next(iter(em.values()))["data"]
        notes = []
        if len(em) == 2:
            ratio = em["em_dense"]["seconds"] / em["em_ours"]["seconds"]
            gain = em["em_ours"]["log_likelihood"] - em["em_dense"]["log_likelihood"]
            notes.append(
                f"a dense iteration takes {ratio:.0f} times as long; after {arguments.dense_iterations} of "
                f"each, nbmix is {gain:+.2f} nats per cell from it"
            )
        common.show(
            f"{data['n_cells']:,} cells x {data['n_genes']:,} genes, {data['density']:.1%} not 0, "
            f"K = {arguments.components}; {common.conditions(em)}",
            ("", "iteration s", "CPU s", "prepare s", "peak GB", "log likelihood per cell"),
            [
                [
                    EM_NAMES[name],
                    *(result[key] for key in ("seconds", "cpu_seconds", "prepare_seconds", "peak_gb")),
                    f"{result['log_likelihood']:.3f}",
                ]
                for name, result in em.items()
            ],
            notes,
        )
    lines, notes = [], []
    for size in arguments.batch_sizes:
        pair = [good.get(f"amortized_{side}_{size}") for side in ("dense", "ours")]
        for side, result in zip(("dense", "nbmix"), pair, strict=True):
            if result:
                keys = ("batch_seconds", "step_seconds", "cpu_seconds", "cells_per_second", "peak_gb")
                lines.append([f"{side}, batches of {size}", *(result[key] for key in keys)])
        if pair[0] and pair[1]:
            ratio = pair[1]["cells_per_second"] / pair[0]["cells_per_second"]
            notes.append(f"batches of {size}: nbmix takes {ratio:.1f} times as many cells a second")
    if lines:
        common.show(
            f"Amortized: steps on the ELBO; {common.conditions(good)}",
            ("", "cut a batch s", "step s", "CPU s", "cells per s", "peak GB"),
            lines,
            notes,
        )


def main() -> None:
    parser = common.new_parser(__doc__, data="a file with the labels of mix4 in cell_type")
    parser.add_argument("--cells", type=int, default=1000, help="that EM sees")
    parser.add_argument("--components", type=int, default=4, help="K")
    parser.add_argument(
        "--repeats", type=int, default=5, help="fits by nbmix; of the dense form there is one"
    )
    parser.add_argument("--dense-iterations", type=int, default=2, help="of EM, on both sides")
    parser.add_argument("--dense-epochs", type=int, default=50, help="in an M step")
    parser.add_argument("--dense-lr", type=float, default=1e-2, help="Adam's rate in an M step")
    parser.add_argument("--dense-batch", type=int, default=64, help="cells in a gradient step; 0: all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 1024], help="amortized")
    parser.add_argument("--steps", type=int, default=40, help="amortized, of nbmix")
    parser.add_argument("--dense-steps", type=int, default=8, help="amortized, of the dense form")
    parser.add_argument(
        "--only", choices=("em", "amortized"), nargs="+", default=("em", "amortized"), help="some of it"
    )
    common.add_device(parser)
    arguments = parser.parse_args()
    names = [*EM_NAMES] if "em" in arguments.only else []
    if "amortized" in arguments.only:
        names += [f"amortized_{side}_{size}" for size in arguments.batch_sizes for side in ("dense", "ours")]
    results = common.run_all(names, measure, arguments)
    if results is None:
        return
    show(results, arguments)
    if common.failed(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
