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

from emalgam.nn.prior import GaussianMixturePrior
from emalgam.nn.tensors import (
    at_least_float32,
    check_alike,
    check_tensor,
    standard_normal,
    without_autocast,
)
from emalgam.packing import LOG_2_PI
from emalgam.validation import check_choice, check_integer

ESTIMATORS: Final = ("monte_carlo", "variational", "unscented")


class Divergence(NamedTuple):
    """KL(q ‖ p) of each q (...), and the standard error of a Monte Carlo mean (...), NaN for one sample; or None."""

    value: Tensor
    standard_error: Tensor | None


class Normal(NamedTuple):
    """N(mean, Σ), `spread` being log σ² (..., D) of a diagonal Σ, or L (..., D, D) with Σ = L Lᵀ."""

    mean: Tensor
    spread: Tensor
    full: bool

    @classmethod
    def of(cls, mean: Tensor, log_variance: Tensor | None, scale_tril: Tensor | None, name: str = "q") -> Normal:
        """Of what the user gave, in float32 at least; ValueError or TypeError for what does not go together."""
        spreads = {f"{name}_log_variance": log_variance, f"{name}_scale_tril": scale_tril}
        given = {argument: value for argument, value in spreads.items() if value is not None}
        if len(given) != 1:
            number = "both" if given else "neither"
            raise ValueError(f"{number} of {' and '.join(spreads)} given; expected one of them")
        location, (argument, spread), full = f"{name}_mean", *given.items(), scale_tril is not None
        mean, spread = _real(location, mean), _real(argument, spread)
        check_alike(**{location: mean, argument: spread})
        _check_shapes((location, mean), (argument, spread), full)
        return cls(mean, spread.tril() if full else spread, full)

    def broadcast(self) -> Normal:
        """The same with leading axes in full on both sides, where one of them was shared."""
        own = 2 if self.full else 1
        shape = torch.broadcast_shapes(self.mean.shape[:-1], self.spread.shape[:-own])
        mean = self.mean.expand(*shape, self.mean.shape[-1])
        return Normal(mean, self.spread.expand(*shape, *self.spread.shape[-own:]), self.full)

    def beside_components(self) -> Normal:
        """The same with an axis for components, (..., 1)."""
        return Normal(self.mean[..., None, :], self.spread.unsqueeze(-3 if self.full else -2), self.full)

    @property
    def log_det(self) -> Tensor:
        """log |L| = ½ log |Σ|, (...)."""
        return self.spread.diagonal(dim1=-2, dim2=-1).log().sum(-1) if self.full else 0.5 * self.spread.sum(-1)

    @property
    def entropy(self) -> Tensor:
        """H(q) = D/2 (1 + log 2π) + log |L|, (...)."""
        return 0.5 * self.mean.shape[-1] * (1 + LOG_2_PI) + self.log_det

    @property
    def factor(self) -> Tensor:
        """L, (..., D, D)."""
        return self.spread if self.full else (0.5 * self.spread).exp().diag_embed()

    def steps(self, noise: Tensor) -> Tensor:
        """L ε for ε (..., D)."""
        return (self.spread @ noise[..., None])[..., 0] if self.full else (0.5 * self.spread).exp() * noise


def _real(name: str, given: Tensor) -> Tensor:
    """A tensor (..., D) of floating point, in float32 at least; TypeError for anything else."""
    if not check_tensor(name, given).ndim or not given.is_floating_point():
        kind = f"tensor of {given.dtype}" if given.ndim else "tensor of one number"
        raise TypeError(f"{name} is a {kind}; expected a torch tensor (..., D) of floating point")
    return at_least_float32(given)


def _check_shapes(mean: tuple[str, Tensor], spread: tuple[str, Tensor], full: bool) -> None:
    """ValueError unless a covariance fits to its mean, and leading axes broadcast."""
    shapes = tuple(mean[1].shape), tuple(spread[1].shape)
    wanted = shapes[0][-1:] * (2 if full else 1)
    if shapes[1][-len(wanted) :] != wanted or not _go_together(shapes[0][:-1], shapes[1][: -len(wanted)]):
        raise ValueError(
            f"{spread[0]} has shape {shapes[1]} beside {mean[0]} of shape {shapes[0]}; expected "
            f"(..., {', '.join(map(str, wanted))}) with the same axes in front, or axes of length 1"
        )


def _go_together(*shapes: tuple[int, ...]) -> bool:
    """Whether they broadcast."""
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True


def kl_gaussian(
    q_mean: Tensor,
    q_log_variance: Tensor | None = None,
    p_mean: Tensor | None = None,
    p_log_variance: Tensor | None = None,
    *,
    q_scale_tril: Tensor | None = None,
    p_scale_tril: Tensor | None = None,
) -> Tensor:
    """KL(q ‖ p) of Gaussians in closed form, in float32 at least, under autocast too.

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
        If shapes or devices do not go together, or a covariance is given twice or not at all.
    TypeError
        If dtypes do not, or are not of floating point.

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
        with without_autocast(q_mean):
            return _to_standard(q)
    if p_mean is None:
        raise ValueError("p_mean is missing beside p's covariance; expected both, or neither for the standard normal")
    p = Normal.of(p_mean, p_log_variance, p_scale_tril, "p")
    check_alike(q_mean=q.mean, p_mean=p.mean)
    shapes = tuple(q.mean.shape), tuple(p.mean.shape)
    if shapes[0][-1] != shapes[1][-1] or not _go_together(*shapes):
        raise ValueError(
            f"q_mean has shape {shapes[0]} and p_mean {shapes[1]}; expected as many features in both, and the same "
            "axes in front, or axes of length 1"
        )
    with without_autocast(q_mean):
        return _closed_form(q, p)


def _to_standard(q: Normal) -> Tensor:
    if q.full:
        # ½ (‖L‖² + ‖μ‖² − D) − log |L|
        return 0.5 * (q.spread.square().sum((-2, -1)) + q.mean.square().sum(-1) - q.mean.shape[-1]) - q.log_det
    # ½ Σ (σ² − 1 − log σ² + μ²), each difference a small one where q is nearly the prior
    return 0.5 * (q.spread.expm1() - q.spread + q.mean.square()).sum(-1)


def _closed_form(q: Normal, p: Normal) -> Tensor:
    offset = q.mean - p.mean
    if not p.full and not q.full:
        # ½ Σ (σ_q²/σ_p² − 1 − log σ_q²/σ_p² + (μ_q − μ_p)²/σ_p²): neither variance by itself, which may underflow
        log_ratio = q.spread - p.spread
        return 0.5 * (log_ratio.expm1() - log_ratio + (offset / (0.5 * p.spread).exp()).square()).sum(-1)
    # ‖L_p⁻¹ L_q‖² + ‖L_p⁻¹ (μ_q − μ_p)‖²
    identity = torch.eye(offset.shape[-1], dtype=offset.dtype, device=offset.device)
    inverse = torch.linalg.solve_triangular(p.factor, identity, upper=False)
    # not inverse @ offset[..., None], which would copy the matrix of a component for each row
    squares = torch.einsum("...ij,...j->...i", inverse, offset).square().sum(-1)
    if q.full:
        squares = squares + (inverse @ q.spread).square().sum((-2, -1))
    else:  # a sum over rows first: no (D, D) matrix for each pair
        squares = squares + (inverse.square().sum(-2) * q.spread.exp()).sum(-1)
    return 0.5 * (squares - offset.shape[-1]) + p.log_det - q.log_det


def kl_to_mixture(
    q_mean: Tensor,
    q_log_variance: Tensor | None,
    prior: GaussianMixturePrior,
    *,
    q_scale_tril: Tensor | None = None,
    estimator: str = "monte_carlo",
    n_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Divergence:
    """KL(q ‖ p) of Gaussians to a mixture, for which there is no closed form; in float32 at least.

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
        Both at once are ``*vae.posterior(x)``.
    prior : GaussianMixturePrior
    estimator : {"monte_carlo", "variational", "unscented"}
    n_samples : int, optional
        S, of "monte_carlo" alone, where None is 1. Its memory is that of S · N rows, of "unscented" 2 D · N rows, of
        "variational" N · K rows, or N · K matrices beside a q_scale_tril.
    generator : torch.Generator, optional
        Of "monte_carlo" alone; None is torch's own.

    Returns
    -------
    Divergence
        value and standard error (None unless "monte_carlo"), in nats, (...) each.

    Raises
    ------
    ValueError
        For shapes or devices that do not go together, an estimator that there is not, or arguments of another one.
    TypeError
        If q and the prior are of different dtypes, or the prior is something else.

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
    samples = check_choice("estimator", estimator, ESTIMATORS) == "monte_carlo"
    if not isinstance(prior, GaussianMixturePrior):
        raise TypeError(
            f"prior is a {type(prior).__name__}; expected a GaussianMixturePrior: GaussianMixturePrior.from_fit(prior)"
        )
    q = Normal.of(q_mean, q_log_variance, q_scale_tril).broadcast()
    prior.check_rows("q_mean", q_mean)
    if not samples and not (n_samples is None and generator is None):
        raise ValueError(f"estimator {estimator!r} draws no samples; leave out n_samples and generator")
    with without_autocast(q_mean):
        if samples:
            S = 1 if n_samples is None else check_integer("n_samples", n_samples, 1)
            return _monte_carlo(q, prior, S, generator)
        return Divergence(_variational(q, prior) if estimator == "variational" else _unscented(q, prior), None)


def _monte_carlo(q: Normal, prior: GaussianMixturePrior, S: int, generator: torch.Generator | None) -> Divergence:
    mean, D = q.mean, q.mean.shape[-1]
    noise = standard_normal(mean, (S, *mean.shape), generator)
    # log q(μ + L ε) = −½ ‖ε‖² − D/2 log 2π − log |L|
    log_q = -0.5 * (noise.square().sum(-1) + D * LOG_2_PI) - q.log_det
    terms = log_q - prior.log_density(mean + q.steps(noise))
    value = terms.mean(0)
    squares = (terms - value).detach().square().sum(0)
    return Divergence(value, (squares / (S * (S - 1))).sqrt() if S > 1 else torch.full_like(squares, math.nan))


def _variational(q: Normal, prior: GaussianMixturePrior) -> Tensor:
    return -log_shares(q, prior).logsumexp(-1)


def components_of(prior: GaussianMixturePrior) -> Normal:
    """N(μ_k, Σ_k) of the prior's components, (K, D)."""
    spread = 2.0 * prior.log_deviations if prior.diagonal else prior.scale_tril
    return Normal(at_least_float32(prior.means), spread, not prior.diagonal)


def log_shares(q: Normal, prior: GaussianMixturePrior) -> Tensor:
    """log w_k − KL(q ‖ p_k) for each component of the prior, (..., K)."""
    with without_autocast(q.mean):
        return at_least_float32(prior.log_weights).log_softmax(0) - _closed_form(
            q.beside_components(), components_of(prior)
        )


def _unscented(q: Normal, prior: GaussianMixturePrior) -> Tensor:
    D = q.mean.shape[-1]
    # The mean of log q over the points is −H(q): it is quadratic, and they have q's mean and covariance.
    steps = math.sqrt(D) * q.factor.mT.movedim(-2, 0)
    points = torch.cat([q.mean + steps, q.mean - steps])
    return -q.entropy - prior.log_density(points).mean(0)
