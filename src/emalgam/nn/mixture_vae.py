"""A VAE whose prior is a Gaussian mixture, for clustering and for better samples.

Jiang, Zheng, Tan, Tang, Zhou (2017), "Variational deep embedding: an unsupervised and generative approach to
clustering" (VaDE). Equation numbers are those of arXiv:1611.05148.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from emalgam.mixture import Mixture
from emalgam.nn.divergence import Normal, components_of, log_shares
from emalgam.nn.evaluation import as_input, evaluating
from emalgam.nn.likelihoods import Likelihood
from emalgam.nn.prior import GaussianMixturePrior
from emalgam.nn.tensors import at_least_float32, standard_normal
from emalgam.nn.vae import LOG_VARIANCES, VAE, Posterior
from emalgam.validation import check_integer, check_number

LOG_DEVIATIONS: Final = (0.5 * LOG_VARIANCES[0], 0.5 * LOG_VARIANCES[1])


class LatentPrior(GaussianMixturePrior):
    """p(z) = Σ_c π_c N(z; μ_c, L_c L_cᵀ) with the diagonal of L clamped so far in that no component collapses.

    Parameters and `from_fit` are those of `GaussianMixturePrior`.
    """

    def _log_range(self) -> tuple[float, float]:
        """Half of what log-variances are clamped to."""
        return LOG_DEVIATIONS

    def log_shares(self, posterior: Posterior) -> Tensor:
        """log π_c − KL(q(z | x) ‖ N(μ_c, L_c L_cᵀ)), (N, K)."""
        mean, log_variance = map(at_least_float32, posterior)
        return log_shares(Normal(mean, log_variance, full=False), self)

    def sample_component(self, n: int, component: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n draws of one component, (n, D)."""
        components = components_of(self)
        normal = Normal(components.mean[component], components.spread[component], components.full)
        z = normal.mean + normal.steps(standard_normal(normal.mean, (n, self.n_features), generator))
        return z.to(self.means.dtype)


class MixtureVAE(VAE):
    """A VAE with the prior Σ_c π_c N(μ_c, Σ_c), whose components become clusters (VaDE).

    Three steps: train it with ``pretraining`` on (the encoder's mean and the decoder, as an autoencoder), call
    `initialize_prior`, train it with ``pretraining`` off.

    Parameters
    ----------
    data_shape, n_latent, widths, likelihood, beta, activation
        As for `VAE`.
    n_components : int
        K.
    kl : {"closed", "monte_carlo"}
        "closed" is the bound of VaDE: the expectations of its eq. 12 over q(z | x) in closed form, with the q(c | x)
        that makes it largest, ∝ π_c exp(E_q log N(z; μ_c, Σ_c)). (The paper's eq. 16 puts one sample z there instead.)
        "monte_carlo" is log q(z | x) − log p(z) at the sample that is decoded: its mean is KL(q ‖ p) itself, which is
        no larger than the bound.
    covariance_type : {"diag", "full"}
        Of Σ_c. "diag" is VaDE. Latents of an autoencoder are correlated within clusters, which "full" follows.
    denoising : float
        Standard deviation of the noise on the input while pre-training, and only then; the target is the clean input.
        Clusters of digits are better with it.

    Attributes
    ----------
    prior : LatentPrior
    pretraining : bool
        Whether `losses` are those of the autoencoder. False in a new model.

    Examples
    --------
    >>> model = MixtureVAE(64, 2, n_components=3, widths=(32,))
    >>> model.pretraining = True
    >>> sorted(model.losses(torch.rand(10, 64)))
    ['loss', 'reconstruction']
    >>> model.pretraining = False
    >>> model.initialize_prior(model.encode(torch.rand(100, 64)), random_state=0).predict(torch.rand(4, 64)).shape
    torch.Size([4])
    """

    def __init__(
        self,
        data_shape: int | Sequence[int],
        n_latent: int,
        n_components: int,
        widths: Sequence[int] = (256,),
        likelihood: str | Mapping[str, Any] | Likelihood = "bernoulli",
        beta: float = 1.0,
        kl: str = "closed",
        activation: str = "relu",
        covariance_type: str = "diag",
        denoising: float = 0.0,
    ) -> None:
        super().__init__(data_shape, n_latent, widths, likelihood, beta, kl, activation)
        self.prior = LatentPrior(n_components, n_latent, covariance_type)
        self.denoising = check_number("denoising", denoising)
        self.pretraining = False

    def configuration(self) -> dict[str, Any]:
        """The constructor's arguments."""
        prior = {"n_components": self.n_components, "covariance_type": self.prior.covariance_type}
        return {**super().configuration(), **prior, "denoising": self.denoising}

    @property
    def n_components(self) -> int:
        """K."""
        return self.prior.n_components

    # ---- the prior

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) = log Σ_c π_c N(z; μ_c, Σ_c), (...) for z (..., n_latent)."""
        return self.prior.log_prob(z)

    def sample_prior(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """z ~ p(z), (n, n_latent), in random order."""
        return self.prior.sample(n, generator)[0]

    def closed_kl(self, posterior: Posterior) -> Tensor:
        """An upper bound of KL(q(z | x) ‖ p(z)), (N,): −log Σ_c π_c exp(−KL(q(z | x) ‖ N(μ_c, Σ_c))).

        That is what Jiang et al. (2017), eq. 12, subtract from the reconstruction, −Σ_c γ_c (log π_c / γ_c −
        KL(q ‖ p_c)), at its minimum over γ = q(c | x): γ_c ∝ π_c exp(−KL(q ‖ p_c)).
        """
        return -self.prior.log_shares(posterior).logsumexp(-1)

    # ---- clusters

    def responsibilities(self, x: Tensor) -> Tensor:
        """q(c | x), (N, n_components): the γ of the bound, with the posterior's variance in it."""
        return torch.softmax(self.prior.log_shares(self.posterior(x)), -1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The component with the largest q(c | x), (N,) int64."""
        return self.responsibilities(x).argmax(-1)

    @torch.no_grad()
    def generate(self, n: int, *, component: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """E[x | z] of n latents drawn from the prior, or from one component of it, (n, *data_shape)."""
        if component is None:
            return super().generate(n, generator=generator)
        if check_integer("component", component, 0) >= self.n_components:
            raise ValueError(f"component is {component}; expected an integer from 0 to {self.n_components - 1}")
        return self.decode(self.prior.sample_component(check_integer("n", n, 1), component, generator=generator))

    # ---- training

    def losses(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """As for `VAE`; while `pretraining`, "reconstruction" is log p(x | z = μ(x + noise)), "loss" its negative."""
        if not self.pretraining:
            return super().losses(x, generator=generator)
        noisy = self.check(x)
        if self.denoising > 0:
            noisy = x + self.denoising * standard_normal(x, x.shape, generator)
        z = self.encode(noisy)
        reconstruction = self.likelihood.log_density(x, self.output(z)).mean()
        return {"loss": -reconstruction, "reconstruction": reconstruction}

    def initialize_prior(
        self, source: Any, *, random_state: Any = None, n_init: int = 20, posterior_variance: float | None = 0.1
    ) -> MixtureVAE:
        """Put a mixture fitted to latents in place of the prior, as Jiang et al. (2017), section 4.2, do.

        Pre-training says nothing about σ² of q(z | x). As it is in a new model, near 1 whatever the scale of the
        latents, it can be larger than the distance of clusters, and then training begins by losing them: so it is set.

        Parameters
        ----------
        source : Mixture, Fit, fitted GaussianMixture or LatentMixtureSampler, latents, or iterable of batches x
            Latents are an (N, n_latent) array or tensor. Of a mixture with other covariances a "diag" prior takes the
            variances only. Batches (tensors, or tuples that begin with one) are encoded on the model's device.
        random_state, n_init
            As for `emalgam.GaussianMixture`, if one is fitted.
        posterior_variance : float or None
            What σ² of q(z | x) begins with for every x, as a share of the components' mean variance; None leaves the
            encoder as it is.

        Raises
        ------
        ValueError
            If the mixture, or the latents, do not fit to the model.
        TypeError
            If the source is none of these.
        """
        mixture = _mixture_of(source)
        if mixture is None:
            mixture = self._fit(source, random_state, n_init)
        expected = (self.n_components, *self.latent_shape)
        if mixture.means.shape != expected:
            raise ValueError(f"the mixture has means of shape {mixture.means.shape}; expected {expected}")
        self.prior.set(mixture)
        if posterior_variance is not None:
            self._set_posterior_variance(check_number("posterior_variance", posterior_variance), mixture)
        return self

    @torch.no_grad()
    def _set_posterior_variance(self, share: float, mixture: Mixture) -> None:
        """σ²_j = share · Σ_c π_c (Σ_c)_jj for every x: the part of the encoder's last layer that makes log σ²."""
        last, (n_latent,) = self.encoder[-2], self.latent_shape
        variances = mixture.covariance.diagonals(mixture.covariances, *mixture.means.shape)
        variance = torch.tensor(mixture.weights @ variances)
        last.weight[n_latent:] = 0.0
        last.bias[n_latent:] = (share * variance).log().clamp(*LOG_VARIANCES)

    def _fit(self, source: Any, random_state: Any, n_init: int) -> Mixture:
        from emalgam.estimator import GaussianMixture

        is_array = isinstance(source, np.ndarray | Tensor)
        latents = torch.as_tensor(source) if is_array else self._encoded(source)
        if latents.ndim != 2 or latents.shape[1:] != self.latent_shape:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; expected (N, {self.latent_shape[0]}): pass "
                "model.encode(x), or batches of x, e.g. a DataLoader"
            )
        kind = self.prior.covariance_type
        model = GaussianMixture(self.n_components, covariance_type=kind, n_init=n_init, random_state=random_state)
        return model.fit(latents.detach().double().cpu().numpy()).mixture_

    def _encoded(self, batches: Iterable[Any]) -> Tensor:
        if not isinstance(batches, Iterable):
            raise TypeError(
                f"source is a {type(batches).__name__}; expected a mixture, a fit, latents, or batches of x"
            )
        with evaluating(self):
            inputs = (batch[0] if isinstance(batch, tuple | list) else batch for batch in batches)
            return torch.cat([self.encode(as_input(self, x)).cpu() for x in inputs])


def _mixture_of(source: Any) -> Mixture | None:
    """A mixture, or that of a fit or an estimator; None for anything else. ValueError for one that is not fitted."""
    mixture = getattr(source, "mixture_", getattr(source, "mixture", source))
    if hasattr(mixture, "fit"):
        raise ValueError(f"the {type(source).__name__} is not fitted; call its fit first, or pass latents")
    return mixture if isinstance(mixture, Mixture) else None
