"""scVI's M1+M2 mixture: a component and a second latent vector make the place of a cell in latent space."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from nbmix.core.batch import CellBatch
from nbmix.core.declared import Setting, checked
from nbmix.core.settings import MixtureSettings, NComponents
from nbmix.data.module import CountsDataModule
from nbmix.models.deep import DeepMixture, DeepTerms
from nbmix.models.networks import Normal, normal_kl, standard_normal_like
from nbmix.starts.base import StartState

FIRST_LOG_SD_OF_SIZE = -3.0  # a thousand counts tell a size factor to some hundredths


@checked("model", DeepMixture)
class VAEC(DeepMixture):
    """Components are drawn in latent space by a network, from noise of their own.

        y ~ Cat(pi),    u ~ N(0, I),    z | y, u ~ N(m(u, y), diag sd^2(u, y)),    ln s ~ N(a, b^2)
        q(y, u, z, s | x) = q(z | x) q(y | z) q(u | z, y) q(s | x)

    with lambda | z and x | lambda, s as in ``nbmix.models.deep``. The model of Lopez et al. (2018) and Xu et
    al. (2020), after M1+M2 of Kingma et al. (2014); size factors are those of the data, or latent as theirs.

    Args:
        gene_names: (genes,).
        settings: see ``DeepMixture``; u has as many dimensions as z.
        size_factors: where they are latent, those of the data only say how they are distributed.
    """

    kind: ClassVar[str] = "vaec"
    log_size_prior: Tensor  # (2,) mean and ln sd of ln s

    def __init__(
        self,
        gene_names: np.ndarray,
        *,
        n_components: NComponents = MixtureSettings.n_components,
        size_factors: Annotated[
            str,
            Setting(
                "Size factors are given with the data, or latent with a log-normal distribution.",
                words=("given", "latent"),
            ),
        ] = "given",
        **settings: Any,
    ) -> None:
        super().__init__(gene_names, n_components=n_components, **settings)
        self.plain["size_factors"] = size_factors
        self.has_latent_size = size_factors == "latent"
        n_latent, n_hidden = self.n_latent, self.n_hidden
        self.noise_width = 2 * n_latent + 1
        self.latent = nn.Linear(n_hidden, 2 * n_latent)
        self.component = _two_layers(n_latent, n_hidden, n_components)
        self.inner = _two_layers(n_latent + n_components, n_hidden, 2 * n_latent)
        self.outer = _two_layers(n_latent + n_components, n_hidden, 2 * n_latent)
        if self.has_latent_size:
            self.log_size = nn.Linear(1, 2)
            with torch.no_grad():
                self.log_size.weight.copy_(torch.tensor([[1.0], [0.0]]))
                self.log_size.bias.copy_(torch.tensor([0.0, FIRST_LOG_SD_OF_SIZE]))
        self.register_buffer("log_size_prior", torch.zeros(2))

    def begin(self, start: StartState, data: CountsDataModule) -> None:
        super().begin(start, data)
        sizes = data.training_data.size_factors
        log_sizes = np.log(sizes[sizes > 0])
        sd = max(float(log_sizes.std()), 1e-2)  # equal size factors
        self.log_size_prior.copy_(torch.tensor([log_sizes.mean(), np.log(sd)]))

    def terms_at(self, batch: CellBatch, noise: Tensor) -> DeepTerms:
        n_components = self.mixture.settings.n_components
        for_z, for_u, for_s = noise.split([self.n_latent, self.n_latent, 1], 1)
        hidden = self.trunk(batch, self.mixture.basis.levels)
        q_z = Normal.of(self.latent(hidden))
        z = q_z.sample(for_z)
        log_q = torch.log_softmax(self.component(z).double(), 1)
        z_for_all = z[:, None].expand(-1, n_components, -1)  # (cells, K, n_latent)
        q_u = Normal.of(self.inner(self._with_component(z_for_all)))
        u = q_u.sample(for_u[:, None])  # the same for all components
        p_z = self._given(u).log_density(z_for_all)  # (cells, K)
        prior_u = standard_normal_like(q_u)
        kl = normal_kl(q_u, prior_u) - p_z - q_z.entropy()[:, None]
        drawn_kl = q_u.log_density(u) - prior_u.log_density(u) - p_z + q_z.log_density(z)[:, None]
        log_size = torch.log(batch.size_factors)
        if self.has_latent_size:
            q_s = self.posterior_of_size(batch)
            prior_s = Normal.of(self.log_size_prior)
            drawn = q_s.sample(for_s)
            log_size = drawn[:, 0]
            kl = kl + normal_kl(q_s, prior_s)[:, None]
            drawn_kl = drawn_kl + (q_s.log_density(drawn) - prior_s.log_density(drawn))[:, None]
        shared, cells = self.shared_log_likelihood(batch, log_size)
        log_likelihood = shared + self.decoder.log_likelihood(z, log_size.to(z), cells)
        return DeepTerms(
            log_q,
            log_likelihood[:, None].expand(-1, n_components),
            self.log_prior(batch),
            kl,
            drawn_kl,
        )

    def posterior_of_size(self, batch: CellBatch) -> Normal:
        """q(s | x), (cells, 1): linear in ln of the cell's counts, in units of s, which tells s alone.

        The trunk has no part in it: its gradient would be that of thousands of counts that scale together.
        """
        log_total = torch.log(self.total_counts(batch).clamp(min=1)) - self.decoder.log_unit
        return Normal.of(self.log_size(log_total[:, None].to(self.log_size.weight)))

    def _with_component(self, values: Tensor) -> Tensor:
        """(..., K, n) -> (..., K, n + K): each with its component one-hot."""
        n_components = values.shape[-2]
        one_hot = torch.eye(n_components, dtype=values.dtype, device=values.device)
        return torch.cat([values, one_hot.expand(*values.shape[:-1], -1)], -1)

    def _given(self, u: Tensor) -> Normal:
        """p(z | u, y = k) for u (..., K, n_latent)."""
        return Normal.of(self.outer(self._with_component(u)))

    def sample_prior(self, n_draws: int, generator: torch.Generator) -> Tensor:
        shape = (2, n_draws, self.mixture.settings.n_components, self.n_latent)
        for_u, for_z = torch.randn(shape, generator=generator).to(self.trunk.first)
        return self._given(for_u).sample(for_z).transpose(0, 1)


def _two_layers(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.ReLU(), nn.Linear(n_hidden, n_out))
