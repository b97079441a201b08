"""The variational autoencoder (Kingma and Welling 2014, "Auto-encoding variational Bayes").

One ELBO, in nats per datum, whatever the likelihood and the prior:

    ELBO(x) = E_q(z|x) log p(x | z) − KL(q(z | x) ‖ p(z)) ≤ log p(x)

with q(z | x) = N(μ(x), diag σ²(x)). The expectation is one sample z = μ + σ ε (the reparameterisation, eq. 10 there);
log p(x | z) is a log-density with all its constants, summed over the elements of x, never a mean over them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emalgam.nn.divergence import kl_gaussian
from emalgam.nn.layers import check_sizes, dense
from emalgam.nn.likelihoods import Likelihood, likelihood_of
from emalgam.nn.model import LatentModel
from emalgam.nn.tensors import at_least_float32, standard_normal
from emalgam.packing import LOG_2_PI
from emalgam.validation import check_choice, check_integer, check_number

LOG_VARIANCES: Final = (-12.0, 12.0)  # what exp, and squares over it, bear in float32 too; gradients vanish outside
ELEMENTS_AT_ONCE: Final = 2**24  # of the decoder's widest layer while log_likelihood runs
DIVERGENCES: Final = ("closed", "monte_carlo")


class Posterior(NamedTuple):
    """q(z | x) = N(mean, diag exp(log_variance)), both (N, n_latent)."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """z = μ + σ ε, (*shape, N, n_latent): gradients go through it."""
        noise = standard_normal(self.mean, (*shape, *self.mean.shape), generator)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z | x), (..., N) for z (..., N, n_latent)."""
        z, mean, log_variance = (at_least_float32(each) for each in (z, *self))
        return -0.5 * ((z - mean).square() / log_variance.exp() + log_variance + LOG_2_PI).sum(-1)


class VAE(LatentModel):
    """A VAE whose encoder and decoder are mirrored networks of linear layers.

    Parameters
    ----------
    data_shape : int or sequence of int
        Of one datum; it is flattened inside.
    n_latent : int
    widths : sequence of int
        Of the hidden layers, from the data to the latents; () makes both networks affine.
    likelihood : {"bernoulli", "continuous-bernoulli", "gaussian"}, mapping or Likelihood
        p(x | z). A mapping holds a name and options: ``{"name": "gaussian", "variance": 0.1, "learned": True}``. Data
        have to lie in [0, 1] for the first two.
    beta : float
        Weight of the KL in the loss (Higgins et al. 2017, "β-VAE", eq. 4). The ELBO reported is always that of β = 1.
    kl : {"closed", "monte_carlo"}
        KL(q ‖ N(0, I)) in closed form, or log q(z | x) − log p(z) at the sample that is decoded.
    activation : str
        As for `Autoencoder`.

    Notes
    -----
    log σ² is clamped to [−12, 12].

    Examples
    --------
    >>> model = VAE((1, 8, 8), 2, widths=(32,))
    >>> sorted(model.losses(torch.rand(10, 1, 8, 8)))
    ['elbo', 'kl', 'loss', 'reconstruction']
    >>> model.generate(3).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        data_shape: int | Sequence[int],
        n_latent: int,
        widths: Sequence[int] = (256,),
        likelihood: str | Mapping[str, Any] | Likelihood = "bernoulli",
        beta: float = 1.0,
        kl: str = "closed",
        activation: str = "relu",
    ) -> None:
        super().__init__()
        sizes = (data_shape,) if isinstance(data_shape, int | np.integer) else data_shape
        self.data_shape = check_sizes("data_shape", sizes)
        self.latent_shape = (check_integer("n_latent", n_latent, 1),)
        self.widths, self.activation = check_sizes("widths", widths, 0), activation
        self.beta, self.kl = check_number("beta", beta), check_choice("kl", kl, DIVERGENCES)
        self.likelihood = likelihood_of(likelihood)
        self.unit_interval = self.likelihood.unit_interval
        size, (n_latent,) = math.prod(self.data_shape), self.latent_shape
        self.encoder = dense((size, *self.widths, 2 * n_latent), activation)
        self.decoder = dense((n_latent, *self.widths[::-1], size), activation)

    def configuration(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "data_shape": list(self.data_shape),
            "n_latent": self.latent_shape[0],
            "widths": list(self.widths),
            "likelihood": self.likelihood.configuration(),
            "beta": self.beta,
            "kl": self.kl,
            "activation": self.activation,
        }

    # ---- the two networks

    def posterior(self, x: Tensor) -> Posterior:
        """q(z | x) of x, (N, *data_shape)."""
        mean, log_variance = self.encoder(self.check_input(x).flatten(1)).to(x.dtype).chunk(2, dim=-1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCES))

    def output(self, z: Tensor) -> Tensor:
        """What the decoder says about x, (..., *data_shape) for z (..., n_latent): see `emalgam.nn.likelihoods`."""
        return self.decoder(z).unflatten(-1, self.data_shape)

    def encode(self, x: Tensor) -> Tensor:
        """The mean of q(z | x), (N, n_latent)."""
        return self.posterior(x).mean

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], (N, *data_shape)."""
        return self.likelihood.mean(self.output(self.check_latents(z)))

    # ---- the prior

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) = log N(z; 0, I), (...) for z (..., n_latent)."""
        return -0.5 * (at_least_float32(z).square() + LOG_2_PI).sum(-1)

    def sample_prior(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """z ~ p(z), (n, n_latent)."""
        return standard_normal(next(self.parameters()), (check_integer("n", n, 1), *self.latent_shape), generator)

    def closed_kl(self, posterior: Posterior) -> Tensor:
        """KL(q(z | x) ‖ p(z)), (N,): ½ Σ (μ² + σ² − 1 − log σ²), Kingma and Welling (2014), appendix B."""
        return kl_gaussian(*posterior)

    def monte_carlo_kl(self, posterior: Posterior, z: Tensor) -> Tensor:
        """log q(z | x) − log p(z), (..., N), whose mean over z ~ q(z | x) is the KL."""
        return posterior.log_prob(z) - self.log_prior(z)

    # ---- bounds of log p(x)

    @torch.no_grad()
    def generate(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """E[x | z] of n latents drawn from the prior, (n, *data_shape); keeps no gradients."""
        return self.decode(self.sample_prior(n, generator=generator))

    def elbo_terms(self, x: Tensor, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """log p(x | z) at a sample z ~ q(z | x), and the KL as `kl` says, both (N,): the ELBO is their difference."""
        posterior = self.posterior(self.check(x))
        z = posterior.sample(generator=generator)
        kl = self.closed_kl(posterior) if self.kl == "closed" else self.monte_carlo_kl(posterior, z)
        return self.likelihood.log_density(x, self.output(z)), kl

    def elbo(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """An unbiased estimate of ELBO(x) from one sample, (N,), in nats per datum; `beta` has no part in it."""
        reconstruction, kl = self.elbo_terms(x, generator=generator)
        return reconstruction - kl

    def losses(self, x: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Means over the data, in nats per datum.

        "reconstruction" is log p(x | z), "kl" the KL, "elbo" the first less the second, and "loss" their negative
        with the KL times β.
        """
        reconstruction, kl = (term.mean() for term in self.elbo_terms(x, generator=generator))
        elbo = reconstruction - kl
        return {"loss": self.beta * kl - reconstruction, "elbo": elbo, "kl": kl, "reconstruction": reconstruction}

    def log_likelihood(self, x: Tensor, *, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """The importance-weighted bound of log p(x), (N,), in nats per datum.

        log 1/S Σ_s p(x | z_s) p(z_s) / q(z_s | x) with z_s ~ q(z | x). Its mean lies between the ELBO (S = 1) and
        log p(x), and grows with S. It is differentiable. Samples are decoded some at a time, and once more each in the
        backward pass, so that memory does not grow with S but for the latents themselves, and those not under
        ``torch.no_grad()``.

        References
        ----------
        Burda, Grosse, Salakhutdinov (2016), "Importance weighted autoencoders", eq. 8 and theorem 1.
        """
        n_samples = check_integer("n_samples", n_samples, 1)
        posterior = self.posterior(self.check(x))
        widest = max(math.prod(self.data_shape), *self.widths, 1)
        at_once = max(ELEMENTS_AT_ONCE // (widest * max(len(x), 1)), 1)
        total = at_least_float32(x).new_full(x.shape[:1], -math.inf)
        for first in range(0, n_samples, at_once):
            z = posterior.sample(min(at_once, n_samples - first), generator=generator)
            if at_once < n_samples and torch.is_grad_enabled():
                log_weight = checkpoint(self._log_weight, x, posterior, z, use_reentrant=False)
            else:
                log_weight = self._log_weight(x, posterior, z)
            total = torch.logaddexp(total, log_weight)
        return total - math.log(n_samples)

    def _log_weight(self, x: Tensor, posterior: Posterior, z: Tensor) -> Tensor:
        """log Σ_s p(x | z_s) p(z_s) / q(z_s | x), (N,), for z (S, N, n_latent)."""
        return (self.likelihood.log_density(x, self.output(z)) - self.monte_carlo_kl(posterior, z)).logsumexp(0)
