"""The VAE's bounds against each other and against exact log-likelihoods, and what it says about bad input."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emalgam.nn import MODELS, VAE, Posterior, vae
from tests.divergence_oracles import kl
from tests.tolerances import STANDARD_ERRORS
from tests.torch.nn import oracles

LIKELIHOODS = ["bernoulli", "continuous-bernoulli", {"name": "gaussian", "variance": 0.1, "learned": True}]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(likelihood: Any, kl: str = "closed", steps: int = 150) -> tuple[VAE, Tensor]:
    """A VAE of two latents after a few steps on blurred bars, and the data."""
    torch.manual_seed(0)
    centres = torch.rand(200, 1, generator=seeded(1))
    x = torch.exp(-((centres - torch.linspace(0, 1, 12)) ** 2) / 0.02)
    model = VAE(12, 2, (16,), likelihood, kl=kl)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.losses(x, generator=seeded(2))["loss"].backward()
        optimizer.step()
    return model, x


# ---- a linear VAE with a Gaussian decoder: probabilistic PCA, whose log-likelihood is known


def linear_vae(**options: Any) -> tuple[VAE, Tensor, np.ndarray]:
    """A VAE whose encoder is the exact posterior, data (30, 5) float64, and their exact log-likelihoods.

    W has orthogonal columns, so that the posterior's covariance σ² (Wᵀ W + σ² I)⁻¹ is diagonal.
    """
    rng = np.random.default_rng(3)
    weight = np.linalg.qr(rng.normal(size=(5, 2)))[0] * [2.0, 0.7]
    bias, variance = rng.normal(size=5), 0.3
    x = rng.normal(size=(30, 2)) @ weight.T + bias + np.sqrt(variance) * rng.normal(size=(30, 5))
    likelihood = {"name": "gaussian", "variance": variance}
    model = VAE(5, 2, (), likelihood, **options).double()
    means, covariance = oracles.linear_gaussian_posterior(x, weight, bias, variance)
    to_mean = np.linalg.lstsq(x - bias, means, rcond=None)[0].T
    with torch.no_grad():
        encoder, decoder = model.encoder[0], model.decoder[0]
        encoder.weight.copy_(torch.tensor(np.concatenate([to_mean, np.zeros((2, 5))])))
        encoder.bias.copy_(torch.tensor(np.concatenate([-to_mean @ bias, np.log(np.diag(covariance))])))
        decoder.weight.copy_(torch.tensor(weight))
        decoder.bias.copy_(torch.tensor(bias))
    return model, torch.tensor(x), oracles.linear_gaussian(x, weight, bias, variance)


def test_with_the_exact_posterior_every_bound_is_the_log_likelihood() -> None:
    """p(x | z) p(z) / q(z | x) = p(x) then, for every single z."""
    model, x, exact = linear_vae(kl="monte_carlo")
    with torch.no_grad():
        for n_samples in (1, 7):
            bound = model.log_likelihood(x, n_samples=n_samples, generator=seeded(0))
            np.testing.assert_allclose(bound, exact, rtol=1e-11)
        np.testing.assert_allclose(model.elbo(x, generator=seeded(0)), exact, rtol=1e-11)


def test_with_another_posterior_the_gap_is_its_divergence() -> None:
    """log p(x) − E ELBO = KL(q ‖ p(z | x)), and the importance-weighted bound closes it."""
    model, x, exact = linear_vae()
    posterior = model.posterior(x)
    with torch.no_grad():
        model.encoder[0].bias += torch.tensor([0.3, -0.2, 0.4, -0.3], dtype=torch.float64)
        wrong = model.posterior(x)
        elbo = torch.stack([model.elbo(x, generator=seeded(seed)) for seed in range(2000)])
        bound = model.log_likelihood(x, n_samples=20_000, generator=seeded(0))
    gap = [kl(_gaussian(wrong, n), _gaussian(posterior, n)) for n in range(len(x))]
    error = elbo.std(0) / math.sqrt(len(elbo))
    assert ((elbo.mean(0) + torch.tensor(gap) - torch.tensor(exact)).abs() <= STANDARD_ERRORS * error).all()
    np.testing.assert_allclose(bound, exact, atol=0.05)
    assert (elbo.mean(0) < bound).all()


def _gaussian(posterior: Posterior, n: int) -> tuple[np.ndarray, np.ndarray]:
    return posterior.mean[n].detach().numpy(), np.diag(posterior.log_variance[n].exp().detach().numpy())


# ---- the bounds of any VAE


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_the_elbo_does_not_exceed_the_importance_weighted_bound(likelihood: Any) -> None:
    """The means over 100 draws of both, for each datum, and more samples make the bound larger."""
    model, x = trained(likelihood)
    x, draws = x[:40], 100
    with torch.no_grad():
        estimates = {
            n: torch.stack([model.log_likelihood(x, n_samples=n, generator=seeded(s)) for s in range(draws)])
            for n in (1, 5, 50)
        }
        estimates[0] = torch.stack([model.elbo(x, generator=seeded(1000 + s)) for s in range(draws)])
    means = {n: each.mean(0) for n, each in estimates.items()}
    errors = {n: each.std(0) / math.sqrt(draws) for n, each in estimates.items()}
    for fewer, more in ((0, 5), (0, 50), (1, 5), (5, 50)):
        noise = STANDARD_ERRORS * (errors[fewer] ** 2 + errors[more] ** 2).sqrt()
        assert (means[fewer] <= means[more] + noise).all(), (fewer, more)
    assert means[0].mean() < means[50].mean()
    assert ((means[0] - means[1]).abs() <= STANDARD_ERRORS * (errors[0] ** 2 + errors[1] ** 2).sqrt()).all()


def test_the_closed_kl_is_the_monte_carlo_one() -> None:
    """Within 4 standard errors of 20 000 samples, for each of 20 posteriors; and it is that of two Gaussians."""
    posterior = Posterior(*torch.randn(2, 20, 3, generator=seeded(0)).double())
    model = VAE(5, 3)
    closed = model.closed_kl(posterior)
    draws = model.monte_carlo_kl(posterior, posterior.sample(20_000, generator=seeded(1)))
    assert draws.shape == (20_000, 20)
    error = draws.std(0) / math.sqrt(20_000)
    assert ((draws.mean(0) - closed).abs() <= 4 * error).all()
    standard = np.zeros(3), np.eye(3)
    np.testing.assert_allclose(closed, [kl(_gaussian(posterior, n), standard) for n in range(20)], rtol=1e-12)


def test_both_kls_have_the_same_gradient_on_average() -> None:
    slopes = {}
    for how in ("closed", "monte_carlo"):
        torch.manual_seed(0)
        model, x = VAE(6, 2, (4,), kl=how), torch.rand(5, 6, generator=seeded(1))
        x = x.repeat(4000, 1)
        model.losses(x, generator=seeded(2))["kl"].backward()
        slopes[how] = model.encoder[-2].weight.grad
    torch.testing.assert_close(slopes["closed"], slopes["monte_carlo"], atol=0.02, rtol=0.05)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_losses_are_one_bound(likelihood: Any) -> None:
    torch.manual_seed(0)
    model, x = VAE((1, 3, 4), 2, (8,), likelihood, beta=2.5), torch.rand(6, 1, 3, 4)
    losses = model.losses(x, generator=seeded(3))
    reconstruction, kl = (term.mean() for term in model.elbo_terms(x, generator=seeded(3)))
    torch.testing.assert_close(losses["elbo"], reconstruction - kl)
    torch.testing.assert_close(losses["loss"], 2.5 * kl - reconstruction)
    torch.testing.assert_close(losses["elbo"], model.elbo(x, generator=seeded(3)).mean())
    assert all(each.shape == () for each in losses.values())
    losses["loss"].backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())
    again = model.losses(x, generator=seeded(4))
    assert again["kl"] == losses["kl"]
    assert again["loss"] != losses["loss"]


def test_samples_are_decoded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, exact = linear_vae()
    monkeypatch.setattr(vae, "ELEMENTS_AT_ONCE", 2 * x.numel())
    largest = 0

    def watch(_: Any, __: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    model.decoder.register_forward_hook(watch)
    np.testing.assert_allclose(model.log_likelihood(x, n_samples=7).detach(), exact, rtol=1e-11)
    assert largest == 2 * x.numel()


def test_hidden_layers_count_where_they_are_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    model, largest = VAE(3, 2, (50,)), 0
    monkeypatch.setattr(vae, "ELEMENTS_AT_ONCE", 4 * 10 * 50)

    def watch(_: Any, __: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel())

    model.decoder[0].register_forward_hook(watch)
    model.log_likelihood(torch.rand(10, 3), n_samples=9)
    assert largest == 4 * 10 * 50


def test_the_bound_in_pieces_keeps_no_graph_of_them_and_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, noise = VAE(12, 2, (16,)).double(), torch.rand(5, 12).double(), torch.randn(20, 5, 2).double()
    results = []
    for at_once in (100, 7):  # all samples at once, and three pieces
        monkeypatch.setattr(vae, "ELEMENTS_AT_ONCE", at_once * 5 * 16)
        pieces = iter(noise.split(at_once))
        monkeypatch.setattr(vae, "standard_normal", lambda *_, left=pieces: next(left))
        saved = 0

        def count(each: Tensor) -> Tensor:
            nonlocal saved
            saved += each.numel()
            return each

        with torch.autograd.graph.saved_tensors_hooks(count, lambda each: each):
            bound = model.log_likelihood(x, n_samples=20)
        results.append((bound, torch.autograd.grad(bound.sum(), list(model.parameters())), saved))
    (whole, gradients, of_whole), (in_pieces, same, of_pieces) = results
    torch.testing.assert_close(in_pieces, whole)
    for one, other in zip(same, gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert of_pieces < of_whole / 4


def test_training_raises_the_bound_in_both_ways() -> None:
    for how in ("closed", "monte_carlo"):
        (before, x), (after, _) = (trained("bernoulli", how, steps) for steps in (0, 150))
        assert after.losses(x)["elbo"] > before.losses(x)["elbo"] + 1.0, how


# ---- the rest of the contract


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_the_configuration_makes_the_same_model(likelihood: Any) -> None:
    model = VAE((1, 3, 4), 2, (8, 5), likelihood, beta=0.5, kl="monte_carlo", activation="silu")
    again = MODELS["vae"](**json.loads(json.dumps(model.configuration())))
    again.load_state_dict(model.state_dict())
    assert again.configuration() == model.configuration()
    x = torch.rand(3, 1, 3, 4)
    assert torch.equal(again(x), model(x))
    assert model.encode(x).shape == (3, 2)
    assert model.decode(torch.zeros(5, 2)).shape == (5, 1, 3, 4)
    assert torch.equal(model.encode(x), model.posterior(x).mean)


def test_sizes_of_numpy() -> None:
    model = VAE(np.int64(12), np.int64(2), np.array([8]))  # type: ignore[arg-type]
    assert json.loads(json.dumps(model.configuration())) == VAE(12, 2, (8,)).configuration()
    assert model.generate(3).shape == (3, 12)


def test_generating_is_seeded() -> None:
    model = VAE((1, 3, 4), 2, (8,))
    first, again, other = (model.generate(4, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first.shape == (4, 1, 3, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad
    assert ((first > 0) & (first < 1)).all()


def test_log_variances_are_clamped() -> None:
    """Weights that have gone astray give large numbers, not NaN."""
    model = VAE(4, 2, (), {"name": "gaussian"})
    with torch.no_grad():
        model.encoder[0].weight.copy_(torch.tensor([[1.0], [1.0], [1e6], [-1e6]]).expand(4, 4))
    posterior = model.posterior(torch.ones(1, 4))
    assert posterior.log_variance.tolist() == [[12.0, -12.0]]
    assert all(torch.isfinite(each) for each in model.losses(torch.ones(1, 4)).values())


def test_under_autocast_the_bound_is_float32() -> None:
    model, x = trained("bernoulli", steps=20)
    expected = model.losses(x, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(x, generator=seeded(0))
    for name, value in losses.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_the_bounds_of_a_model_of_16_bits_are_float32(likelihood: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = VAE(12, 2, (8,), likelihood, kl="monte_carlo").to(dtype), torch.rand(50, 12).to(dtype)
    losses = model.losses(x, generator=seeded(0))
    assert {each.dtype for each in losses.values()} == {torch.float32}
    losses["loss"].backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())
    assert model.log_likelihood(x).dtype == torch.float32
    assert model.generate(2).dtype == model(x).dtype == dtype


def test_no_data_have_no_bounds() -> None:
    model, x = VAE((3, 4), 2, (8,)), torch.zeros(0, 3, 4)
    for method in (model.elbo, model.log_likelihood):
        assert method(x).shape == (0,)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, 12), ValueError, r"x has shape \(2, 12\); expected \(N, 1, 3, 4\); call x.reshape\(-1, 1, 3, "),
        (torch.zeros(2, 1, 3, 4).double(), TypeError, r"dtype torch.float64, the model torch.float32; call x.to\(torc"),
        (torch.zeros(2, 1, 3, 4, device="meta"), ValueError, r"x lies on meta, the model on cpu; call x.to\('cpu'\)"),
        (torch.full((2, 1, 3, 4), 255.0), ValueError, r"x is 255 at \[0, 0, 0, 0\]; VAE expects values in \[0, 1\]"),
        (torch.full((2, 1, 3, 4), math.nan), ValueError, r"x contains nan at \[0, 0, 0, 0\]; expected finite numbers"),
    ],
)
def test_bad_data(x: Tensor, error: type[Exception], words: str) -> None:
    model = VAE((1, 3, 4), 2, (8,))
    for method in (model.losses, model.elbo, model.log_likelihood, model.check):
        with pytest.raises(error, match=words):
            method(x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data_shape": (4, 0)}, r"data_shape\[1\] is 0; expected an integer >= 1"),
        ({"n_latent": 0}, "n_latent is 0; expected an integer >= 1"),
        ({"widths": 8}, "widths is 8; expected at least 0 positive integers"),
        ({"beta": -1.0}, "beta is -1.0; expected a finite number >= 0"),
        ({"kl": "exact"}, "kl is 'exact'; expected one of closed, monte_carlo"),
        ({"likelihood": "poisson"}, "likelihood is 'poisson'; expected one of gaussian, bernoulli, continuous-bern"),
        ({"activation": "swish"}, "activation is 'swish'; expected one of relu"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VAE(**{"data_shape": 12, "n_latent": 2, **arguments})
    model = VAE(12, 2)
    with pytest.raises(ValueError, match="n is 0; expected an integer >= 1"):
        model.generate(0)
    with pytest.raises(ValueError, match="n_samples is 0; expected an integer >= 1"):
        model.log_likelihood(torch.zeros(2, 12), n_samples=0)
    with pytest.raises(TypeError, match=r"generator is 0; expected a torch.Generator: torch.Generator\(\).manual_seed"):
        model.generate(3, generator=0)  # type: ignore[arg-type]
