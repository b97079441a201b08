"""p(x | z): what a decoder's output says about the data, element by element.

The output h of a decoder has the shape of the data, and any real numbers in it. Log-densities are in nats per datum:
summed over the elements of one x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from emalgam.nn.model import check_values
from emalgam.nn.tensors import at_least_float32, check_tensor, standard_normal
from emalgam.packing import LOG_2_PI
from emalgam.validation import check_choice, check_flag, check_positive

NEAR_ZERO: Final = 0.5  # |h| below which log((exp(h) − 1) / h) is a series
# B_2n / (2n (2n)!), n = 1, 2, …: log((exp(h) − 1) / h) = h/2 + Σ_n c_n h^2n; what is left out is < 1e-18 for |h| < ½
BERNOULLI_SERIES: Final = (
    1 / 24,
    -1 / 2880,
    1 / 181440,
    -1 / 9676800,
    1 / 479001600,
    -691 / 15692092416000,
    1 / 1046139494400,
)


class Likelihood(nn.Module):
    """p(x | h) of independent elements."""

    name: str
    unit_interval: bool = False

    def configuration(self) -> dict[str, Any]:
        """What `likelihood_of` needs to make another one."""
        return {"name": self.name}

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x | h), in nats per datum.

        Parameters
        ----------
        x : (N, *data_shape)
        output : (..., N, *data_shape)
            h; leading axes are samples.

        Returns
        -------
        (..., N)

        Raises
        ------
        ValueError
            Naming the first value of x that is not finite, or outside [0, 1] for those who need it there; and if the
            shapes do not go together.
        TypeError
            If one is no tensor of floating point.
        """
        for name, given in {"x": x, "output": output}.items():
            if not check_tensor(name, given).is_floating_point():
                raise TypeError(f"{name} has dtype {given.dtype}; expected a type of floating point: {name}.float()")
        if output.shape[output.ndim - x.ndim :] != x.shape:
            raise ValueError(
                f"output has shape {tuple(output.shape)}; expected (..., {', '.join(map(str, x.shape))}) as x has"
            )
        check_values(x, self.unit_interval, type(self).__name__)
        return self.log_density(x, output)

    def log_density(self, x: Tensor, output: Tensor) -> Tensor:
        """`log_prob` for values that have been checked; in float32 at least, as it is a sum of many."""
        x = at_least_float32(x)
        each = self._elements(x, output.to(x.dtype))
        return each[..., None].flatten(each.ndim - x.ndim + 1).sum(-1)  # an axis more: data may be single numbers

    def _elements(self, x: Tensor, h: Tensor) -> Tensor:
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """E[x | h], of the shape of h."""
        raise NotImplementedError

    def sample(self, output: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """x ~ p(x | h), of the shape of h."""
        raise NotImplementedError


class Gaussian(Likelihood):
    """x = h + σ ε, ε ~ N(0, I), with one σ² for all elements.

    Parameters
    ----------
    variance : float
        σ², or where it starts if it is learnt.
    learned : bool
        Whether log σ² is a parameter.

    Examples
    --------
    >>> Gaussian(variance=4.0).log_prob(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([-3.2242])
    """

    name = "gaussian"

    def __init__(self, variance: float = 1.0, learned: bool = False) -> None:
        super().__init__()
        self.initial_variance, self.learned = check_positive("variance", variance), check_flag("learned", learned)
        log_variance = math.log(variance)
        self.log_variance: Any = nn.Parameter(torch.tensor(log_variance)) if learned else log_variance

    def configuration(self) -> dict[str, Any]:
        """Name, the variance at the start, and whether it is learnt."""
        return {"name": self.name, "variance": self.initial_variance, "learned": self.learned}

    @property
    def variance(self) -> Tensor | float:
        """σ², a number, or a tensor () if it is learnt."""
        return self.log_variance.exp() if self.learned else self.initial_variance

    def _elements(self, x: Tensor, h: Tensor) -> Tensor:
        return -0.5 * ((x - h).square() / self.variance + self.log_variance + LOG_2_PI)

    def mean(self, output: Tensor) -> Tensor:
        """E[x | h] = h."""
        return output

    def sample(self, output: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """h + σ ε."""
        return output + self.variance**0.5 * standard_normal(output, output.shape, generator)


class Bernoulli(Likelihood):
    """x = 1 with probability 1 / (1 + exp(−h)).

    For x strictly between 0 and 1 this is the negative cross entropy, which people maximise too, but no log-density of
    x: it does not integrate to one. `ContinuousBernoulli` does.

    Examples
    --------
    >>> Bernoulli().log_prob(torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 3))  # 3 log ½
    tensor([-2.0794])
    """

    name = "bernoulli"
    unit_interval = True

    def _elements(self, x: Tensor, h: Tensor) -> Tensor:
        return x * h - functional.softplus(h)

    def mean(self, output: Tensor) -> Tensor:
        """E[x | h] = 1 / (1 + exp(−h))."""
        return torch.sigmoid(output)

    def sample(self, output: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones."""
        return torch.bernoulli(self.mean(output), generator=generator)


class ContinuousBernoulli(Likelihood):
    """p(x | h) = exp(h x − A(h)) on [0, 1], with A(h) = log ∫₀¹ exp(h x) dx = log((exp(h) − 1) / h).

    With λ = 1 / (1 + exp(−h)) that is C(λ) λˣ (1 − λ)¹⁻ˣ of Loaiza-Ganem and Cunningham (2019), "The continuous
    Bernoulli: fixing a pervasive error in variational autoencoders", eq. 7-8, whose C(λ) = h / tanh(h / 2) is hard to
    compute at λ = ½ (h = 0). Here the logit h is never turned into λ, and A is even a series there.

    Examples
    --------
    >>> ContinuousBernoulli().log_prob(torch.tensor([[0.3]]), torch.zeros(1, 1))  # the uniform density
    tensor([0.])
    """

    name = "continuous-bernoulli"
    unit_interval = True

    def _elements(self, x: Tensor, h: Tensor) -> Tensor:
        return x * h - log_partition(h)

    def mean(self, output: Tensor) -> Tensor:
        """E[x | h] = A′(h) = 1 / (1 − exp(−h)) − 1 / h."""
        near, small, a = _split(output)
        # ½ + Σ_n 2n c_n h^(2n−1)
        series = 0.5 + small * _polynomial(small**2, [2 * n * c for n, c in enumerate(BERNOULLI_SERIES, 1)])
        below = 1 / a - torch.exp(-a) / -torch.expm1(-a)  # at −|h|
        return torch.where(near, series, torch.where(output < 0, below, 1 - below))

    def sample(self, output: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """By the inverse of the distribution function: x = log(1 + u (exp(h) − 1)) / h."""
        u = torch.rand(output.shape, generator=generator, dtype=output.dtype, device=output.device)
        a = output.abs().clamp_min(torch.finfo(output.dtype).tiny)
        at_minus = (-torch.log1p(u * torch.expm1(-a)) / a).clamp(0, 1)  # at −|h|; its mirror image is that at |h|
        return torch.where(output < 0, at_minus, 1 - at_minus)


def log_partition(h: Tensor) -> Tensor:
    """A(h) = log((exp(h) − 1) / h), and its gradient, for every h."""
    near, small, a = _split(h)
    series = small / 2 + small**2 * _polynomial(small**2, BERNOULLI_SERIES)
    # (exp(h) − 1) / h = exp(max(h, 0)) (1 − exp(−|h|)) / |h|
    return torch.where(near, series, functional.relu(h) + torch.log(-torch.expm1(-a) / a))


def _split(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where h is near zero, h there (else 0), |h| elsewhere (else 1): no branch sees what makes its gradient NaN."""
    near = h.abs() < NEAR_ZERO
    return near, torch.where(near, h, 0.0), torch.where(near, 1.0, h).abs()


def _polynomial(x: Tensor, coefficients: Any) -> Tensor:
    """Σ_i c_i xⁱ, by Horner's rule."""
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


LIKELIHOODS: Final[dict[str, type[Likelihood]]] = {
    each.name: each for each in (Gaussian, Bernoulli, ContinuousBernoulli)
}


def likelihood_of(value: str | Mapping[str, Any] | Likelihood) -> Likelihood:
    """A likelihood from its name, from its configuration, or itself; ValueError that lists the names or the options."""
    if isinstance(value, Likelihood):
        return value
    options = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = check_choice("likelihood", options.pop("name", None), tuple(LIKELIHOODS))
    known = [each for each in LIKELIHOODS[name]().configuration() if each != "name"]
    for option in options:
        if option not in known:
            raise ValueError(f"likelihood {name!r} has no option {option!r}; expected {' or '.join(known) or 'none'}")
    return LIKELIHOODS[name](**options)
