"""A Gaussian mixture as part of a model: trained by gradients, refreshed by EM, filled from a fit and fitted back.

Letters: N rows, D features, K components.
"""

from __future__ import annotations

import math
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor, nn

from emalgam import arrays, backends
from emalgam.draws import LARGEST_SEED, sampler_of
from emalgam.em import Settings
from emalgam.gaussian import as_mixture
from emalgam.mixture import Mixture, check_numbers
from emalgam.namespace import to_host
from emalgam.nn.operators import mixture_log_prob, mixture_responsibilities
from emalgam.nn.tensors import as_rows, at_least_float32, check_beside, check_generator, check_tensor
from emalgam.stepwise import Memory, Running
from emalgam.validation import check_choice, check_data, check_finite, check_integer, check_weight

COVARIANCE_TYPES: Final = ("diag", "full")
LEAST_VARIANCE: Final = 1e-6  # of a latent, that "auto" takes 1e-6 of


class GaussianMixturePrior(nn.Module):
    """p(z) = Σ_k w_k N(z; μ_k, L_k L_kᵀ) with trainable parameters.

    Parameters
    ----------
    n_components, n_features : int
        K and D. Means begin as standard normal numbers from torch's generator, weights equal, covariances the identity.
    covariance_type : {"full", "diag"}
    dtype, device : optional
        Of 16 bits only what is kept: everything is computed in float32 at least.

    Attributes
    ----------
    log_weights : (K,) parameter
        w is their softmax.
    means : (K, D) parameter
    log_cholesky : (K, D, D) parameter, (K, D) for "diag"
        L below the diagonal, log L on it; above it nothing is read. Of "diag" the logs alone. Every finite value is a
        valid covariance, as `log_deviations` clamps the logs, unless what lies below the diagonal is so large that L Lᵀ
        or its inverse overflows.

    References
    ----------
    Pinheiro, Bates (1996), Unconstrained parametrizations for variance-covariance matrices, section 2.2 (log-Cholesky).

    Examples
    --------
    >>> import emalgam
    >>> coin = emalgam.Mixture([0.5, 0.5], [[-1.0], [1.0]], [1.0, 1.0], "spherical")
    >>> prior = GaussianMixturePrior.from_fit(coin, dtype=torch.float64)
    >>> [round(value, 6) for value in prior.log_prob(torch.zeros(2, 1, dtype=torch.float64)).tolist()]
    [-1.418939, -1.418939]
    >>> z, labels = prior.sample(4, generator=torch.Generator().manual_seed(0))
    >>> z.shape, labels.shape
    (torch.Size([4, 1]), torch.Size([4]))
    """

    def __init__(
        self,
        n_components: int,
        n_features: int,
        covariance_type: str = "full",
        *,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.covariance_type = check_choice("covariance_type", covariance_type, COVARIANCE_TYPES)
        K, D = check_integer("n_components", n_components, 1), check_integer("n_features", n_features, 1)
        how: dict[str, Any] = {"dtype": dtype, "device": device}
        self.log_weights = nn.Parameter(torch.zeros(K, **how))
        self.means = nn.Parameter(torch.randn(K, D, **how))
        self.log_cholesky = nn.Parameter(torch.zeros((K, D) if self.diagonal else (K, D, D), **how))

    @classmethod
    def from_fit(cls, fit: Any, **options: Any) -> Self:
        """A prior that begins as a fitted mixture.

        Parameters
        ----------
        fit : Mixture, fitted GaussianMixture or LatentMixtureSampler, Fit, or Gaussian
            Of any covariance type; a "diag" prior takes the variances only. A weight of zero becomes the smallest
            number.
        options
            The constructor's: covariance type, dtype and device. The dtype is torch's default one, float32, as that of
            models is.

        Raises
        ------
        ValueError
            If it is no mixture.
        """
        held = getattr(fit, "mixture", None)
        mixture = as_mixture("fit", held if isinstance(held, Mixture) else fit)
        prior = cls(*mixture.means.shape, **options)
        prior.set(mixture)
        return prior

    @torch.no_grad()
    def set(self, mixture: Mixture) -> None:
        """Make this prior equal to a mixture of as many components and features, in place."""
        K, D = mixture.means.shape
        own = tuple(self.means.shape)
        if own != (K, D):
            raise ValueError(
                f"the mixture has {K} components in {D} features and this prior {own[0]} in {own[1]}, which cannot "
                "change; make another with GaussianMixturePrior.from_fit"
            )
        least = torch.finfo(self.log_weights.dtype).tiny
        for parameter, value in (
            (self.log_weights, np.log(np.maximum(mixture.weights, least))),
            (self.means, mixture.means),
            (self.log_cholesky, self._log_cholesky_of(mixture)),
        ):
            parameter.copy_(torch.from_numpy(np.array(value)))

    def _log_cholesky_of(self, mixture: Mixture) -> np.ndarray:
        """`log_cholesky` of a mixture's covariances, of whichever type; logs beyond the clamp begin at its end."""
        factors = sampler_of(mixture).factors  # L, or its diagonal
        if self.diagonal:  # σ_i² = Σ_j L_ij²
            deviations = factors if factors.ndim == 2 else np.linalg.norm(np.tril(factors), axis=2)
            return np.log(deviations).clip(*self._log_range())
        lower = np.tril(factors) if factors.ndim == 3 else factors[:, :, None] * np.eye(self.n_features)
        diagonal = np.einsum("kdd->kd", lower)
        diagonal[...] = np.log(diagonal).clip(*self._log_range())
        return lower

    @torch.no_grad()
    def to_fit(self) -> Mixture:
        """This prior as a value, of its covariance type, on the host; ValueError if a parameter is not finite."""
        weights, means, spread = (
            check_numbers(name, to_host(getattr(self, name).double()))
            for name in ("weights", "means", "log_deviations" if self.diagonal else "scale_tril")
        )
        if self.diagonal:
            return Mixture(weights / weights.sum(), means, np.exp(2.0 * spread), "diag")
        return Mixture.from_cholesky(weights, means, spread)

    # ---- parameters as the formula has them

    @property
    def n_components(self) -> int:
        """K."""
        return int(self.means.shape[0])

    @property
    def n_features(self) -> int:
        """D."""
        return int(self.means.shape[1])

    @property
    def diagonal(self) -> bool:
        """Whether covariances are diagonal."""
        return self.covariance_type == "diag"

    @property
    def weights(self) -> Tensor:
        """w, (K,), summing to one."""
        return at_least_float32(self.log_weights).softmax(0)

    @property
    def log_deviations(self) -> Tensor:
        """The logs of L's diagonal, (K, D), clamped: log σ where covariances are diagonal.

        They are clamped to where the dtype holds σ², ±43.7 in float32. The gradient goes through the clamp as if there
        were none: a component that left the range can come back.
        """
        own = at_least_float32(self.log_cholesky)
        free = own if self.diagonal else own.diagonal(dim1=1, dim2=2)
        return free.clamp(*self._log_range()).detach() + (free - free.detach())

    def _log_range(self) -> tuple[float, float]:
        """The least and the largest log-deviation: those of the smallest normal variance and of its inverse."""
        least = 0.5 * math.log(torch.finfo(at_least_float32(self.log_cholesky).dtype).tiny)
        return least, -least

    @property
    def scale_tril(self) -> Tensor:
        """L, (K, D, D), lower triangular with a positive diagonal."""
        diagonal = self.log_deviations.exp().diag_embed()
        return diagonal if self.diagonal else diagonal + at_least_float32(self.log_cholesky).tril(-1)

    def extra_repr(self) -> str:
        sizes = f"n_components={self.n_components}, n_features={self.n_features}"
        return f"{sizes}, covariance_type={self.covariance_type!r}"

    # ---- evaluation

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, (...) for z (..., D); differentiable in z and the parameters."""
        return self.log_density(self.check_rows("z", z))

    def log_density(self, z: Tensor) -> Tensor:
        """`log_prob` of latents that have been checked, which may have more digits than this prior."""
        return mixture_log_prob(*self._arguments(z))

    def responsibilities(self, z: Tensor) -> Tensor:
        """r_k(z), (..., K) for z (..., D); differentiable in z and the parameters."""
        return mixture_responsibilities(*self._arguments(self.check_rows("z", z)))

    def forward(self, z: Tensor) -> Tensor:
        """`log_prob`."""
        return self.log_prob(z)

    def check_rows(self, name: str, z: Tensor) -> Tensor:
        """`z` if it has this prior's features, dtype and device; TypeError or ValueError that names it."""
        if check_tensor(name, z).shape[-1:] != self.means.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(z.shape)}; the prior has {self.n_features} features")
        return check_beside(name, z, self.means, "prior")

    def _arguments(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the operators take."""
        return at_least_float32(z), self.weights, at_least_float32(self.means), self.scale_tril

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw z ~ p, without gradients.

        Parameters
        ----------
        n : int
        generator : torch.Generator, optional
            Gives the seed; None is torch's own. One state of it always gives the same rows, of which the first do not
            depend on n.

        Returns
        -------
        z : (n, D) of the parameters' type, on their device
            In random order.
        labels : (n,) int64
            The component of each row.
        """
        where, N = arrays.read(at_least_float32(self.means.detach())), check_integer("n", n, 1)
        z = arrays.empty((N, self.n_features), arrays.tile_dtype(where), where)
        labels = arrays.empty((N,), np.int64, where)
        kernels = backends.kernels(backends.resolve("auto", where), "sampling")
        sampler, seed = sampler_of(self.to_fit()), draw_seed(generator)
        kernels.sample_mixture(sampler, seed, 0, z, labels, n_threads=torch.get_num_threads())
        return arrays.like(z, self.means).to(self.means.dtype), arrays.like(labels, self.means)

    # ---- EM

    @torch.no_grad()
    def refresh(
        self, z: Tensor, weights: Tensor | None = None, step: float = 1.0, reg_covar: float | str = "auto"
    ) -> float:
        """One step of EM on latents, in place.

        The parameters are the statistics ŝ that they imply, w_k (1, μ_k, Σ_k + μ_k μ_kᵀ), so a stepwise M-step needs to
        remember nothing: ŝ ← (1 − step) ŝ + step · s(z). A step of 1 is an iteration of EM on z alone.

        Parameters
        ----------
        z : (..., D)
            Latents; no gradient flows through them.
        weights : (...) tensor, optional
            ω ≥ 0: weight 2 counts a row twice.
        step : float
            0 < step ≤ 1; for minibatches smaller than one, and falling.
        reg_covar : float or "auto"
            Added to the diagonal of every covariance; "auto" adds 1e-6 of each feature's variance under the prior, and
            1e-12 at least: a latent that is constant would otherwise lose the rest of its variance step by step.

        Returns
        -------
        float
            The mean of log p(z) before the step, in nats.

        Raises
        ------
        ValueError
            For latents of a wrong shape, NaN or infinity in them or in the parameters, or a step that is not in (0, 1].
        TypeError
            If z or weights are no tensors.

        References
        ----------
        Cappé, Moulines (2009), On-line expectation-maximization algorithm for latent data models.
        """
        if not 0 < step <= 1:
            raise ValueError(f"step is {step}; expected a number above 0, up to 1")
        settings = Settings(reg_covar=reg_covar)
        latents = at_least_float32(check_tensor("z", z).detach())
        rows = check_data(as_rows("z", latents), n_features=self.n_features, name="z")
        check_finite(rows, name="z")
        if weights is not None:
            weights = at_least_float32(check_tensor("weights", weights).detach()).reshape(-1)
        omega = check_weight(weights, len(rows))
        running = Running.of(self.to_fit(), Memory.of(1.0), least_variance=LEAST_VARIANCE)
        moved, log_prob = running.step(
            rows, omega, settings, backends.resolve("auto", rows), torch.get_num_threads(), float(step)
        )
        self.set(moved.mixture)
        return log_prob


def draw_seed(generator: torch.Generator | None) -> int:
    """A key for the sampling kernels from a torch generator."""
    check_generator(generator)
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(LARGEST_SEED // 4, (), generator=generator, device=device))
