"""What the two deep generative models share: networks on sparse counts, a decoder, and how they are fitted.

A cell's expression is what a decoder network makes of its place z in a space of few dimensions,

    lambda_ij | z_i ~ Gamma(shape r_j, mean mu_j(z_i)),    x_ij | lambda_ij ~ Poisson(s_i lambda_ij),

so that x_ij | z_i is negative binomial, and the component y_i is one of K that z_i may come from. The models
differ in p(z | y) and in q(y, z | x): ``nbmix.models.vaec`` and ``nbmix.models.gmvae``.

Where cells come from several origins, decoder and trunk are told which (Lopez et al. 2018): mu_j(z_i, g), and
p(z | y) knows nothing of g.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nbmix.core.batch import CellBatch, pair_product
from nbmix.core.declared import Setting, checked, settings_among
from nbmix.core.parameters import LOG_INV_DISP_RANGE, Components
from nbmix.core.settings import MixtureSettings, NComponents, StartPseudoCells, Weights
from nbmix.core.special import log_rising_ratio
from nbmix.data.module import CountsDataModule
from nbmix.models.base import Prediction
from nbmix.models.minibatch import MinibatchModule, prior_where_empty
from nbmix.models.networks import Decoder, SparseCells, SparseTrunk
from nbmix.starts.base import StartState

START_WEIGHT = 30.0  # of the cross entropy: a nat of it is little beside hundreds of counts

SINGLE_RATE = 10.0  # of Adam for single numbers, against those of networks that act together

SUMMARY_DRAWS = 256  # of z for each component's mean and variance

FEWEST_SUMMARY_DRAWS = 8  # in each origin, where there are many


class DeepTerms(NamedTuple):
    """Of a batch and one draw of the latents, (cells, K) float64 each, in nats.

    Attributes:
        log_q: ln q(y = k).
        log_likelihood: ln p(x_i | z) at the draw of z for component k.
        log_prior: ln pi_ik.
        kl: of all latents but y, given y = k, its expectations exact where they can be.
        drawn_kl: the same, ln q - ln p at the draw.
    """

    log_q: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    kl: Tensor
    drawn_kl: Tensor

    def parts(self, q: Tensor | None = None) -> dict[str, Tensor]:
        """What the ELBO is made of, (cells,) each: the first minus the others; ``q`` in place of q(y)."""
        # of q(y) itself in a form whose gradient is finite where a probability underflows
        negative_entropy = self.log_q.exp() * self.log_q if q is None else torch.xlogy(q, q)
        q = self.log_q.exp() if q is None else q
        return {
            "expected_log_likelihood": (q * self.log_likelihood).sum(1),
            "kl_latent": (q * self.kl).sum(1),
            "kl_component": (negative_entropy - q * self.log_prior).sum(1),
        }

    @property
    def elbo(self) -> Tensor:
        """(cells,) unbiased for the ELBO."""
        likelihood, *kls = self.parts().values()
        return likelihood - sum(kls)

    @property
    def log_importance(self) -> Tensor:
        """(cells, K) ln of importance weights whose sum over k is unbiased for p(x_i)."""
        return self.log_likelihood + self.log_prior - self.drawn_kl

    @property
    def drawn_elbo(self) -> Tensor:
        """(cells,) unbiased for the ELBO, and never above ln of the summed importance weights."""
        return (self.log_q.exp() * (self.log_importance - self.log_q)).sum(1)


@checked("model")
class DeepMixture(MinibatchModule):
    """A deep generative model with a component y in it, fitted by Adam on the ELBO of minibatches.

        ELBO_i = sum_k q(y_i = k) { E[ln p(x_i | z)] - KL_k + ln pi_k - ln q(y_i = k) }

    The sum over components is exact; z (and what else is latent) is drawn once, by reparametrisation. The KL
    parts count for a share that grows to 1 over the first epochs. In these the exact responsibilities under
    the start's components also stand in for q(y), which learns them by cross entropy: a start means here what
    it means to the other models. The decoder's weights for each gene have a normal prior, without which they
    learn the cells by heart.

    The module's mixture holds the start's components first. Then it describes the model by one negative
    binomial for each component and gene, with the mean and the variance of lambda_j given y = k, and by the
    offsets that the decoder makes of origins on average.

    Args:
        gene_names: (genes,).
    """

    free_to_change: ClassVar[frozenset[str]] = frozenset({"lr", "start_epochs", "kl_epochs", "n_draws"})
    gradient_norms: ClassVar[Sequence[str]] = ("trunk", "decoder")
    meets_new_origins: ClassVar[bool] = False  # the decoder would have to learn them
    # names of parameters that are no network's: each has to go its way alone, and faster
    single: ClassVar[frozenset[str]] = frozenset({"decoder.log_inv_disp", "mixture.log_weights"})
    noise_width: int  # standard normals that a draw for one cell takes

    def __init__(
        self,
        gene_names: np.ndarray,
        *,
        n_components: NComponents = MixtureSettings.n_components,
        weights: Weights = MixtureSettings.weights,
        n_latent: Annotated[int, Setting("The number of dimensions of each latent vector.", least=1)] = 10,
        n_hidden: Annotated[int, Setting("The number of units in every hidden layer.", least=1)] = 64,
        lr: Annotated[float, Setting("The learning rate of the networks.", above=0)] = 1e-3,
        weight_precision: Annotated[
            float,
            Setting(
                "The precision of the normal prior on the decoder's weights. With 0 there is no prior.",
                least=0,
            ),
        ] = 300,
        start_epochs: Annotated[
            int,
            Setting(
                "For so many epochs the responsibilities of the start stand in for q(y). With "
                "0 the groups are far worse.",
                least=0,
            ),
        ] = 6,
        kl_epochs: Annotated[
            int, Setting("Over so many epochs the Kullback-Leibler terms grow to full weight.", least=0)
        ] = 6,
        n_draws: Annotated[
            int, Setting("The number of draws of each cell's latent vectors, for predictions.", least=1)
        ] = 8,
        pseudo_cells: StartPseudoCells = MixtureSettings.pseudo_cells,
    ) -> None:
        plain = settings_among(locals(), DeepMixture)
        super().__init__(gene_names, MixtureSettings(n_components, 1, pseudo_cells, weights), plain)
        self.n_latent, self.n_hidden, self.n_draws = n_latent, n_hidden, n_draws
        self.lr, self.weight_precision = lr, weight_precision
        self.start_epochs, self.kl_epochs = start_epochs, kl_epochs
        self.mixture.requires_grad_(False)
        self.mixture.log_weights.requires_grad_(weights == "learned")
        self.trunk = SparseTrunk(len(self.gene_names), n_hidden)
        self.decoder = Decoder(len(self.gene_names), n_latent, n_hidden)

    @classmethod
    def knows_origins(cls) -> bool:
        return True

    def know_origins(self, names: tuple[str, ...]) -> None:
        super().know_origins(names)
        if names:
            self.trunk.know_origins(len(names))
            self.decoder.know_origins(len(names))

    @abstractmethod
    def terms_at(self, batch: CellBatch, noise: Tensor) -> DeepTerms:
        """What the ELBO of a batch is made of at one draw; ``noise`` (cells, noise_width) standard normal.

        Cells without counts need no care here.
        """

    @abstractmethod
    def sample_prior(self, n_draws: int, generator: torch.Generator) -> Tensor:
        """(K, draws, n_latent) from p(z | y = k)."""

    def begin(self, start: StartState, data: CountsDataModule) -> None:
        super().begin(start, data)
        training = data.training_data
        totals = torch.from_numpy(training.gene_totals)
        with torch.no_grad():
            share = (totals + 0.5) / (totals + 0.5).sum()  # half a count: a gene may be silent in these cells
            self.decoder.out.bias.copy_(torch.log(share))
            self.decoder.log_unit.fill_(math.log(float(totals.sum()) / float(training.size_factors.sum())))
            self.decoder.log_inv_disp.copy_(self.mixture.components().log_inv_disp.mean(0))
            if self.mixture.origins is not None:
                self.decoder.offsets.copy_(self.mixture.origins.offsets[0])

    def parameter_groups(self) -> list[dict[str, Any]]:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        fast = [p for name, p in named if name in self.single]
        slow = [p for name, p in named if name not in self.single]
        return [{"params": slow, "lr": self.lr}, {"params": fast, "lr": SINGLE_RATE * self.lr}]

    def shared_log_likelihood(self, batch: CellBatch, log_size: Tensor) -> tuple[Tensor, SparseCells]:
        """(cells,) float64 the part of ln p(x_i | z, s) that z has no part in, and the cells for the rest.

            sum_j [D(x, r) - ln G(x + 1)] + x_i+ ln s_i

        Args:
            batch: the cells.
            log_size: (cells,) ln s, which need not be that of the data.
        """
        levels = self.mixture.basis.levels
        cells = SparseCells.of(batch, levels)
        gene, count = levels.gene[batch.used], levels.count[batch.used]
        rising = log_rising_ratio(count, self.log_inv_disp[gene])
        log_given = torch.log(batch.size_factors)
        total = self.total_counts(batch)
        rescaled = torch.where(total > 0, total * (log_size.double() - log_given), 0.0)
        return pair_product(batch, rising[:, None])[:, 0] + batch.constant + rescaled, cells

    def total_counts(self, batch: CellBatch) -> Tensor:
        """(cells,) float64 x_i+."""
        return batch.pairs.matmul(self.mixture.basis.levels.count[batch.used][:, None])[:, 0]

    @property
    def log_inv_disp(self) -> Tensor:
        """(genes of the data,) ln r_j."""
        return self.decoder.log_inv_disp

    def terms(self, batch: CellBatch) -> DeepTerms:
        """At the noise of the step that is being taken."""
        return self._draw_at(batch, self._noise_of_step(batch.n_cells))

    def draw(self, batch: CellBatch, generator: torch.Generator, *, common: bool = False) -> DeepTerms:
        """``terms`` at noise from ``generator``; ``common``: the same for every cell."""
        noise = torch.randn(1 if common else batch.n_cells, self.noise_width, generator=generator)
        return self._draw_at(batch, noise)

    def _draw_at(self, batch: CellBatch, noise: Tensor) -> DeepTerms:
        """``terms`` at noise (cells, noise_width), or (1, noise_width) for every cell."""
        terms = self.terms_at(batch, noise.to(self.trunk.first).expand(batch.n_cells, -1))
        return terms._replace(log_q=prior_where_empty(terms.log_q, terms.log_prior, batch))

    def loss(self, terms: DeepTerms, batch: CellBatch) -> Tensor:
        share = min(1.0, (self.current_epoch + 1) / (self.kl_epochs + 1))
        is_taught = self.current_epoch < self.start_epochs
        teacher = self._teacher(batch) if is_taught else None
        likelihood, *kls = terms.parts(teacher).values()
        loss = (share * sum(kls) - likelihood).sum()
        if teacher is not None:
            loss = loss - START_WEIGHT * (teacher * terms.log_q).sum()
        return loss + self.weight_precision / 2 * self.decoder.out.weight.square().sum() * (
            batch.n_cells / self.data.training_rows.size
        )

    def _teacher(self, batch: CellBatch) -> Tensor:
        """(cells, K) the exact responsibilities under the mixture."""
        if self.mixture.origins is not None:
            return self.exact_posterior(batch)
        return self.mixture.posterior(batch).responsibilities

    def _noise_of_step(self, n_cells: int) -> Tensor:
        """(cells, noise_width) of this rank's cells, what one process would draw for the batch of all ranks.

        It depends on the seed and the step alone, so that a resumed fit draws what the whole one drew.
        """
        state = np.random.SeedSequence([self.data.seed, self.global_step])
        generator = torch.Generator().manual_seed(int(state.generate_state(1)[0]))
        n_all = int(self.sum_over_ranks(n_cells)[0])
        noise = torch.randn(n_all, self.noise_width, generator=generator)
        return noise[self.global_rank :: self.trainer.world_size]  # as ``ShuffledBatches`` deals cells out

    @torch.no_grad()
    def project(self) -> None:
        super().project()
        self.decoder.log_inv_disp.clamp_(*LOG_INV_DISP_RANGE)

    @torch.no_grad()
    def describe(self, origin: int = -1, n_draws: int = SUMMARY_DRAWS) -> Components:
        """(K, genes) NB components with the mean and variance of lambda_j given y = k, in one origin.

        mu_kj = E[mu_j(z)],    1 / r_kj = (E[mu_j(z)^2] / r_j + Var[mu_j(z)]) / mu_kj^2
        """
        generator = torch.Generator().manual_seed(0)
        inv_disp = self.log_inv_disp.double().exp()
        log_means, log_inv_disps = [], []
        for z in self.sample_prior(n_draws, generator):
            mean = self.decoder.log_mean(z, origin).double().exp()  # (draws, genes)
            average, square = mean.mean(0), mean.square().mean(0)
            variance = square / inv_disp + (square - average.square()).clamp(min=0)
            log_means.append(average.log())
            log_inv_disps.append((2 * average.log() - variance.log()).clamp(*LOG_INV_DISP_RANGE))
        return Components(torch.stack(log_means), torch.stack(log_inv_disps))

    @torch.no_grad()
    def describe_in_mixture(self) -> None:
        """Have the mixture describe the model.

        Of components as origins see them ln mu_kjg, ln mu_kj and ln r_kj are means over origins, and offsets
        d_gj = sum_k pi_k (ln mu_kjg - ln mu_kj).
        """
        origins = self.mixture.origins
        if origins is None:
            self.mixture.set_components(self.describe())
            return
        n_draws = max(FEWEST_SUMMARY_DRAWS, SUMMARY_DRAWS // origins.n_origins)
        weights, total, of_origins = self.mixture.log_weights[0].softmax(0), None, []
        for origin in range(origins.n_origins):
            seen = torch.stack(self.describe(origin, n_draws))  # (2, K, genes)
            total = seen if total is None else total + seen
            of_origins.append(weights @ seen[0])
        assert total is not None
        components = Components(*(total / origins.n_origins))
        offsets = torch.stack(of_origins) - weights @ components.log_mean
        self.mixture.set_components(components)
        origins.set(origins.within_bounds(offsets), origins.variance[0])

    def on_train_epoch_end(self) -> None:
        if self.current_epoch + 1 >= self.start_epochs:
            self.describe_in_mixture()

    def on_predict_start(self) -> None:
        self.describe_in_mixture()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # older checkpoints have one section, "deep", for both deep models
        super().on_load_checkpoint({self.kind: checkpoint.get("deep"), **checkpoint})

    @torch.no_grad()
    def predict(self, batch: CellBatch, n_draws: int) -> Prediction:
        """What the model says of cells, by ``n_draws`` draws of the latents that are the same for every cell.

        Responsibilities are the mean of q(y) over the draws. The log likelihood is the importance-weighted
        bound on ln p(x_i) (Burda et al. 2016), which more draws bring closer; it is never below the ELBO.
        """
        generator = torch.Generator().manual_seed(0)
        q = torch.zeros(batch.n_cells, self.mixture.settings.n_components, dtype=torch.float64).to(
            self.device
        )
        elbo, weights = q.new_zeros(batch.n_cells), []
        for _ in range(n_draws):
            terms = self.draw(batch, generator, common=True)
            q += terms.log_q.exp() / n_draws
            elbo += terms.drawn_elbo / n_draws
            weights.append(torch.logsumexp(terms.log_importance, 1))
        log_likelihood = torch.logsumexp(torch.stack(weights), 0) - math.log(n_draws)
        missing = torch.full_like(elbo, torch.nan)
        none = torch.full_like(q, torch.nan, dtype=torch.float32)  # a component has no likelihood of its own
        return Prediction(batch.rows, q, log_likelihood, missing, elbo, none)

    def predict_step(self, batch: CellBatch, batch_idx: int) -> Prediction:
        return self.predict(batch, self.n_draws)

    def held_out_log_likelihood(self, batch: CellBatch) -> Tensor:
        return self.predict(batch, 1).log_likelihood

    def restrict_genes(self, positions: np.ndarray) -> None:
        super().restrict_genes(positions)
        kept = torch.from_numpy(positions)
        self.trunk.restrict_genes(kept)
        self.decoder.restrict_genes(kept)
