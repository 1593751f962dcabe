"""The y -> z -> lambda model: a mixture of normals in the latent space of a variational autoencoder."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nbmix.core.batch import CellBatch
from nbmix.core.declared import checked
from nbmix.models.deep import DeepMixture, DeepTerms
from nbmix.models.networks import Normal, normal_kl


@checked("model", DeepMixture)
class GMVAE(DeepMixture):
    """One normal for each component in the latent space.

        y ~ Cat(pi),    z | y ~ N(m_y, diag sd_y^2),    lambda | z and x | lambda as in ``nbmix.models.deep``
        q(y, z | x) = q(y | x) q(z | y, x)

    After R. Shu, "Gaussian mixture VAE: lessons in variational inference, generative models, and deep nets"
    (2016), with a negative binomial likelihood; size factors are those of the data.

    Args:
        gene_names: (genes,).
        settings: see ``DeepMixture``.
    """

    kind: ClassVar[str] = "gmvae"
    single = DeepMixture.single | {"prior_mean", "prior_log_sd"}

    def __init__(self, gene_names: np.ndarray, **settings: Any) -> None:
        super().__init__(gene_names, **settings)
        n_components = self.mixture.settings.n_components
        n_latent, n_hidden = self.n_latent, self.n_hidden
        self.noise_width = n_latent
        self.component = nn.Linear(n_hidden, n_components)
        self.of_cell = nn.Linear(n_hidden, n_hidden)
        self.of_component = nn.Parameter(torch.randn(n_components, n_hidden) * n_hidden**-0.5)
        self.latent = nn.Linear(n_hidden, 2 * n_latent)
        self.prior_mean = nn.Parameter(torch.randn(n_components, n_latent))
        self.prior_log_sd = nn.Parameter(torch.zeros(n_components, n_latent))

    @property
    def prior(self) -> Normal:
        """(K, n_latent) p(z | y)."""
        return Normal.of(torch.cat([self.prior_mean, self.prior_log_sd], 1))

    def terms_at(self, batch: CellBatch, noise: Tensor) -> DeepTerms:
        hidden = self.trunk(batch, self.mixture.basis.levels)
        log_q = torch.log_softmax(self.component(hidden).double(), 1)
        both = self.of_cell(hidden)[:, None] + self.of_component  # (cells, K, hidden)
        q = Normal.of(self.latent(torch.relu(both)))  # (cells, K, n_latent)
        z = q.sample(noise[:, None])  # the same for all components, whose difference it mostly cancels in
        log_size = torch.log(batch.size_factors)
        shared, cells = self.shared_log_likelihood(batch, log_size)
        log_size = log_size.to(z)
        of_component = [self.decoder.log_likelihood(z[:, k], log_size, cells) for k in range(z.shape[1])]
        return DeepTerms(
            log_q,
            shared[:, None] + torch.stack(of_component, 1),
            self.log_prior(batch),
            normal_kl(q, self.prior),
            q.log_density(z) - self.prior.log_density(z),
        )

    def sample_prior(self, n_draws: int, generator: torch.Generator) -> Tensor:
        prior = self.prior
        noise = torch.randn(len(prior.mean), n_draws, prior.mean.shape[1], generator=generator)
        return Normal(prior.mean[:, None], prior.log_sd[:, None]).sample(noise.to(prior.mean))
