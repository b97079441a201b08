"""The VAE with a mixture for a prior: its bound, its clusters, and how it begins."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import emalgam
from emalgam.nn import MODELS, VAE, LatentMixtureSampler, MixtureVAE, Posterior
from emalgam.nn.mixture_vae import LatentPrior
from tests.divergence_oracles import kl
from tests.tolerances import STANDARD_ERRORS
from tests.torch.nn import oracles


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model() -> MixtureVAE:
    """Three components in two dimensions, away from the origin."""
    torch.manual_seed(0)
    model = MixtureVAE(8, 2, 3, (6,)).double()
    with torch.no_grad():
        model.prior.log_weights.copy_(torch.tensor([0.5, -0.3, 1.0]))
        model.prior.means.copy_(torch.tensor([[0.0, 1.0], [2.0, -1.0], [-1.5, 0.5]]))
        model.prior.log_cholesky.copy_(torch.tensor([[0.1, -0.3], [-0.5, 0.0], [0.2, -0.1]]))
    return model


def arrays(prior: LatentPrior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and variances."""
    values = prior.weights, prior.means, (2 * prior.log_deviations).exp()
    return tuple(each.detach().double().numpy() for each in values)


def posteriors(N: int = 15) -> Posterior:
    return Posterior(torch.randn(N, 2, generator=seeded(1)).double(), torch.randn(N, 2, generator=seeded(2)).double())


# ---- the bound


def test_the_bound_is_that_of_the_paper_at_its_best(model: MixtureVAE) -> None:
    """Eq. 12, written out, for the γ of `responsibilities`; every other γ gives less."""
    posterior, prior = posteriors(), arrays(model.prior)
    mean, variance = posterior.mean.numpy(), posterior.log_variance.exp().numpy()
    best = torch.softmax(model.prior.log_shares(posterior), -1)
    bound = -model.closed_kl(posterior).detach().numpy()
    rng = np.random.default_rng(0)
    for n in range(len(mean)):
        gamma = best[n].detach().numpy()
        assert bound[n] == pytest.approx(oracles.vade_bound(mean[n], variance[n], gamma, prior), rel=1e-12)
        for other in (*rng.dirichlet(np.ones(3), 5), *np.eye(3)):
            assert oracles.vade_bound(mean[n], variance[n], other, prior) < bound[n]


def test_the_closed_kl_bounds_the_divergence(model: MixtureVAE) -> None:
    """KL(q ‖ p) by Monte Carlo is no larger; with equal components it is the same, within 4 standard errors."""
    posterior = posteriors()
    for same in (False, True):
        if same:
            with torch.no_grad():
                model.prior.means[:] = model.prior.means[0].clone()
                model.prior.log_cholesky[:] = model.prior.log_cholesky[0].clone()
        with torch.no_grad():
            draws = model.monte_carlo_kl(posterior, posterior.sample(20_000, generator=seeded(3)))
            gap = model.closed_kl(posterior) - draws.mean(0)
        error = draws.std(0) / math.sqrt(len(draws))
        assert (gap >= -4 * error).all()
        assert (gap.abs() <= 4 * error).all() == same


def test_one_standard_component_is_a_plain_vae() -> None:
    torch.manual_seed(0)
    mixture, plain = MixtureVAE(8, 2, 1, (6,)), VAE(8, 2, (6,))
    with torch.no_grad():
        mixture.prior.means.zero_()
    plain.load_state_dict({name: each for name, each in mixture.state_dict().items() if not name.startswith("prior")})
    x = torch.rand(5, 8)
    for name, value in plain.losses(x, generator=seeded(0)).items():
        torch.testing.assert_close(mixture.losses(x, generator=seeded(0))[name], value)
    torch.testing.assert_close(
        mixture.log_likelihood(x, n_samples=3, generator=seeded(0)),
        plain.log_likelihood(x, n_samples=3, generator=seeded(0)),
    )


@pytest.mark.parametrize("kl", ["closed", "monte_carlo"])
def test_the_elbo_does_not_exceed_the_importance_weighted_bound(model: MixtureVAE, kl: str) -> None:
    model.kl, x, draws = kl, torch.rand(20, 8, generator=seeded(4)).double(), 200
    with torch.no_grad():
        elbo = torch.stack([model.elbo(x, generator=seeded(s)) for s in range(draws)])
        bound = torch.stack([model.log_likelihood(x, n_samples=20, generator=seeded(s)) for s in range(draws)])
    noise = STANDARD_ERRORS * ((elbo.var(0) + bound.var(0)) / draws).sqrt()
    assert (elbo.mean(0) <= bound.mean(0) + noise).all()
    assert elbo.mean() < bound.mean()


def test_the_prior_is_a_mixture(model: MixtureVAE) -> None:
    z = torch.randn(10, 2, generator=seeded(5)).double() * 3
    expected = oracles.mixture_log_prob(z.numpy(), *arrays(model.prior))
    np.testing.assert_allclose(model.log_prior(z).detach(), expected, rtol=1e-12)
    np.testing.assert_allclose(model.prior.to_fit().log_prob(z.numpy()), expected, rtol=1e-9)
    assert model.log_prior(z.reshape(5, 2, 2)).shape == (5, 2)


def correlated() -> emalgam.Mixture:
    """Two components whose two features go together, and against each other."""
    covariances = np.array([[[1.0, 0.8], [0.8, 2.0]], [[0.5, -0.3], [-0.3, 0.4]]])
    return emalgam.Mixture([0.3, 0.7], [[1.0, 0.0], [-1.0, 2.0]], covariances)


def test_full_covariances() -> None:
    """log π_c − KL(q ‖ N(μ_c, Σ_c)) against the closed form; density and draws are those of the mixture."""
    mixture, posterior = correlated(), posteriors()
    model = MixtureVAE(8, 2, 2, (6,), covariance_type="full").double().initialize_prior(mixture)
    for n in range(len(posterior.mean)):
        q = posterior.mean[n].numpy(), np.diag(posterior.log_variance[n].exp().numpy())
        expected = [np.log(mixture.weights[c]) - kl(q, (mixture.means[c], mixture.covariances[c])) for c in range(2)]
        np.testing.assert_allclose(model.prior.log_shares(posterior)[n].detach(), expected, rtol=1e-10)
    z = model.sample_prior(2000, generator=seeded(0))
    np.testing.assert_allclose(model.log_prior(z).detach(), mixture.log_prob(z.numpy()), rtol=1e-9)
    own = model.prior.sample_component(40_000, 1, generator=seeded(7)).detach().numpy()
    np.testing.assert_allclose(np.cov(own.T), mixture.covariances[1], atol=0.02)  # five standard errors
    model.losses(torch.rand(5, 8).double())["loss"].backward()
    assert (model.prior.log_cholesky.grad[:, 1, 0] != 0).all()


def test_a_diagonal_prior_keeps_the_variances() -> None:
    mixture = correlated()
    model = MixtureVAE(8, 2, 2, (6,)).initialize_prior(mixture)
    assert model.prior.log_cholesky.shape == (2, 2)
    prior = model.prior.to_fit()
    np.testing.assert_allclose(prior.means, mixture.means)
    np.testing.assert_allclose(prior.covariances, np.einsum("kii->ki", mixture.covariances), rtol=1e-6)


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_a_latent_prior_from_a_fit(covariance_type: str) -> None:
    mixture = correlated()
    prior = LatentPrior.from_fit(mixture, covariance_type=covariance_type, dtype=torch.float64)
    assert prior.covariance_type == covariance_type
    expected = mixture.covariances if covariance_type == "full" else np.einsum("kii->ki", mixture.covariances)
    np.testing.assert_allclose(prior.to_fit().covariances, expected)


def test_samples_of_the_prior(model: MixtureVAE) -> None:
    """Mean and second moments of the mixture, in random order."""
    N = 40_000
    weights, means, variances = arrays(model.prior)
    z = model.sample_prior(N, generator=seeded(6)).detach().numpy()
    for values, expected in ((z, weights @ means), (z**2, weights @ (variances + means**2))):
        error = values.std(0) / np.sqrt(N)
        assert (np.abs(values.mean(0) - expected) <= STANDARD_ERRORS * error).all()
    labels = model.prior.to_fit().predict(z[:2000])
    assert len(np.unique(labels[:20])) == 3
    own = model.prior.sample_component(N, 1, generator=seeded(7)).detach().numpy()
    assert (np.abs(own.mean(0) - means[1]) <= STANDARD_ERRORS * np.sqrt(variances[1] / N)).all()


# ---- clusters, and how they begin


def test_responsibilities(model: MixtureVAE) -> None:
    x = torch.rand(30, 8, generator=seeded(8)).double()
    responsibilities = model.responsibilities(x)
    assert responsibilities.shape == (30, 3)
    torch.testing.assert_close(responsibilities.sum(1), torch.ones(30).double())
    assert torch.equal(model.predict(x), responsibilities.argmax(1))
    posterior = model.posterior(x)
    means, variances = posterior.mean.detach().numpy(), posterior.log_variance.exp().detach().numpy()
    joint = [
        [oracles.vade_bound(means[n], variances[n], one, arrays(model.prior)) for one in np.eye(3)] for n in range(30)
    ]
    np.testing.assert_allclose(responsibilities.detach(), special.softmax(joint, axis=1), rtol=1e-10)


def test_generating_from_one_component(model: MixtureVAE) -> None:
    first, again = (model.generate(50, component=2, generator=seeded(0)) for _ in range(2))
    assert first.shape == (50, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, model.generate(50, component=1, generator=seeded(0)))
    assert model.generate(5, generator=seeded(0)).shape == (5, 8)
    with torch.no_grad():
        model.prior.log_cholesky[2] = -12.0
    assert model.generate(50, component=2).std(0).max() < 0.01
    with pytest.raises(ValueError, match="component is 3; expected an integer from 0 to 2"):
        model.generate(5, component=3)


def clusters(N: int = 300) -> tuple[Tensor, Tensor]:
    """Three kinds of bars of 8 pixels, and their labels."""
    labels = torch.arange(N) % 3
    x = torch.nn.functional.one_hot(labels * 3, 8) * 0.8 + 0.1 * torch.rand(N, 8, generator=seeded(9))
    return x, labels


def test_three_steps_find_the_clusters() -> None:
    torch.manual_seed(0)
    model, (x, labels) = MixtureVAE(8, 2, 3, (16,), {"name": "gaussian", "variance": 0.01}), clusters()
    for pretraining in (True, False):
        model.pretraining = pretraining
        if not pretraining:
            model.initialize_prior(DataLoader(TensorDataset(x, labels), 64), random_state=0)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        first = model.losses(x)["loss"].item()
        for _ in range(100):
            optimizer.zero_grad()
            model.losses(x)["loss"].backward()
            optimizer.step()
        assert model.losses(x)["loss"].item() < first
    assert oracles.clustering_accuracy(model.predict(x).numpy(), labels.numpy()) == 1.0


def test_pretraining_is_an_autoencoder(model: MixtureVAE) -> None:
    """No prior, no noise: the prior gets no gradient, and twice the same loss."""
    x = torch.rand(5, 8).double()
    model.pretraining = True
    losses = model.losses(x)
    assert sorted(losses) == ["loss", "reconstruction"]
    assert losses["loss"] == -losses["reconstruction"] == model.losses(x)["loss"]
    expected = model.likelihood.log_prob(x, model.output(model.encode(x))).mean()
    torch.testing.assert_close(losses["reconstruction"], expected)
    losses["loss"].backward()
    assert all(each.grad is None for each in model.prior.parameters())
    model.denoising = 0.5
    noisy = [model.losses(x, generator=seeded(seed))["loss"] for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]
    z = model.encode(x + 0.5 * torch.randn(5, 8, generator=seeded(0), dtype=x.dtype))
    torch.testing.assert_close(-noisy[0], model.likelihood.log_prob(x, model.output(z)).mean())  # of the clean input
    model.pretraining = False
    assert sorted(model.losses(x)) == ["elbo", "kl", "loss", "reconstruction"]


def test_where_a_prior_comes_from() -> None:
    """A mixture, an estimator, latents of either kind, and batches of data give the same prior."""
    torch.manual_seed(0)
    model, (x, labels) = MixtureVAE(8, 2, 3, (6,)), clusters()
    z = model.encode(x).detach()
    fitted = emalgam.GaussianMixture(3, covariance_type="diag", n_init=20, random_state=0).fit(z.double().numpy())
    expected = fitted.mixture_
    batches = [(x[:100], labels[:100]), (x[100:], labels[100:])]
    sampler = LatentMixtureSampler(3, "diag", n_init=20, random_state=0).fit_latents(z.double())
    fit = emalgam.fit(z.double().numpy(), 3, covariance_type="diag", n_init=20, random_state=0)
    for source in (expected, fitted, fit, sampler, z, z.double().numpy(), [x], batches):
        torch.nn.init.normal_(model.prior.means)
        assert model.initialize_prior(source, random_state=0, posterior_variance=None) is model
        prior = model.prior.to_fit()
        np.testing.assert_allclose(prior.weights, expected.weights, rtol=1e-5)
        np.testing.assert_allclose(prior.means, expected.means, atol=1e-5)
        np.testing.assert_allclose(prior.covariances, expected.covariances, rtol=1e-4)
    assert model.training


def test_the_variance_of_the_posterior_at_the_start() -> None:
    model, (x, _) = MixtureVAE(8, 2, 2, (6,)), clusters()
    mixture = emalgam.Mixture([0.25, 0.75], np.zeros((2, 2)), np.array([[1.0, 4.0], [2.0, 8.0]]), "diag")
    mean = model.encode(x)
    model.initialize_prior(mixture)
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.log_variance.exp(), torch.tensor([[0.175, 0.7]]).expand(300, 2))
    assert torch.equal(posterior.mean, mean)
    model.initialize_prior(mixture, posterior_variance=0.0)
    assert (model.posterior(x).log_variance == -12).all()


def test_collapsed_components_are_clamped() -> None:
    """Variances that no float32 density bears, and weights of zero, give finite losses."""
    model = MixtureVAE(8, 2, 2, (6,))
    model.initialize_prior(emalgam.Mixture([0.0, 1.0], np.zeros((2, 2)), np.array([[1e-30, 1.0], [1e30, 1.0]]), "diag"))
    losses = model.losses(torch.rand(4, 8))
    losses["loss"].backward()
    assert all(torch.isfinite(each) for each in losses.values())
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())
    assert model.prior.to_fit().covariances[0, 0] == pytest.approx(math.exp(-12))
    assert torch.isfinite(model.generate(3)).all()


def test_collapsed_components_come_back() -> None:
    """Rows wider than a component below the clamp pull it up again."""
    prior, z = LatentPrior(1, 2, "diag"), torch.randn(200, 2, generator=seeded(10))
    with torch.no_grad():
        prior.means.zero_()
        prior.log_cholesky.copy_(torch.full((1, 2), -6.5))
    optimizer = torch.optim.Adam([prior.log_cholesky], 0.1)
    for _ in range(120):
        optimizer.zero_grad()
        (-prior.log_prob(z).mean()).backward()
        optimizer.step()
    assert (prior.log_deviations > -5).all()  # 1.5 above where they were, and on the way to 0


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (emalgam.Mixture([1.0], np.zeros((1, 2)), np.ones((1, 2)), "diag"), r"of shape \(1, 2\); expected \(3, 2\)"),
        (emalgam.GaussianMixture(3), r"the GaussianMixture is not fitted; call its fit first, or pass latents"),
        (LatentMixtureSampler(3), r"the LatentMixtureSampler is not fitted; call its fit first, or pass latents"),
        (
            torch.rand(10, 8),
            r"latents have shape \(10, 8\); expected \(N, 2\): pass model.encode\(x\), or batches of x",
        ),
        ([torch.rand(10, 7).double()], r"x has shape \(10, 7\); expected \(N, 8\)"),
    ],
)
def test_what_is_no_prior(model: MixtureVAE, source: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model.initialize_prior(source)


def test_what_is_no_source_at_all(model: MixtureVAE) -> None:
    with pytest.raises(TypeError, match=r"source is a NoneType; expected a mixture, a fit, latents, or batches of x"):
        model.initialize_prior(None)


# ---- the rest of the contract


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_a_model_of_16_bits(covariance_type: str, dtype: torch.dtype) -> None:
    """It draws and decodes in its own type, and its bounds are float32, of either kind."""
    torch.manual_seed(0)
    model = MixtureVAE(8, 2, 3, (6,), covariance_type=covariance_type).to(dtype)
    x = torch.rand(20, 8).to(dtype)
    model.initialize_prior(model.encode(x), random_state=0, n_init=1)
    for model.kl in ("closed", "monte_carlo"):
        losses = model.losses(x)
        assert all(each.dtype == torch.float32 and each.isfinite() for each in losses.values())
        losses["loss"].backward()
    assert model.log_likelihood(x, n_samples=3).dtype == torch.float32
    assert {model.generate(3).dtype, model.generate(3, component=1).dtype} == {dtype}
    posterior = model.posterior(x)
    shares = model.prior.log_shares(posterior)
    expected = model.float().prior.log_shares(Posterior(*(each.float() for each in posterior)))
    torch.testing.assert_close(shares, expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_bound_is_float32() -> None:
    """The divergence to full covariances has no digit less."""
    torch.manual_seed(0)
    model, posterior = MixtureVAE(8, 2, 2, (6,), covariance_type="full"), posteriors()
    model.initialize_prior(correlated())
    posterior = Posterior(*(each.float() for each in posterior))
    expected = model.closed_kl(posterior)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.closed_kl(posterior), expected, rtol=0, atol=0)


def test_the_configuration_makes_the_same_model() -> None:
    model = MixtureVAE(
        (2, 4), 3, 5, (6,), {"name": "gaussian", "variance": 0.5}, 0.7, "monte_carlo", "tanh", "full", 0.2
    )
    again = MODELS["mixture-vae"](**json.loads(json.dumps(model.configuration())))
    again.load_state_dict(model.state_dict())
    assert again.configuration() == model.configuration()
    x = torch.rand(3, 2, 4)
    assert torch.equal(again.responsibilities(x), model.responsibilities(x))
    assert torch.equal(again.generate(3, generator=seeded(0)), model.generate(3, generator=seeded(0)))
    with pytest.raises(ValueError, match="n_components is 0; expected an integer >= 1"):
        MixtureVAE(8, 2, 0)
    with pytest.raises(ValueError, match="covariance_type is 'tied'; expected one of diag, full"):
        MixtureVAE(8, 2, 3, covariance_type="tied")
    with pytest.raises(ValueError, match=r"x is 2 at \[0, 0\]; MixtureVAE expects values in \[0, 1\]"):
        MixtureVAE(8, 2, 3).losses(torch.full((2, 8), 2.0))
