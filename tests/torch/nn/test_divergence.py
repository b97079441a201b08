"""KL divergences inside a loss: against mpmath, emalgam.divergence, Monte Carlo, and gradients by differences."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from emalgam import Gaussian, Mixture, divergence
from emalgam.nn import GaussianMixturePrior, kl_gaussian, kl_to_mixture
from tests import divergence_oracles
from tests.tolerances import STANDARD_ERRORS, tolerance

N, D, K = 4, 3, 3


def posterior(full: bool, seed: int = 0) -> dict[str, Tensor]:
    """N Gaussians as arguments named q_…"""
    rng = np.random.default_rng(seed)
    mean = torch.tensor(rng.normal(size=(N, D)))
    if full:
        lower = np.tril(rng.normal(0, 0.3, (N, D, D)), -1) + np.eye(D) * rng.uniform(0.5, 1.5, (N, 1, D))
        return {"q_mean": mean, "q_scale_tril": torch.tensor(lower)}
    return {"q_mean": mean, "q_log_variance": torch.tensor(rng.normal(0, 0.5, (N, D)))}


def covariances(arguments: dict[str, Tensor], name: str = "q") -> np.ndarray:
    """(N, D, D)."""
    if f"{name}_scale_tril" in arguments:
        lower = arguments[f"{name}_scale_tril"].numpy()
        return lower @ lower.swapaxes(1, 2)
    return np.exp(arguments[f"{name}_log_variance"].numpy())[:, :, None] * np.eye(D)


def in_double(fit: Any) -> GaussianMixturePrior:
    return GaussianMixturePrior.from_fit(fit, dtype=torch.float64)


def prior() -> GaussianMixturePrior:
    rng = np.random.default_rng(3)
    a = rng.normal(size=(K, D, D))
    sigma = a @ a.swapaxes(1, 2) / D + 0.5 * np.eye(D)
    return in_double(Mixture(rng.dirichlet(np.full(K, 5.0)), 2 * rng.normal(size=(K, D)), sigma))


def estimate(arguments: dict[str, Tensor], of: GaussianMixturePrior, **how: Any) -> Any:
    q = dict(arguments)
    return kl_to_mixture(q.pop("q_mean"), q.pop("q_log_variance", None), of, **q, **how)


def mixtures(arguments: dict[str, Tensor]) -> list[Gaussian]:
    means = arguments["q_mean"].numpy()
    return [Gaussian(mean, sigma) for mean, sigma in zip(means, covariances(arguments), strict=True)]


def draws(estimator: str, n: int) -> dict[str, Any]:
    """Arguments of the estimator that draws, the same each time."""
    seeded = {"n_samples": n, "generator": torch.Generator().manual_seed(0)}
    return seeded if estimator == "monte_carlo" else {}


every_shape = pytest.mark.parametrize("full", [False, True])


# ---- the closed form


@every_shape
@pytest.mark.parametrize("full_p", [False, True])
def test_closed_form(full: bool, full_p: bool) -> None:
    q = posterior(full)
    p = {name.replace("q_", "p_"): value for name, value in posterior(full_p, 1).items()}
    found = kl_gaussian(**q, **p)
    exact = [
        float(divergence_oracles.exact_kl((m, c), (n, d)))
        for m, c, n, d in zip(
            q["q_mean"].numpy(), covariances(q), p["p_mean"].numpy(), covariances(p, "p"), strict=True
        )
    ]
    np.testing.assert_allclose(found, exact, rtol=tolerance("closed-form KL", "float64"))
    standard = [float(divergence_oracles.exact_kl((m, c), (np.zeros(D), np.eye(D)))) for m, c in pairs(q)]
    np.testing.assert_allclose(kl_gaussian(**q), standard, rtol=tolerance("closed-form KL", "float64"))


def pairs(q: dict[str, Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(q["q_mean"].numpy(), covariances(q), strict=True))


@every_shape
def test_closed_form_has_gradients(full: bool) -> None:
    q = posterior(full)
    p = {name.replace("q_", "p_"): value for name, value in posterior(not full, 1).items()}
    names, values = list(q | p), [each.clone().requires_grad_() for each in (q | p).values()]

    def of(*arguments: Tensor) -> Tensor:
        return kl_gaussian(**dict(zip(names, arguments, strict=True)))

    assert torch.autograd.gradcheck(of, values)


@pytest.mark.parametrize("log_variance", [-2000.0, -300.0, -1e-6, 0.0, 1e-6, 60.0])
def test_closed_form_of_extreme_variances(log_variance: float) -> None:
    """½ Σ (σ² − 1 − log σ²) where exp underflows, and where σ² − 1 would lose its digits; of a ratio of them too."""
    mean, log_variance_ = torch.zeros(1, 1), torch.full((1, 1), log_variance)
    exact = float(0.5 * (mpmath.expm1(mpmath.mpf(log_variance_.item())) - mpmath.mpf(log_variance_.item())))
    found = kl_gaussian(mean, log_variance_).item()
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-12)
    shift = torch.tensor([-150.0])
    assert kl_gaussian(mean, log_variance_, mean, torch.zeros(1)).item() == found
    assert kl_gaussian(mean, log_variance_ + shift, mean, shift).item() == pytest.approx(exact, rel=1e-4, abs=1e-4)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_closed_form_of_16_bits_is_computed_in_float32(dtype: torch.dtype, full: bool) -> None:
    q = {name: value.to(dtype) for name, value in posterior(full).items()}
    p = {name.replace("q_", "p_"): value.to(dtype) for name, value in posterior(True, 1).items()}
    found = kl_gaussian(**q, **p)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kl_gaussian(**{name: value.float() for name, value in (q | p).items()}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["monte_carlo", "variational", "unscented"])
def test_divergences_to_a_mixture_of_16_bits_are_computed_in_float32(estimator: str, dtype: torch.dtype) -> None:
    q, p = {name: value.to(dtype) for name, value in posterior(False).items()}, prior().to(dtype)
    found = estimate(q, p, estimator=estimator, **draws(estimator, 3)).value
    assert found.dtype == torch.float32
    wide = {name: value.float() for name, value in q.items()}
    torch.testing.assert_close(found, estimate(wide, p.float(), estimator=estimator, **draws(estimator, 3)).value)


@every_shape
@pytest.mark.parametrize("estimator", ["monte_carlo", "variational", "unscented"])
def test_autocast_changes_no_digit(full: bool, estimator: str) -> None:
    q, p = {name: value.float() for name, value in posterior(full).items()}, prior().float()

    def both() -> tuple[Tensor, Tensor]:
        closed = kl_gaussian(**q, p_mean=p.means[0], p_scale_tril=p.scale_tril[0])
        return closed, estimate(q, p, estimator=estimator, **draws(estimator, 3)).value

    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        found = both()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_closed_form_broadcasts() -> None:
    q, p = posterior(False), posterior(True, 1)
    found = kl_gaussian(
        q["q_mean"][:, None],
        q["q_log_variance"][:, None],
        p_mean=p["q_mean"],
        p_scale_tril=p["q_scale_tril"],
    )
    assert found.shape == (N, N)
    own = kl_gaussian(q["q_mean"][2], q["q_log_variance"][2], p_mean=p["q_mean"][1], p_scale_tril=p["q_scale_tril"][1])
    torch.testing.assert_close(found[2, 1], own)


def test_what_does_not_fit_is_named() -> None:
    mean = torch.zeros(N, D)
    with pytest.raises(ValueError, match=r"neither of q_log_variance and q_scale_tril given; expected one of them"):
        kl_gaussian(mean)
    with pytest.raises(ValueError, match=r"both of q_log_variance and q_scale_tril given"):
        kl_gaussian(mean, mean, q_scale_tril=torch.eye(D))
    with pytest.raises(ValueError, match=r"q_log_variance has shape \(4, 2\) beside q_mean of shape \(4, 3\)"):
        kl_gaussian(mean, mean[:, :2])
    with pytest.raises(ValueError, match=r"p_mean is missing beside p's covariance"):
        kl_gaussian(mean, mean, p_log_variance=mean)
    with pytest.raises(ValueError, match=r"estimator is 'exact'; expected one of monte_carlo, variational, unscented"):
        kl_to_mixture(mean, mean, prior(), estimator="exact")
    with pytest.raises(ValueError, match=r"q_mean has shape \(4, 2\); the prior has 3 features"):
        kl_to_mixture(mean[:, :2], mean[:, :2], prior())
    with pytest.raises(ValueError, match=r"n_samples is 0; expected an integer >= 1"):
        kl_to_mixture(mean.double(), mean.double(), prior(), n_samples=0)
    with pytest.raises(ValueError, match=r"q_mean has shape \(4, 3\) and p_mean \(1,\); expected as many features"):
        kl_gaussian(mean, mean, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"q_mean has shape \(4, 3\) and p_mean \(5, 3\); .* or axes of length 1"):
        kl_gaussian(mean, mean, torch.zeros(5, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"q_log_variance has shape \(5, 3\) beside q_mean of shape \(4, 3\); .* axes"):
        kl_gaussian(mean, torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"q_mean is a tensor of torch.int64; .* of floating point"):
        kl_gaussian(mean.long(), mean)
    with pytest.raises(
        TypeError, match=r"q_mean has dtype torch.float32 but q_log_variance torch.float64; expected one"
    ):
        kl_gaussian(mean, mean.double())
    with pytest.raises(TypeError, match=r"q_mean has dtype torch.float32 but p_mean torch.float64; expected one type"):
        kl_gaussian(mean, mean, mean.double(), mean.double())
    with pytest.raises(ValueError, match=r"q_mean is on cpu but p_mean on meta; expected one device"):
        kl_gaussian(mean, mean, mean.to("meta"), mean.to("meta"))
    with pytest.raises(
        TypeError, match=r"prior is a Mixture; expected a GaussianMixturePrior: GaussianMixturePrior.fro"
    ):
        kl_to_mixture(mean, mean, prior().to_fit())  # type: ignore[arg-type]
    for given in ({"n_samples": 4}, {"generator": torch.Generator()}):
        with pytest.raises(
            ValueError, match=r"estimator 'unscented' draws no samples; leave out n_samples and generator"
        ):
            kl_to_mixture(mean.double(), mean.double(), prior(), estimator="unscented", **given)
    with pytest.raises(TypeError, match=r"q_mean is a list; expected a torch tensor"):
        kl_gaussian([0.0], [0.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"q_log_variance is a tensor of one number; expected a torch"):
        kl_gaussian(mean, torch.tensor(0.0))
    with pytest.raises(
        TypeError, match=r"float32, the prior torch.float64; call q_mean.to\(torch.float64\), or prior.to"
    ):
        kl_to_mixture(mean, mean, prior())
    assert kl_to_mixture(mean, mean, prior().to(torch.float32)).value.dtype == torch.float32


# ---- to a mixture


@every_shape
@pytest.mark.parametrize("estimator", ["monte_carlo", "variational", "unscented"])
def test_what_posteriors_share_is_as_if_written_out(full: bool, estimator: str) -> None:
    """One covariance for all means, and one mean for all covariances."""
    q, p = posterior(full), prior()
    for shared in q:
        given = q | {shared: q[shared][0]}
        found, each = (
            estimate(q_, p, estimator=estimator, **draws(estimator, 3))
            for q_ in (given, {name: given[name].expand_as(q[name]) for name in q})
        )
        assert found.value.shape == (N,)
        assert torch.equal(found.value, each.value)


@every_shape
def test_variational_is_emalgams(full: bool) -> None:
    q, p = posterior(full), prior()
    found = estimate(q, p, estimator="variational")
    expected = [divergence.kl_variational(each, p.to_fit()) for each in mixtures(q)]
    np.testing.assert_allclose(found.value.detach(), expected, rtol=1e-10)
    assert found.standard_error is None


def test_unscented_is_emalgams() -> None:
    """For a diagonal q the eigenvectors that emalgam takes are the axes."""
    q, p = posterior(False), prior()
    found = estimate(q, p, estimator="unscented").value
    expected = [divergence.kl_unscented(each, p.to_fit()) for each in mixtures(q)]
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-10)


@every_shape
@pytest.mark.parametrize("estimator", ["variational", "unscented"])
def test_exact_for_one_component(full: bool, estimator: str) -> None:
    q = posterior(full)
    single = in_double(Gaussian(np.ones(D), np.eye(D) + 0.3))
    found = estimate(q, single, estimator=estimator).value
    exact = kl_gaussian(**q, p_mean=single.means[0], p_scale_tril=single.scale_tril[0])
    torch.testing.assert_close(found, exact)


@every_shape
def test_monte_carlo(full: bool) -> None:
    """Within its standard error of emalgam's estimate, and below the variational bound."""
    q, p = posterior(full), prior()
    found = estimate(q, p, n_samples=20_000, generator=torch.Generator().manual_seed(0))
    others = [divergence.kl_monte_carlo(each, p.to_fit(), 200_000, random_state=1) for each in mixtures(q)]
    for value, error, other in zip(found.value.tolist(), found.standard_error.tolist(), others, strict=True):
        assert abs(value - other.value) < STANDARD_ERRORS * np.hypot(error, other.standard_error)
        assert 0.5 < error / (other.standard_error * np.sqrt(10)) < 2
    bound = estimate(q, p, estimator="variational").value
    assert (found.value - STANDARD_ERRORS * found.standard_error <= bound).all()
    assert not found.standard_error.requires_grad


def test_monte_carlo_of_few_samples() -> None:
    q, p = posterior(False), prior()
    one = estimate(q, p, generator=torch.Generator().manual_seed(0))
    assert one.standard_error.isnan().all()
    assert one.value.isfinite().all()
    again = estimate(q, p, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.value, again.value)


def test_monte_carlo_has_no_noise_where_q_is_the_prior() -> None:
    single = in_double(Gaussian(np.ones(D), np.eye(D)))
    mean, log_variance = torch.ones(N, D, dtype=torch.float64), torch.zeros(N, D, dtype=torch.float64)
    found = kl_to_mixture(mean, log_variance, single, n_samples=5)
    assert found.value.abs().max() < 1e-12


@every_shape
@pytest.mark.parametrize("estimator", ["monte_carlo", "variational", "unscented"])
def test_gradients(full: bool, estimator: str) -> None:
    """In q and in the prior's parameters, by differences; the same noise each time."""
    q, p = posterior(full), prior()
    names = list(q)
    n_prior = len(list(p.parameters()))

    def of(*arguments: Tensor) -> Tensor:
        values = dict(zip([name for name, _ in p.named_parameters()], arguments[:n_prior], strict=True))
        given = dict(zip(names, arguments[n_prior:], strict=True))
        call = Call(p, given, {"estimator": estimator, **draws(estimator, 2)})
        return torch.func.functional_call(call, {f"prior.{name}": value for name, value in values.items()}, ())

    arguments = [each.detach().clone().requires_grad_() for each in (*p.parameters(), *q.values())]
    assert torch.autograd.gradcheck(of, arguments)


class Call(torch.nn.Module):
    """`kl_to_mixture` as a module, so that the prior's parameters can be replaced."""

    def __init__(self, of: GaussianMixturePrior, given: dict[str, Tensor], how: dict[str, Any]) -> None:
        super().__init__()
        self.prior, self.given, self.how = of, given, how

    def forward(self) -> Tensor:
        value: Tensor = estimate(self.given, self.prior, **self.how).value
        return value
