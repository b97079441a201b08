"""A VAE whose prior is a Gaussian mixture with diagonal covariances, for clustering and for better samples.

Jiang, Zheng, Tan, Tang, Zhou (2017), "Variational deep embedding: an unsupervised and generative approach to
clustering" (VaDE). Equation numbers are those of arXiv:1611.05148.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emalgam.mixture import Mixture
from emalgam.nn.evaluation import evaluating
from emalgam.nn.likelihoods import LOG_2_PI, Likelihood
from emalgam.nn.vae import LOG_VARIANCES, VAE, Posterior
from emalgam.validation import check_integer, check_number


class DiagonalMixturePrior(nn.Module):
    """p(z) = Σ_c π_c N(z; μ_c, diag σ_c²).

    Parameters
    ----------
    n_components, n_latent : int
        K and J. Parameters: `logits` (K,), of which π is the softmax; `means` (K, J); `log_variances` (K, J), clamped
        when they are used.
    """

    def __init__(self, n_components: int, n_latent: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.means = nn.Parameter(torch.randn(n_components, n_latent))
        self.log_variances = nn.Parameter(torch.zeros(n_components, n_latent))

    def expected_log_joint(self, mean: Tensor, variance: Tensor | float = 0.0) -> Tensor:
        """log π_c + E log N(z; μ_c, σ_c²) over z ~ N(mean, variance), (..., K) for a mean (..., J).

        −½ Σ_j (log 2π σ_cj² + (variance_j + (mean_j − μ_cj)²) / σ_cj²) each; log p(z, c) where the variance is 0.
        """
        log_variances = self.log_variances.clamp(*LOG_VARIANCES)
        spread = (mean[..., None, :] - self.means).square()
        if isinstance(variance, Tensor):
            spread = spread + variance[..., None, :]
        each = spread * torch.exp(-log_variances) + log_variances + LOG_2_PI
        return torch.log_softmax(self.logits, 0) - 0.5 * each.sum(-1)

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (...) for z (..., J)."""
        return self.expected_log_joint(z).logsumexp(-1)

    def sample(self, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """z of the components in labels (n,), (n, J)."""
        means = self.means[labels]
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
        return means + (0.5 * self.log_variances[labels].clamp(*LOG_VARIANCES)).exp() * noise

    @torch.no_grad()
    def set(self, mixture: Mixture) -> None:
        """Take over a mixture with diagonal covariances."""
        log_weights = np.log(np.maximum(mixture.weights, np.finfo(np.float64).tiny))
        values = (log_weights, mixture.means, np.log(mixture.covariances).clip(*LOG_VARIANCES))
        for parameter, value in zip((self.logits, self.means, self.log_variances), values, strict=True):
            parameter.copy_(torch.tensor(value))

    def to_mixture(self) -> Mixture:
        """The prior as an `emalgam.Mixture` of covariance type "diag"."""
        weights = torch.softmax(self.logits.detach().double(), 0)
        covariances = self.log_variances.detach().double().clamp(*LOG_VARIANCES).exp()
        return Mixture(weights.cpu().numpy(), self.means.detach().cpu().numpy(), covariances.cpu().numpy(), "diag")


class MixtureVAE(VAE):
    """A VAE with the prior Σ_c π_c N(μ_c, diag σ_c²), whose components become clusters (VaDE).

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
        that makes it largest, ∝ π_c exp(E_q log N(z; μ_c, σ_c²)). (The paper's eq. 16 puts one sample z there instead.)
        "monte_carlo" is log q(z | x) − log p(z) at the sample that is decoded: its mean is KL(q ‖ p) itself, which is
        no larger than the bound.

    Attributes
    ----------
    prior : DiagonalMixturePrior
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
    ) -> None:
        super().__init__(data_shape, n_latent, widths, likelihood, beta, kl, activation)
        self.n_components = check_integer("n_components", n_components, 1)
        self.prior = DiagonalMixturePrior(n_components, n_latent)
        self.pretraining = False

    def configuration(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().configuration(), "n_components": self.n_components}

    # ---- the prior

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) = log Σ_c π_c N(z; μ_c, σ_c²), (...) for z (..., n_latent)."""
        return self.prior.log_prob(z)

    def sample_prior(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """z ~ p(z), (n, n_latent), in random order."""
        weights = torch.softmax(self.prior.logits, 0)
        labels = torch.multinomial(weights, check_integer("n", n, 1), replacement=True, generator=generator)
        return self.prior.sample(labels, generator=generator)

    def closed_kl(self, posterior: Posterior) -> Tensor:
        """An upper bound of KL(q(z | x) ‖ p(z)), (N,): −H(q) − log Σ_c π_c exp(E_q log N(z; μ_c, σ_c²)).

        Σ_c γ_c (E_q log p(z, c) − log γ_c) of Jiang et al. (2017), eq. 12, at its maximum over γ = q(c | x).
        """
        return -posterior.entropy() - self._expected_log_joint(posterior).logsumexp(-1)

    def _expected_log_joint(self, posterior: Posterior) -> Tensor:
        return self.prior.expected_log_joint(posterior.mean, posterior.log_variance.exp())

    # ---- clusters

    def responsibilities(self, x: Tensor) -> Tensor:
        """q(c | x), (N, n_components): the γ of the bound, with the posterior's variance in it."""
        return torch.softmax(self._expected_log_joint(self.posterior(x)), -1)

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
        labels = torch.full((check_integer("n", n, 1),), component, device=self.prior.logits.device)
        return self.decode(self.prior.sample(labels, generator=generator))

    # ---- training

    def losses(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """As for `VAE`; while `pretraining`, "reconstruction" is log p(x | z = μ(x)), and "loss" its negative."""
        if not self.pretraining:
            return super().losses(x, generator=generator)
        z = self.posterior(self.check(x)).mean
        reconstruction = self.likelihood.log_density(x, self.output(z)).mean()
        return {"loss": -reconstruction, "reconstruction": reconstruction}

    def initialize_prior(
        self, source: Any, *, random_state: Any = None, n_init: int = 5, posterior_variance: float | None = 0.1
    ) -> MixtureVAE:
        """Put a mixture fitted to latents in place of the prior, as Jiang et al. (2017), section 4.2, do.

        Pre-training says nothing about σ² of q(z | x). As it is in a new model, near 1 whatever the scale of the
        latents, it can be larger than the distance of clusters, and then training begins by losing them: so it is set.

        Parameters
        ----------
        source : Mixture, fitted GaussianMixture, (N, n_latent) array or tensor, or iterable of batches x
            The mixture has to have diagonal covariances. Batches (tensors, or tuples that begin with one) are encoded
            on the model's device.
        random_state, n_init
            As for `emalgam.GaussianMixture`, if one is fitted.
        posterior_variance : float or None
            What σ² of q(z | x) begins with for every x, as a share of the components' mean variance; None leaves the
            encoder as it is.

        Raises
        ------
        ValueError
            If the mixture, or the latents, do not fit to the model.
        """
        mixture = _mixture_of(source)
        if mixture is None:
            mixture = self._fit(source, random_state, n_init)
        expected = (self.n_components, *self.latent_shape)
        if mixture.means.shape != expected or mixture.covariance_type != "diag":
            raise ValueError(
                f"the mixture has means of shape {mixture.means.shape} and covariance_type "
                f"{mixture.covariance_type!r}; expected {expected} and 'diag'"
            )
        self.prior.set(mixture)
        if posterior_variance is not None:
            self._set_posterior_variance(check_number("posterior_variance", posterior_variance), mixture)
        return self

    @torch.no_grad()
    def _set_posterior_variance(self, share: float, mixture: Mixture) -> None:
        """σ²_j = share · Σ_c π_c σ²_cj for every x: the part of the encoder's last layer that makes log σ²."""
        last, n_latent = self.encoder[-2], self.latent_shape[0]
        variance = torch.tensor(mixture.weights @ mixture.covariances)
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
        model = GaussianMixture(self.n_components, covariance_type="diag", n_init=n_init, random_state=random_state)
        return model.fit(latents.detach().double().cpu().numpy()).mixture_

    def _encoded(self, batches: Iterable[Any]) -> Tensor:
        with evaluating(self) as device:
            inputs = (batch[0] if isinstance(batch, tuple | list) else batch for batch in batches)
            return torch.cat([self.encode(x.to(device)).cpu() for x in inputs])


def _mixture_of(source: Any) -> Mixture | None:
    """A mixture, or that of a fitted estimator; None for anything else. ValueError for one that is not fitted."""
    mixture = getattr(source, "mixture_", source)
    if hasattr(mixture, "fit"):
        raise ValueError(f"the {type(source).__name__} is not fitted; call its fit first, or pass latents")
    return mixture if isinstance(mixture, Mixture) else None
