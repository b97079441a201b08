"""KL divergences inside a loss: of Gaussian posteriors to a Gaussian in closed form, to a mixture by estimators.

A posterior q has a `mean` (..., D) and either a `log_variance` (..., D), log σ², or a `scale_tril` (..., D, D), L with
Σ = L Lᵀ. Every result is in nats, one for each q, and differentiable in q and in the prior.

Letters: N posteriors, D features, K components, S samples.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from emalgam.nn.model import standard_normal
from emalgam.nn.prior import GaussianMixturePrior
from emalgam.packing import LOG_2_PI
from emalgam.validation import check_choice, check_integer

ESTIMATORS: Final = ("monte_carlo", "variational", "unscented")


class Divergence(NamedTuple):
    """KL(q ‖ p) of each q (...), and the standard error of a Monte Carlo mean (...), NaN for one sample; or None."""

    value: Tensor
    standard_error: Tensor | None


class Normal(NamedTuple):
    """N(mean, Σ) with Σ = diag(deviation²), or L Lᵀ for a `deviation` (..., D, D)."""

    mean: Tensor
    deviation: Tensor
    full: bool

    @classmethod
    def of(cls, mean: Tensor, log_variance: Tensor | None, scale_tril: Tensor | None, name: str = "q") -> Normal:
        """ValueError unless exactly one of the two is given, of the mean's shape; TypeError if one is no tensor."""
        for argument, value in {"mean": mean, "log_variance": log_variance, "scale_tril": scale_tril}.items():
            if value is not None and not (isinstance(value, Tensor) and value.ndim):
                raise TypeError(
                    f"{name}_{argument} is a {_kind(value)}; expected a torch tensor (..., D): torch.as_tensor"
                )
        given, D = {f"{name}_log_variance": log_variance, f"{name}_scale_tril": scale_tril}, mean.shape[-1]
        if (log_variance is None) == (scale_tril is None):
            number = "neither" if scale_tril is None else "both"
            raise ValueError(f"{number} of {' and '.join(given)} given; expected one of them")
        for argument, value in given.items():
            wanted = (D,) if argument.endswith("log_variance") else (D, D)
            if value is not None and tuple(value.shape[-len(wanted) :]) != wanted:
                raise ValueError(
                    f"{argument} has shape {tuple(value.shape)} beside {name}_mean of shape {tuple(mean.shape)}; "
                    f"expected (..., {', '.join(map(str, wanted))})"
                )
        if scale_tril is not None:
            return cls(mean, scale_tril.tril(), True)
        assert log_variance is not None
        return cls(mean, (0.5 * log_variance).exp(), False)

    def broadcast(self) -> Normal:
        """The same with leading axes in full on both sides, where one of them was shared."""
        own = 2 if self.full else 1
        shape = torch.broadcast_shapes(self.mean.shape[:-1], self.deviation.shape[:-own])
        mean = self.mean.expand(*shape, self.mean.shape[-1])
        return Normal(mean, self.deviation.expand(*shape, *self.deviation.shape[-own:]), self.full)

    @property
    def log_det(self) -> Tensor:
        """log |L| = ½ log |Σ|, (...)."""
        return (self.deviation.diagonal(dim1=-2, dim2=-1) if self.full else self.deviation).log().sum(-1)

    @property
    def entropy(self) -> Tensor:
        """H(q) = D/2 (1 + log 2π) + log |L|, (...)."""
        return 0.5 * self.mean.shape[-1] * (1 + LOG_2_PI) + self.log_det

    @property
    def factor(self) -> Tensor:
        """L, (..., D, D)."""
        return self.deviation if self.full else self.deviation.diag_embed()

    def steps(self, noise: Tensor) -> Tensor:
        """L ε for ε (..., D)."""
        return (self.deviation @ noise[..., None])[..., 0] if self.full else self.deviation * noise


def kl_gaussian(
    q_mean: Tensor,
    q_log_variance: Tensor | None = None,
    p_mean: Tensor | None = None,
    p_log_variance: Tensor | None = None,
    *,
    q_scale_tril: Tensor | None = None,
    p_scale_tril: Tensor | None = None,
) -> Tensor:
    """KL(q ‖ p) of Gaussians in closed form.

    Parameters
    ----------
    q_mean : (..., D)
    q_log_variance : (..., D), or q_scale_tril : (..., D, D)
    p_mean : (..., D), optional
    p_log_variance : (..., D), or p_scale_tril : (..., D, D), optional
        Without all three p is the standard normal distribution. Leading axes broadcast.

    Returns
    -------
    (...)
        ½ [tr(Σ_p⁻¹ Σ_q) + (μ_q − μ_p)ᵀ Σ_p⁻¹ (μ_q − μ_p) − D] + log |L_p| − log |L_q|, in nats.

    Raises
    ------
    ValueError
        If shapes do not go together, or a covariance is given twice or not at all.

    References
    ----------
    Kullback (1959), Information Theory and Statistics, chapter 9; Kingma, Welling (2014), Auto-Encoding Variational
    Bayes, appendix B.

    Examples
    --------
    >>> round(kl_gaussian(torch.tensor([1.0]), torch.tensor([0.0])).item(), 6)
    0.5
    >>> round(kl_gaussian(*(torch.tensor([each]) for each in (1.0, 0.0, 0.0, math.log(4.0)))).item(), 6)
    0.443147
    """
    q = Normal.of(q_mean, q_log_variance, q_scale_tril)
    if p_mean is None and p_log_variance is None and p_scale_tril is None:
        # ½ Σ (σ² + μ² − 1 − log σ²); for L its squares take the place of σ²
        squares = q.deviation.square().sum((-2, -1) if q.full else -1)
        return 0.5 * (squares + q_mean.square().sum(-1) - q_mean.shape[-1]) - q.log_det
    if p_mean is None:
        raise ValueError("p_mean is missing beside p's covariance; expected both, or neither for the standard normal")
    p = Normal.of(p_mean, p_log_variance, p_scale_tril, "p")
    if p.mean.shape[-1] != q.mean.shape[-1]:
        raise ValueError(
            f"q_mean has shape {tuple(q.mean.shape)} and p_mean {tuple(p.mean.shape)}; "
            "expected as many features in both"
        )
    return _closed_form(q, p)


def _kind(value: object) -> str:
    return "tensor of one number" if isinstance(value, Tensor) else type(value).__name__


def _closed_form(q: Normal, p: Normal) -> Tensor:
    offset = q.mean - p.mean
    if not p.full and not q.full:
        squares = ((q.deviation.square() + offset.square()) / p.deviation.square()).sum(-1)
    else:
        # ‖L_p⁻¹ L_q‖² + ‖L_p⁻¹ (μ_q − μ_p)‖²
        identity = torch.eye(offset.shape[-1], dtype=offset.dtype, device=offset.device)
        inverse = torch.linalg.solve_triangular(p.factor, identity, upper=False)
        # not inverse @ offset[..., None], which would copy the matrix of a component for each row
        squares = torch.einsum("...ij,...j->...i", inverse, offset).square().sum(-1)
        if q.full:
            squares = squares + (inverse @ q.deviation).square().sum((-2, -1))
        else:  # a sum over rows first: no (D, D) matrix for each pair
            squares = squares + (inverse.square().sum(-2) * q.deviation.square()).sum(-1)
    return 0.5 * (squares - offset.shape[-1]) + p.log_det - q.log_det


def kl_to_mixture(
    q_mean: Tensor,
    q_log_variance: Tensor | None,
    prior: GaussianMixturePrior,
    *,
    q_scale_tril: Tensor | None = None,
    estimator: str = "monte_carlo",
    n_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Divergence:
    """KL(q ‖ p) of Gaussians to a mixture, for which there is no closed form.

    ==============  =================================================  ===============================================
    estimator       value                                              what it is
    ==============  =================================================  ===============================================
    "monte_carlo"   mean of log q(z_s) − log p(z_s), z_s = μ + L ε_s   unbiased; with a standard error
    "variational"   −log Σ_k w_k exp(−KL(q ‖ p_k))                     an upper bound; exact for K = 1
    "unscented"     −H(q) − mean of log p(μ ± √D L e_i)                exact where log p is quadratic
    ==============  =================================================  ===============================================

    Parameters
    ----------
    q_mean : (..., D)
    q_log_variance : (..., D), or None beside a q_scale_tril (..., D, D)
    prior : GaussianMixturePrior
    estimator : {"monte_carlo", "variational", "unscented"}
    n_samples : int
        S, of "monte_carlo"; its memory is that of S · N rows, of "unscented" 2 D · N, of "variational" N · K, or
        N · K · D beside a q_scale_tril.
    generator : torch.Generator, optional
        Of "monte_carlo"; None is torch's own.

    Returns
    -------
    Divergence
        value and standard error (None unless "monte_carlo"), in nats, (...) each.

    Raises
    ------
    ValueError
        For shapes that do not go together, or an estimator that there is not.
    TypeError
        If q and the prior are of different dtypes.

    References
    ----------
    Hershey, Olsen (2007), Approximating the Kullback Leibler divergence between Gaussian mixture models, sections 2, 3
    and 7; that the variational value is a bound for a single Gaussian q follows from Jensen's inequality.

    Examples
    --------
    >>> prior = GaussianMixturePrior(1, 2)
    >>> q_mean, q_log_variance = torch.ones(3, 2), torch.zeros(3, 2)
    >>> found = kl_to_mixture(q_mean, q_log_variance, prior, estimator="variational").value
    >>> torch.allclose(found, kl_gaussian(q_mean, q_log_variance, prior.means[0], torch.zeros(2)))
    True
    """
    check_choice("estimator", estimator, ESTIMATORS)
    q = Normal.of(q_mean, q_log_variance, q_scale_tril).broadcast()
    if q_mean.shape[-1] != prior.n_features:
        raise ValueError(f"q_mean has shape {tuple(q_mean.shape)}; the prior has {prior.n_features} features")
    if q_mean.dtype != prior.means.dtype and not torch.is_autocast_enabled(q_mean.device.type):
        raise TypeError(
            f"q_mean has dtype {q_mean.dtype}, the prior {prior.means.dtype}; call prior.to({q_mean.dtype})"
        )
    if estimator == "monte_carlo":
        return _monte_carlo(q, prior, check_integer("n_samples", n_samples, 1), generator)
    return Divergence(_variational(q, prior) if estimator == "variational" else _unscented(q, prior), None)


def _monte_carlo(q: Normal, prior: GaussianMixturePrior, S: int, generator: torch.Generator | None) -> Divergence:
    mean, D = q.mean, q.mean.shape[-1]
    noise = standard_normal(mean, (S, *mean.shape), generator)
    # log q(μ + L ε) = −½ ‖ε‖² − D/2 log 2π − log |L|
    log_q = -0.5 * (noise.square().sum(-1) + D * LOG_2_PI) - q.log_det
    terms = log_q - prior.log_prob(mean + q.steps(noise))
    error = terms.std(0) / math.sqrt(S) if S > 1 else torch.full_like(terms[0], math.nan)
    return Divergence(terms.mean(0), error.detach())


def _variational(q: Normal, prior: GaussianMixturePrior) -> Tensor:
    # q (..., 1, D) beside the components (K, D)
    alone = Normal(q.mean[..., None, :], q.deviation[..., None, :, :] if q.full else q.deviation[..., None, :], q.full)
    each = _closed_form(alone, Normal(prior.means, prior.scale_tril, True))
    return -(prior.log_weights.log_softmax(0) - each).logsumexp(-1)


def _unscented(q: Normal, prior: GaussianMixturePrior) -> Tensor:
    D = q.mean.shape[-1]
    # The mean of log q over the points is −H(q): it is quadratic, and they have q's mean and covariance.
    steps = math.sqrt(D) * q.factor.mT.movedim(-2, 0)
    points = torch.cat([q.mean + steps, q.mean - steps])
    return -q.entropy - prior.log_prob(points).mean(0)
