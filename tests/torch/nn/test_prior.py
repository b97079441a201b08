"""A mixture as a trainable prior: its values, samples, EM steps, and the way from a fit and back."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import emalgam
from emalgam import Mixture
from emalgam.nn import VAE, GaussianMixturePrior, LatentMixtureSampler, kl_to_mixture
from tests.samples import blobs
from tests.tolerances import STANDARD_ERRORS, tolerance


def mixture(covariance_type: str = "full", D: int = 2, K: int = 3, seed: int = 0) -> Mixture:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(K, D, D))
    full = a @ a.swapaxes(1, 2) / D + 0.5 * np.eye(D)
    variances = rng.uniform(0.5, 2, (K, D))
    covariances = {"full": full, "tied": full[0], "diag": variances, "spherical": variances[:, 0]}[covariance_type]
    return Mixture(rng.dirichlet(np.full(K, 5.0)), 2 * rng.normal(size=(K, D)), covariances, covariance_type)


def same_mixture(one: Mixture, other: Mixture, rtol: float = 1e-9) -> None:
    for name in ("weights", "means", "covariances"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=rtol, atol=rtol, err_msg=name)


def in_double(fit: Any) -> GaussianMixturePrior:
    return GaussianMixturePrior.from_fit(fit, dtype=torch.float64)


# ---- from a fit and back


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_from_fit_and_back(covariance_type: str, dtype: torch.dtype) -> None:
    given = mixture(covariance_type)
    prior = GaussianMixturePrior.from_fit(given, dtype=dtype)
    assert {each.dtype for each in prior.parameters()} == {dtype}
    back = prior.to_fit()
    x = np.random.default_rng(1).normal(size=(20, 2)) * 3
    bound = tolerance("mixture operators", str(dtype).removeprefix("torch.")) * 50
    np.testing.assert_allclose(back.log_prob(x), given.log_prob(x), rtol=0, atol=bound)
    np.testing.assert_allclose(prior.log_prob(torch.tensor(x, dtype=dtype)).detach(), given.log_prob(x), atol=bound)
    r = prior.responsibilities(torch.tensor(x, dtype=dtype))
    np.testing.assert_allclose(r.detach(), given.responsibilities(x), atol=bound)


def test_from_what_has_a_mixture() -> None:
    x, _ = blobs(300, 2, 3)
    fit = emalgam.fit(x, 3, random_state=0)
    model = emalgam.GaussianMixture(3, random_state=0).fit(x)
    sampler = LatentMixtureSampler(3, random_state=0).fit_latents(x)
    for each in (fit, model, sampler):
        same_mixture(in_double(each).to_fit(), fit.mixture)
    gaussian = in_double(emalgam.Gaussian([1.0, 2.0], [[2.0, 0.5], [0.5, 1.0]]))
    assert (gaussian.n_components, gaussian.n_features) == (1, 2)
    with pytest.raises(ValueError, match=r"fit is a str; expected a Gaussian, Mixture or fitted GaussianMixture"):
        in_double("mixture")
    with pytest.raises(ValueError, match=r"fit is a LatentMixtureSampler; expected a Gaussian, Mixture or fitted"):
        in_double(LatentMixtureSampler(3))


def test_a_prior_is_of_the_type_of_models() -> None:
    """torch's default, so that a mixture goes into a loss beside a VAE as it is."""
    vae, prior = VAE(4, 2, (3,)), GaussianMixturePrior.from_fit(mixture())
    assert {each.dtype for each in prior.parameters()} == {torch.float32}
    kl_to_mixture(*vae.posterior(torch.rand(5, 4)), prior).value.mean().backward()
    assert prior.means.grad is not None


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_diagonal_covariances(covariance_type: str) -> None:
    """K · D numbers, the variances of any mixture, and a value of that type."""
    given = mixture(covariance_type)
    prior = GaussianMixturePrior.from_fit(given, covariance_type="diag", dtype=torch.float64)
    assert prior.log_cholesky.shape == (3, 2)
    variances = given.covariance.diagonals(given.covariances, 3, 2)
    back = prior.to_fit()
    assert back.covariance_type == "diag"
    np.testing.assert_allclose(back.covariances, variances, rtol=1e-12)
    x = 3 * np.random.default_rng(1).normal(size=(20, 2))
    expected = Mixture(given.weights, given.means, variances, "diag").log_prob(x)
    np.testing.assert_allclose(prior.log_prob(torch.tensor(x)).detach(), expected, rtol=1e-12)
    z = prior.sample(20_000, torch.Generator().manual_seed(0))[0]
    np.testing.assert_allclose(z.mean(0), given.weights @ given.means, atol=5 * float(z.std()) / 20_000**0.5)


def test_a_diagonal_prior_is_refreshed_by_em_of_its_type() -> None:
    x, _ = blobs(500, 2, 3)
    start = mixture("diag")
    prior = GaussianMixturePrior.from_fit(start, covariance_type="diag", dtype=torch.float64)
    prior.refresh(torch.from_numpy(x), reg_covar=0.0)
    same_mixture(prior.to_fit(), em_step(x, start).mixture, 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_a_prior_of_16_bits_computes_in_float32(covariance_type: str, dtype: torch.dtype) -> None:
    prior = GaussianMixturePrior.from_fit(mixture(), covariance_type=covariance_type, dtype=dtype)
    rounded = GaussianMixturePrior(3, 2, covariance_type)
    rounded.load_state_dict(prior.state_dict())
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = prior.log_prob(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, rounded.log_prob(z.float()))
    found.sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in prior.parameters())
    own, theirs = (each.sample(5, torch.Generator().manual_seed(0))[0] for each in (prior, rounded))
    assert own.dtype == dtype
    torch.testing.assert_close(own, theirs.to(dtype))
    assert prior.refresh(z, step=0.5) == pytest.approx(found.mean().item(), rel=1e-3)


def test_weight_of_zero_stays_trainable() -> None:
    prior = in_double(Mixture([1.0, 0.0], [[0.0], [100.0]], [1.0, 1.0], "spherical"))
    prior.log_prob(torch.tensor([[0.0], [100.0]], dtype=torch.float64)).sum().backward()
    for parameter in prior.parameters():
        assert parameter.grad is not None
        assert parameter.isfinite().all()
        assert parameter.grad.isfinite().all()


def test_narrow_covariances_survive() -> None:
    """L Lᵀ is singular to rounding, L is not."""
    prior = GaussianMixturePrior(1, 2, dtype=torch.float64)
    with torch.no_grad():
        prior.log_cholesky.copy_(torch.tensor([[[0.0, 0.0], [1.0, np.log(1e-9)]]]))
        prior.means.zero_()
    z = torch.tensor([[0.1, 0.1 + 1e-9]], dtype=torch.float64)
    exact = -np.log(2 * np.pi) - np.log(1e-9) - 0.5 * (0.1**2 + ((0.1 + 1e-9 - 0.1) / 1e-9) ** 2)
    assert prior.log_prob(z).item() == pytest.approx(exact, abs=1e-5)  # 0.1 + 1e-9 is rounded: 1e-8 of the step
    assert float(prior.to_fit().log_prob(z.numpy())[0]) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_deviation", [-1e30, -800.0, -110.0, 110.0, 800.0, 1e30])
def test_every_diagonal_is_a_covariance(covariance_type: str, dtype: torch.dtype, log_deviation: float) -> None:
    """Deviations whose squares the dtype cannot hold count as the nearest that it can; gradients know no clamp."""
    prior = GaussianMixturePrior(2, 2, covariance_type, dtype=dtype)
    with torch.no_grad():
        prior.means.zero_()
        (prior.log_cholesky if prior.diagonal else prior.log_cholesky.diagonal(dim1=1, dim2=2))[0] = log_deviation
    z = torch.tensor([[0.0, 0.0], [0.5, -0.25]], dtype=dtype)
    largest = -0.5 * math.log(torch.finfo(dtype).tiny)
    clamped = math.copysign(min(abs(log_deviation), largest), log_deviation)
    # log ½ (N₀ + N₁), of which N₁ is the standard normal distribution
    square = z.double().square().sum(1)
    densities = torch.stack([-2 * clamped - 0.5 * square * math.exp(-2 * clamped), -0.5 * square])
    expected = densities.logsumexp(0) - math.log(2) - math.log(2 * math.pi)
    found = prior.log_prob(z)
    torch.testing.assert_close(found, expected.to(dtype))
    found.sum().backward()
    assert prior.log_deviations[0].tolist() == pytest.approx([clamped] * 2)
    assert prior.log_deviations[1].tolist() == [0.0, 0.0]
    for parameter in prior.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    # At its own mean a narrow component would be narrower yet, whatever the clamp says.
    gradient = torch.autograd.grad(prior.log_prob(z[:1]).sum(), prior.log_cholesky)[0]
    share = prior.responsibilities(z[:1])[0, 0].item()
    diagonal = gradient if prior.diagonal else gradient.diagonal(dim1=1, dim2=2)
    assert diagonal[0].tolist() == pytest.approx([-share] * 2)
    assert np.isfinite(prior.to_fit().covariances).all()
    assert prior.sample(10)[0].isfinite().all()


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_a_fit_beyond_the_dtype_begins_at_the_end_of_its_range(covariance_type: str) -> None:
    fit = Mixture([1.0], [[0.0, 0.0]], [[1e-200, 1e200]], "diag")
    prior = GaussianMixturePrior.from_fit(fit, covariance_type=covariance_type)
    range_of_float32 = 0.5 * math.log(torch.finfo(torch.float32).tiny)
    assert prior.log_deviations[0].tolist() == pytest.approx([range_of_float32, -range_of_float32])
    logs = prior.log_cholesky if prior.diagonal else prior.log_cholesky.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(logs, prior.log_deviations)


def test_bad_sizes_and_values() -> None:
    with pytest.raises(ValueError, match=r"n_components is 0; expected an integer >= 1"):
        GaussianMixturePrior(0, 2)
    prior = GaussianMixturePrior(3, 2)
    with pytest.raises(ValueError, match=r"the mixture has 3 components in 4 features and this prior 3 in 2"):
        prior.set(mixture(D=4))
    with pytest.raises(ValueError, match=r"covariance_type is 'tied'; expected one of diag, full"):
        GaussianMixturePrior(3, 2, "tied")
    with torch.no_grad():
        prior.means[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"means contains NaN at \[1, 0\]"):
        prior.to_fit()


def test_latents_that_do_not_fit_are_named() -> None:
    prior = GaussianMixturePrior(3, 2)
    for method in (prior, prior.log_prob, prior.responsibilities):
        with pytest.raises(TypeError, match=r"z is a ndarray; expected a torch tensor"):
            method(np.zeros((4, 2)))
        with pytest.raises(ValueError, match=r"z has shape \(4, 3\); the prior has 2 features"):
            method(torch.zeros(4, 3))
        with pytest.raises(
            TypeError, match=r"z has dtype torch.float64, the prior torch.float32; .* or prior.to\(torc"
        ):
            method(torch.zeros(4, 2).double())
        with pytest.raises(ValueError, match=r"z lies on meta, the prior on cpu; call z.to\('cpu'\), or prior.to"):
            method(torch.zeros(4, 2, device="meta"))
    with pytest.raises(TypeError, match=r"generator is 0; expected a torch.Generator: torch.Generator\(\).manual_se"):
        prior.sample(3, 0)  # type: ignore[arg-type]


# ---- as a module


def test_state_dict_round_trip() -> None:
    prior, file = in_double(mixture()), io.BytesIO()
    assert [name for name, _ in prior.named_parameters()] == ["log_weights", "means", "log_cholesky"]
    torch.save(prior.state_dict(), file)
    file.seek(0)
    other = GaussianMixturePrior(3, 2, dtype=torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True))
    z = torch.randn(5, 2, dtype=torch.float64)
    assert torch.equal(other(z), prior(z))
    assert repr(prior) == "GaussianMixturePrior(n_components=3, n_features=2, covariance_type='full')"


def test_trains_by_gradients() -> None:
    """Adam on 1000 rows comes close to what EM finds, from the same start."""
    x, centres = blobs(1000, 2, 3)
    prior = in_double(Mixture(np.full(3, 1 / 3), centres + 0.5, np.ones(3), "spherical"))
    start = prior.to_fit()
    z, optimizer = torch.from_numpy(x), torch.optim.Adam(prior.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -prior.log_prob(z).mean()
        loss.backward()
        optimizer.step()
    fit = emalgam.fit(x, 3, means_init=start.means, weights_init=start.weights, tol=1e-8, max_iter=500, reg_covar=0.0)
    assert -loss.item() == pytest.approx(fit.lower_bound, abs=2e-3)


# ---- samples


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples(dtype: torch.dtype) -> None:
    given = mixture()
    prior = GaussianMixturePrior.from_fit(given, dtype=dtype)
    z, labels = prior.sample(20_000, torch.Generator().manual_seed(0))
    assert (z.shape, z.dtype, labels.shape, labels.dtype) == ((20_000, 2), dtype, (20_000,), torch.int64)
    assert not z.requires_grad
    counts = np.bincount(labels, minlength=3)
    assert stats.chisquare(counts, 20_000 * given.weights).pvalue > 1e-6
    for k in range(3):
        rows = z[labels == k].double().numpy()
        error = (rows.mean(axis=0) - given.means[k]) / np.sqrt(np.diag(given.covariances[k]) / len(rows))
        assert np.abs(error).max() < STANDARD_ERRORS
        # an entry of a sample covariance has the variance (Σ_ii Σ_jj + Σ_ij²) / n
        sigma, variances = given.covariances[k], np.diag(given.covariances[k])
        error = (np.cov(rows.T) - sigma) / np.sqrt((np.outer(variances, variances) + sigma**2) / len(rows))
        assert np.abs(error).max() < STANDARD_ERRORS
    assert len(set(labels[:50].tolist())) == 3  # in random order


def test_samples_follow_the_generator() -> None:
    prior = in_double(mixture())

    def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
        return prior.sample(n, torch.Generator().manual_seed(seed))

    one, few, other = draw(50, 1), draw(20, 1), draw(50, 2)
    assert torch.equal(one[0][:20], few[0])
    assert torch.equal(one[1][:20], few[1])
    assert not torch.equal(one[0], other[0])
    torch.manual_seed(3)
    first = prior.sample(4)[0]
    torch.manual_seed(3)
    assert torch.equal(prior.sample(4)[0], first)
    with pytest.raises(ValueError, match=r"n is 0; expected an integer >= 1"):
        prior.sample(0)


# ---- EM


def em_step(x: np.ndarray, start: Mixture, weight: Any = None) -> emalgam.Fit:
    """One iteration of EM from a mixture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", emalgam.ConvergenceWarning)
        return emalgam.fit(
            x, start.n_components, covariance_type=start.covariance_type, sample_weight=weight,
            weights_init=start.weights, means_init=start.means, precisions_init=start.precisions, max_iter=1,
            reg_covar=0.0,
        )  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
def test_refresh_is_an_iteration_of_em(weighted: bool) -> None:
    x, _ = blobs(500, 2, 3)
    start = mixture()
    weight = np.random.default_rng(0).uniform(0, 2, 500) if weighted else None
    expected = em_step(x, start, weight)
    prior = in_double(start)
    pointers = [each.data_ptr() for each in prior.parameters()]
    z = torch.from_numpy(x).reshape(50, 10, 2).requires_grad_()
    omega = None if weight is None else torch.from_numpy(weight).reshape(50, 10)
    bound = prior.refresh(z, omega, reg_covar=0.0)
    assert bound == pytest.approx(expected.lower_bounds[0], rel=1e-9)
    same_mixture(prior.to_fit(), expected.mixture, 1e-7)
    assert [each.data_ptr() for each in prior.parameters()] == pointers
    assert z.grad is None


def test_refresh_by_a_small_step() -> None:
    """ŝ moves by that share of the way: weights and means are linear in it."""
    x, _ = blobs(500, 2, 3)
    start = mixture()
    whole, part = in_double(start), in_double(start)
    whole.refresh(torch.from_numpy(x), reg_covar=0.0)
    part.refresh(torch.from_numpy(x), step=0.25, reg_covar=0.0)
    there, found = whole.to_fit(), part.to_fit()
    weights = 0.75 * start.weights + 0.25 * there.weights
    np.testing.assert_allclose(found.weights, weights, rtol=1e-9)
    first = 0.75 * start.weights[:, None] * start.means + 0.25 * there.weights[:, None] * there.means
    np.testing.assert_allclose(found.means, first / weights[:, None], rtol=1e-8)


def test_refresh_on_batches_fits_a_stream() -> None:
    x, centres = blobs(6000, 2, 3)
    prior = in_double(Mixture(np.full(3, 1 / 3), centres + 1.0, 4 * np.ones(3), "spherical"))
    for t, batch in enumerate(np.array_split(np.random.default_rng(0).permutation(x), 60)):
        prior.refresh(torch.from_numpy(batch), step=(t + 2) ** -0.6)
    fit = emalgam.fit(x, 3, means_init=centres, tol=1e-8, max_iter=500)
    assert prior.to_fit().log_prob(x).mean() == pytest.approx(fit.lower_bound, abs=0.02)


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_refreshing_on_constant_latents_ends_at_a_small_variance(covariance_type: str) -> None:
    """As of a dead unit: every step would take the floor from the variance that the last one left."""
    prior = GaussianMixturePrior(3, 2, covariance_type)
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.0])
    for _ in range(60):
        prior.refresh(z)
    deviations = prior.log_deviations.exp().detach()
    torch.testing.assert_close(deviations[:, 1], torch.full((3,), 1e-6), rtol=1e-3, atol=0)
    assert prior.log_prob(z).isfinite().all()


def test_refresh_refuses() -> None:
    prior = in_double(mixture())
    z = torch.randn(10, 2)
    with pytest.raises(ValueError, match=r"step is 0; expected a number above 0, up to 1"):
        prior.refresh(z, step=0)
    with pytest.raises(TypeError, match=r"z is a ndarray; expected a torch tensor"):
        prior.refresh(z.numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reg_covar \(unless it is 'auto'\) is -1"):
        prior.refresh(z, reg_covar=-1)
    with pytest.raises(ValueError, match=r"z has 3 features; the mixture has 2"):
        prior.refresh(torch.randn(10, 3))
    with pytest.raises(ValueError, match=r"z has shape \(10, 0\); expected \(\.\.\., features\), at least one of them"):
        prior.refresh(z[:, :0])
    with pytest.raises(ValueError, match=r"sample_weight is -1\.0 at row 0; expected weights >= 0"):
        prior.refresh(z, -torch.ones(10))
    z[3, 1] = float("nan")
    with pytest.raises(ValueError, match=r"z contains NaN at row 3, column 1"):
        prior.refresh(z)
