"""Likelihoods of decoders against SciPy and mpmath, near h = 0 and at large logits too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from emalgam.nn import Bernoulli, ContinuousBernoulli, Gaussian, Likelihood
from emalgam.nn.likelihoods import LIKELIHOODS, likelihood_of, log_partition
from tests.tolerances import EPS, STANDARD_ERRORS, tolerance
from tests.torch.nn import oracles

# around 0, around the end of the series (½), where exp overflows float32 (89) and float64 (710), and beyond
LOGITS = [0.0, 1e-30, 1e-8, 1e-4, 0.1, 0.4999, 0.5, 0.50001, 1.0, 3.0, 30.0, 100.0, 800.0, 1e4]
BOTH = [*LOGITS, *(-h for h in LOGITS[1:])]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_log_normaliser_and_its_slopes(dtype: torch.dtype) -> None:
    h = torch.tensor(BOTH, dtype=dtype, requires_grad=True)
    value = log_partition(h)
    (slope,) = torch.autograd.grad(value.sum(), h)
    mean = ContinuousBernoulli().mean(h)
    (curvature,) = torch.autograd.grad(mean.sum(), h)
    bound = tolerance("continuous Bernoulli", name_of(dtype))
    for i, logit in enumerate(h.tolist()):
        exact = float(oracles.log_partition(logit))
        assert abs(float(oracles.log_partition(logit) - value[i].item())) <= bound * (1 + abs(exact)), logit
        expected = oracles.continuous_mean(logit)
        assert abs(float(expected - slope[i].item())) <= bound, logit
        assert abs(float(expected - mean[i].item())) <= bound, logit
    assert torch.isfinite(curvature).all()
    assert ((curvature > 0) & (curvature <= 1 / 12 + bound)).all()  # the variance: largest for the uniform density


def test_continuous_bernoulli_is_that_of_the_paper() -> None:
    for probability in (0.01, 0.3, 0.4, 0.5, 0.6, 0.9):
        h = math.log(probability / (1 - probability))
        for x in (0.0, 0.2, 1.0):
            ours = ContinuousBernoulli().log_prob(*(torch.tensor([[v]], dtype=torch.float64) for v in (x, h)))
            assert ours.item() == pytest.approx(oracles.continuous_bernoulli(x, probability), abs=1e-13)


@pytest.mark.parametrize("h", [-40.0, -1.0, 0.0, 1e-3, 5.0])
def test_continuous_bernoulli_is_a_density(h: float) -> None:
    def density(x: float) -> float:
        pair = torch.tensor([[x]], dtype=torch.float64), torch.tensor([[h]], dtype=torch.float64)
        return ContinuousBernoulli().log_prob(*pair).exp().item()

    assert integrate.quad(density, 0, 1, epsabs=1e-12)[0] == pytest.approx(1.0, abs=1e-9)


def test_bernoulli_and_gaussian_against_scipy() -> None:
    rng = np.random.default_rng(0)
    h, bits, x = rng.normal(size=(5, 3, 2)) * 3, rng.integers(0, 2, (5, 3, 2)), rng.normal(size=(5, 3, 2))
    ours = Bernoulli().log_prob(torch.tensor(bits, dtype=torch.float64), torch.tensor(h))
    expected = stats.bernoulli.logpmf(bits, 1 / (1 + np.exp(-h))).sum((1, 2))
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    for learned in (False, True):
        likelihood = Gaussian(0.3, learned=learned).double()
        ours = likelihood.log_prob(torch.tensor(x), torch.tensor(h)).detach()
        expected = stats.norm.logpdf(x, h, math.sqrt(0.3)).sum((1, 2))
        # a parameter is created in float32, and log 0.3 rounded there
        np.testing.assert_allclose(ours, expected, rtol=EPS["float32"] * 4 if learned else 1e-12)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_leading_axes_are_samples(name: str) -> None:
    likelihood, x = likelihood_of(name), torch.rand(4, 3, 2)
    output = torch.randn(6, 4, 3, 2)
    log_prob = likelihood.log_prob(x, output)
    assert log_prob.shape == (6, 4)
    torch.testing.assert_close(log_prob[2], likelihood.log_prob(x, output[2]))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_have_the_mean(name: str) -> None:
    likelihood, N = likelihood_of(name), 40_000
    h = torch.tensor([-80.0, -2.0, -1e-4, 0.0, 0.3, 4.0]).expand(N, 6)
    x = likelihood.sample(h, generator=torch.Generator().manual_seed(0))
    assert x.shape == h.shape
    error = x.std(0) / math.sqrt(N) + EPS["float32"] * 100  # the last: no spread at all where all bits are zero
    assert ((x.mean(0) - likelihood.mean(h)[0]).abs() <= STANDARD_ERRORS * error).all()
    assert torch.equal(x, likelihood.sample(h, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("h", [-30.0, -1e-3, 0.0, 2.0, 90.0])
def test_samples_of_the_continuous_bernoulli(h: float) -> None:
    """Kolmogorov and Smirnov, a false alarm once in 1e6, and the seed is fixed."""

    def distribution(x: np.ndarray) -> np.ndarray:
        return x if h == 0 else np.expm1(-abs(h) * x) / np.expm1(-abs(h))

    output = torch.full((20_000,), h, dtype=torch.float64)
    x = ContinuousBernoulli().sample(output, generator=torch.Generator().manual_seed(1)).numpy()
    assert ((x >= 0) & (x <= 1)).all()
    assert stats.kstest(1 - x if h > 0 else x, distribution).pvalue > 1e-6


def test_the_learned_variance_is_the_mean_square() -> None:
    """The derivative of the likelihood in log σ² is zero at the mean square, and only there."""
    likelihood, x = Gaussian(0.5, learned=True), torch.randn(50, 4)
    square = x.square().mean()
    for variance, sign in ((square, 0), (square / 2, 1), (square * 2, -1)):
        with torch.no_grad():
            likelihood.log_variance.copy_(variance.log())
        (slope,) = torch.autograd.grad(likelihood.log_prob(x, torch.zeros(50, 4)).mean(), likelihood.log_variance)
        assert slope.item() == pytest.approx(0, abs=1e-5) if sign == 0 else slope.item() * sign > 0.1


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_configurations(name: str) -> None:
    likelihood = likelihood_of(name)
    assert likelihood_of(likelihood) is likelihood
    again = likelihood_of(likelihood.configuration())
    assert type(again) is type(likelihood)
    assert again.configuration() == likelihood.configuration()
    gaussian = likelihood_of({"name": "gaussian", "variance": 0.25, "learned": True})
    assert gaussian.configuration() == {"name": "gaussian", "variance": 0.25, "learned": True}
    assert [each.shape for each in gaussian.parameters()] == [()]


@pytest.mark.parametrize("likelihood", [Bernoulli(), ContinuousBernoulli()], ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.25, r"x is 1.25 at \[1, 2\]; .*Bernoulli expects values in \[0, 1\]: scale the data \(pixels: / 255\)"),
        (-0.5, r"x is -0.5 at \[1, 2\]; "),
        (math.nan, r"x contains nan at \[1, 2\]; expected finite numbers"),
        (math.inf, r"x contains inf at \[1, 2\]; expected finite numbers"),
    ],
)
def test_values_outside_the_unit_interval(likelihood: Likelihood, value: float, words: str) -> None:
    x = torch.full((2, 3), 0.5)
    x[1, 2] = value
    with pytest.raises(ValueError, match=words):
        likelihood.log_prob(x, torch.zeros(2, 3))


def test_data_of_single_numbers() -> None:
    x = torch.tensor([0.0, 1.0, 2.0])
    found = Gaussian().log_prob(x, torch.zeros(5, 3))
    torch.testing.assert_close(found, Gaussian().log_prob(x[:, None], torch.zeros(5, 3, 1)))
    assert found.shape == (5, 3)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="likelihood is 'poisson'; expected one of gaussian, bernoulli, continuous-b"):
        likelihood_of("poisson")
    with pytest.raises(ValueError, match=r"variance is 0.0; expected a finite number > 0"):
        Gaussian(0.0)
    with pytest.raises(ValueError, match="variance is -1; expected a finite number > 0"):
        Gaussian(-1)
    with pytest.raises(ValueError, match="learned is 'no'; expected True or False"):
        likelihood_of({"name": "gaussian", "learned": "no"})
    with pytest.raises(ValueError, match="likelihood 'bernoulli' has no option 'variance'; expected none"):
        likelihood_of({"name": "bernoulli", "variance": 1})
    with pytest.raises(ValueError, match="likelihood 'gaussian' has no option 'sigma'; expected variance or learned"):
        likelihood_of({"name": "gaussian", "sigma": 1})
    with pytest.raises(TypeError, match=r"x is a ndarray; expected a torch tensor"):
        Gaussian().log_prob(np.zeros((2, 3)), torch.zeros(2, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x has dtype torch.int64; expected a type of floating point: x.float\(\)"):
        Bernoulli().log_prob(torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"output has shape \(2, 1\); expected \(\.\.\., 2, 3\) as x has"):
        Bernoulli().log_prob(torch.ones(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="x contains nan"):
        Gaussian().log_prob(torch.full((1, 1), math.nan), torch.zeros(1, 1))
