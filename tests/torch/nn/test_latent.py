"""A mixture of a model's latents: what it is fitted to, how K is chosen, what it draws and decodes, what it keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import emalgam
from emalgam.em import ConvergenceWarning
from emalgam.nn import Autoencoder, ConvAutoencoder, LatentMixtureSampler
from emalgam.nn.evaluation import decode, encode, reconstruct
from emalgam.nn.latent import LatentStream
from tests.tolerances import STANDARD_ERRORS

N, D = 900, 2
MEANS = np.array([[0.0, 0.0], [12.0, 0.0], [0.0, 12.0]])
WEIGHTS = np.array([0.5, 0.3, 0.2])


class Scaled(Autoencoder):
    """A model whose latents are the first two of four features, times two; in training mode they are noise."""

    def __init__(self) -> None:
        super().__init__((4, 2))
        self.dropout = torch.nn.Dropout(0.5)
        self.encoded: list[int] = []

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.encoded.append(len(x))
        return self.dropout(2 * self.check_input(x)[:, :2])

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        z = self.dropout(self.check_latents(z))
        return torch.cat([z / 2, z.sum(1, keepdim=True), torch.ones_like(z[:, :1])], dim=1)


@pytest.fixture
def model() -> Scaled:
    return Scaled()


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    rng = np.random.default_rng(3)
    latents = rng.normal(size=(N, D)) + MEANS[rng.choice(3, N, p=WEIGHTS)]
    return np.concatenate([latents / 2, rng.normal(size=(N, 2))], axis=1).astype(np.float32)


@pytest.fixture
def sampler(model: Scaled, x: np.ndarray) -> LatentMixtureSampler:
    return LatentMixtureSampler(range(1, 7), random_state=0).fit(model, x)


# ---- fitting


def test_the_criterion_finds_the_components(sampler: LatentMixtureSampler, x: np.ndarray) -> None:
    assert sampler.mixture.n_components == 3
    found = sampler.mixture.means[np.lexsort(sampler.mixture.means.round(-1).T)]
    np.testing.assert_allclose(found, MEANS, atol=0.4)
    assert sorted(sampler.criterion_values) == [1, 2, 3, 4, 5, 6]
    assert min(sampler.criterion_values, key=sampler.criterion_values.__getitem__) == 3
    assert sampler.criterion_values[3] == pytest.approx(sampler.mixture.bic(2 * x[:, :2]), rel=1e-9)


def test_the_mixture_is_that_of_a_fit_to_the_latents(sampler: LatentMixtureSampler, x: np.ndarray) -> None:
    direct = emalgam.fit(2 * x[:, :2], 3, random_state=0, max_iter=500).mixture
    for name in ("weights", "means", "covariances"):
        np.testing.assert_array_equal(getattr(sampler.mixture, name), getattr(direct, name))


def test_each_number_of_components_is_fitted_as_if_alone(model: Scaled, x: np.ndarray) -> None:
    among = LatentMixtureSampler([3, 1], random_state=7).fit(model, x)
    alone = LatentMixtureSampler(3, random_state=7).fit(model, x)
    np.testing.assert_array_equal(among.mixture.means, alone.mixture.means)
    assert alone.criterion_values == {3: among.criterion_values[3]}


def test_aic_and_covariance_types(model: Scaled, x: np.ndarray) -> None:
    for covariance_type in ("full", "tied", "diag", "spherical"):
        sampler = LatentMixtureSampler(range(2, 5), covariance_type, "aic", random_state=0).fit(model, x)
        assert sampler.mixture.covariance_type == covariance_type
        best = min(sampler.criterion_values.values())
        assert best == pytest.approx(sampler.mixture.aic(2 * x[:, :2]), rel=1e-9)


def test_one_component_is_the_gaussian_of_the_latents(model: Scaled, x: np.ndarray) -> None:
    single = LatentMixtureSampler(1).fit(model, x)
    z = 2.0 * x[:, :2].astype(np.float64)
    np.testing.assert_allclose(single.mixture.means[0], z.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(single.mixture.covariances[0], np.cov(z.T, bias=True), rtol=1e-5, atol=1e-5)


def test_no_more_parameters_than_latents(model: Scaled, x: np.ndarray) -> None:
    """A full component in two dimensions has six parameters: 5 of K = 1, 11 of K = 2, 17 of K = 3."""
    sampler = LatentMixtureSampler(range(1, 20), random_state=0)
    assert sorted(sampler.fit(model, x[:17]).criterion_values) == [1, 2]
    assert sorted(sampler.fit(model, x[:18]).criterion_values) == [1, 2, 3]
    assert sorted(LatentMixtureSampler([4, 9], random_state=0).fit(model, x[:10]).criterion_values) == [4]


@pytest.mark.parametrize("kind", ["tensor", "float64", "dataset", "labelled", "loader", "list of batches", "generator"])
def test_data_of_every_kind(kind: str, model: Scaled, x: np.ndarray, sampler: LatentMixtureSampler) -> None:
    tensor, labels = torch.from_numpy(x), torch.zeros(N)
    batches = [tensor[:500], tensor[500:]]
    data = {
        "tensor": tensor,
        "float64": x.astype(np.float64),
        "dataset": TensorDataset(tensor),
        "labelled": TensorDataset(tensor, labels),
        "loader": DataLoader(TensorDataset(tensor, labels), batch_size=128),
        "list of batches": DataLoader(tensor, batch_size=300),
        "generator": (batch for batch in batches),
    }[kind]
    found = LatentMixtureSampler(range(1, 7), random_state=0).fit(model, data)
    np.testing.assert_array_equal(found.mixture.means, sampler.mixture.means)


def test_integers_need_a_scale(model: Scaled, x: np.ndarray) -> None:
    counts = np.round(x * 16).astype(np.int32)
    found = LatentMixtureSampler(3, random_state=0).fit(model, counts, scale=1 / 16)
    direct = emalgam.fit(2 * counts[:, :2].astype(np.float32) / 16, 3, random_state=0, max_iter=500).mixture
    np.testing.assert_array_equal(found.mixture.means, direct.means)
    with pytest.raises(TypeError, match="data have dtype int32; say how to scale them"):
        LatentMixtureSampler(3).fit(model, counts)


def test_latents_that_do_not_fit_are_encoded_again_in_every_pass(model: Scaled, x: np.ndarray) -> None:
    in_memory = LatentMixtureSampler(3, random_state=0).fit(model, x, rows_at_once=128)
    assert model.encoded == [128] * 7 + [N - 7 * 128]
    streamed = LatentMixtureSampler(3, random_state=0).fit(model, x, rows_at_once=128, max_bytes=1000)
    assert sum(model.encoded) > 4 * N
    order = [np.lexsort(found.mixture.means.round().T) for found in (in_memory, streamed)]
    np.testing.assert_allclose(streamed.mixture.means[order[1]], in_memory.mixture.means[order[0]], atol=1e-2)
    with pytest.raises(ValueError, match="the data are a generator, which can be gone through once, and their latents"):
        LatentMixtureSampler(3).fit(model, (row for row in [torch.from_numpy(x)]), max_bytes=1000)


def test_the_stream_of_latents(model: Scaled, x: np.ndarray) -> None:
    stream = LatentStream(model, x, 256).again()
    assert (stream.n_features, stream.dtype) == (2, np.float32)
    for _ in range(2):
        pieces = list(stream.map(lambda z: z.copy()))
        np.testing.assert_array_equal(np.concatenate(pieces), 2 * x[:, :2])


def test_the_model_is_left_as_it_was(model: Scaled, x: np.ndarray) -> None:
    model.train()
    model.encoder.eval()
    sampler = LatentMixtureSampler(2, random_state=0).fit(model, x)
    sampler.sample(5, 0)
    assert model.training
    assert model.dropout.training
    assert not model.encoder.training
    assert torch.is_grad_enabled()


def test_a_fit_that_did_not_converge_warns_once(model: Scaled, x: np.ndarray) -> None:
    with pytest.warns(ConvergenceWarning, match="EM did not converge in 1 iterations") as warned:
        LatentMixtureSampler([2, 3], random_state=0, max_iter=1).fit(model, x)
    assert len(warned) == 1


# ---- sampling


def test_samples_have_the_moments_of_the_mixture(sampler: LatentMixtureSampler) -> None:
    n = 20_000
    z, labels = sampler.sample_latents(n, 0)
    assert (z.shape, z.dtype, labels.dtype) == ((n, 2), torch.float32, torch.int64)
    weights = np.bincount(labels.numpy(), minlength=3) / n
    error = np.sqrt(sampler.mixture.weights * (1 - sampler.mixture.weights) / n)
    assert (np.abs(weights - sampler.mixture.weights) < STANDARD_ERRORS * error).all()
    for k in range(3):
        member = z[labels == k].double().numpy()
        error = np.sqrt(np.diag(sampler.mixture.covariances[k]) / len(member))
        assert (np.abs(member.mean(axis=0) - sampler.mixture.means[k]) < STANDARD_ERRORS * error).all()


def test_samples_are_in_random_order(sampler: LatentMixtureSampler) -> None:
    """Runs of equal labels: as many as independent draws have, to within 5 standard deviations."""
    labels = sampler.sample_latents(5000, 1)[1].numpy()
    p = sampler.mixture.weights
    changes = np.count_nonzero(np.diff(labels))
    expected = 4999 * (1 - (p**2).sum())
    assert abs(changes - expected) < 5 * np.sqrt(4999)


def test_the_same_seed_gives_the_same_samples(sampler: LatentMixtureSampler) -> None:
    x, labels = sampler.sample(50, 3)
    again, _ = sampler.sample(50, 3, rows_at_once=7)
    torch.testing.assert_close(again, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sampler.sample(20, 3)[0], x[:20])
    assert torch.equal(sampler.sample(20, 3)[1], labels[:20])
    assert not torch.equal(sampler.sample(50, 4)[0], x)
    assert not torch.equal(sampler.sample(50)[0], sampler.sample(50)[0])


def test_samples_are_decoded_latents(sampler: LatentMixtureSampler, model: Scaled) -> None:
    model.train()
    z, of_latents = sampler.sample_latents(30, 5)
    x, labels = sampler.sample(30, 5, rows_at_once=8)
    assert torch.equal(labels, of_latents)
    torch.testing.assert_close(x[:, :2], z / 2)
    torch.testing.assert_close(x[:, 2], z.sum(1))
    assert not x.requires_grad


def test_latents_with_axes(x: np.ndarray) -> None:
    torch.manual_seed(0)
    model = ConvAutoencoder((1, 8, 8), channels=(4, 2)).double()
    images = np.random.default_rng(0).random((200, 1, 8, 8))
    sampler = LatentMixtureSampler(range(1, 4), "diag", random_state=0).fit(model, images)
    assert sampler.latent_shape == model.latent_shape
    assert sampler.mixture.n_features == np.prod(model.latent_shape)
    z, _ = sampler.sample_latents(7, 0)
    assert (z.shape, z.dtype) == ((7, *model.latent_shape), torch.float64)
    assert sampler.sample(7, 0)[0].shape == (7, 1, 8, 8)


def test_latents_without_a_model(x: np.ndarray) -> None:
    z = torch.from_numpy(x[:, :2])
    sampler = LatentMixtureSampler(3, random_state=0).fit_latents(z)
    assert sampler.sample_latents(4, 0)[0].shape == (4, 2)
    with pytest.raises(ValueError, match="there is no model to decode with"):
        sampler.sample(4)


def test_latents_as_they_come_from_a_model(x: np.ndarray) -> None:
    """With gradients, with the axes of images, or as a list."""
    torch.manual_seed(0)
    model, images = ConvAutoencoder((1, 8, 8), channels=(4, 2)), torch.rand(200, 1, 8, 8)
    z = model.encode(images)
    assert z.requires_grad
    fitted = LatentMixtureSampler(2, "diag", random_state=0).fit(model, images)
    sampler = LatentMixtureSampler(2, "diag", random_state=0).fit_latents(z)
    np.testing.assert_allclose(sampler.mixture.means, fitted.mixture.means, rtol=1e-6)
    assert sampler.latent_shape == model.latent_shape
    sampler.model = model
    assert sampler.sample(3, 0)[0].shape == (3, 1, 8, 8)
    listed = LatentMixtureSampler(3, random_state=0).fit_latents(x[:, :2].tolist())
    same = LatentMixtureSampler(3, random_state=0).fit_latents(x[:, :2].astype(np.float64))
    np.testing.assert_array_equal(listed.mixture.means, same.mixture.means)
    few = torch.from_numpy(x[:, :2]).bfloat16()
    rounded = LatentMixtureSampler(3, random_state=0).fit_latents(few)
    np.testing.assert_array_equal(
        rounded.mixture.means, LatentMixtureSampler(3, random_state=0).fit_latents(few.float()).mixture.means
    )


# ---- what is kept


def test_state_round_trip(sampler: LatentMixtureSampler, model: Scaled) -> None:
    state = sampler.state()
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    rest = json.loads(json.dumps({name: value for name, value in state.items() if name not in arrays}))
    again = LatentMixtureSampler.from_state({**arrays, **rest}, model)
    assert sorted(arrays) == ["covariances", "means", "weights"]
    assert torch.equal(again.sample(20, 1)[0], sampler.sample(20, 1)[0])
    assert again.criterion_values == sampler.criterion_values
    assert (again.covariance_type, again.criterion, again.latent_shape) == ("full", "bic", (2,))


def test_a_state_that_is_none(sampler: LatentMixtureSampler, model: Scaled) -> None:
    state = sampler.state()
    wrong = [
        ({"latent_shape": [3]}, r"latent_shape is \[3\]; expected lengths whose product is 2"),
        ({"latent_shape": "2"}, "latent_shape is '2'; expected lengths"),
        ({"latent_shape": [2, 1]}, r"latent_shape is \(2, 1\); the model's latents have shape \(2,\)"),
        ({"weights": state["weights"] * 2}, "expected weights >= 0 that sum to one"),
        ({"means": np.zeros((3, 3))}, "covariances has shape"),
        ({"covariance_type": "round"}, "covariance_type is 'round'"),
        ({"criterion": "best"}, "criterion is 'best'; expected one of bic, aic"),
        ({"criterion_values": {"many": 1.0}}, "criterion_values is"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            LatentMixtureSampler.from_state(state | change, model)
    del state["means"]
    with pytest.raises(ValueError, match="the state of the sampler has no 'means'"):
        LatentMixtureSampler.from_state(state)


# ---- bad arguments


def test_bad_arguments_say_what_is_expected(model: Scaled, x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="n_components is empty"):
        LatentMixtureSampler([])
    with pytest.raises(ValueError, match="n_components is 0; expected an integer >= 1"):
        LatentMixtureSampler(range(3))
    for K, given in ((2.0, "2.0"), (None, "None"), (np.array(2), r"array\(2\)")):
        with pytest.raises(ValueError, match=f"n_components is {given}; expected an integer >= 1"):
            LatentMixtureSampler(K)
    with pytest.raises(ValueError, match="criterion is 'icl'; expected one of bic, aic"):
        LatentMixtureSampler(criterion="icl")
    with pytest.raises(ValueError, match="covariance_type is 'round'"):
        LatentMixtureSampler(covariance_type="round")
    with pytest.raises(ValueError, match="max_iter is -1"):
        LatentMixtureSampler(max_iter=-1)
    with pytest.raises(ValueError, match=r"z is a single number; expected latents \(N, \*latent_shape\)"):
        LatentMixtureSampler(1).fit_latents(torch.tensor(1.0))
    with pytest.raises(ValueError, match="rows_at_once is 0; expected an integer >= 1"):
        LatentMixtureSampler(1).fit(model, x).sample(3, rows_at_once=0)
    sampler = LatentMixtureSampler()
    for call in (sampler.state, lambda: sampler.sample_latents(3)):
        with pytest.raises(ValueError, match=r"has no mixture yet; call fit\(model, data\) first"):
            call()
    with pytest.raises(ValueError, match=r"x has shape \(900, 2\); expected \(N, 4\)"):
        sampler.fit(model, x[:, :2])
    bad = x.copy()
    bad[700, 1] = np.nan
    with pytest.raises(ValueError, match="the array of latents contains NaN at row 700, column 1"):
        sampler.fit(model, bad, rows_at_once=64)
    with pytest.raises(ValueError, match="data have no rows; expected at least one"):
        sampler.fit(model, x[:0])
    with pytest.raises(ValueError, match="there are no data to encode"):
        sampler.fit(model, DataLoader(TensorDataset(torch.zeros(0, 4))))
    with pytest.raises(ValueError, match=r"there are 2 samples .* for n_components=5"):
        LatentMixtureSampler(5).fit(model, x[:2])
    with pytest.raises(ValueError, match="rows_at_once is 0"):
        sampler.fit(model, x, rows_at_once=0)
    fitted = LatentMixtureSampler(1).fit(model, x)
    with pytest.raises(ValueError, match="n_samples is 0; expected an integer >= 1"):
        fitted.sample(0)
    with pytest.raises(ValueError, match="rows_at_once is 0; expected an integer >= 1"):
        fitted.sample(3, rows_at_once=0)


# ---- arrays through a model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_arrays_through_a_model(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Autoencoder((4, 2)).to(dtype)
    x = np.random.default_rng(0).random((10, 4))
    x.setflags(write=False)
    z = encode(model, x, rows_at_once=3)
    assert z.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    with torch.no_grad():
        expected = model.encode(torch.tensor(x).to(dtype)).to(torch.float64)
    np.testing.assert_allclose(z, expected, rtol=0.05 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    np.testing.assert_allclose(decode(model, z), reconstruct(model, x), rtol=1e-6, atol=1e-6)
    assert encode(model, x[:0]).shape == (0, 2)


def test_arrays_that_a_model_cannot_take() -> None:
    model, images = Autoencoder((4, 2)), np.zeros((3, 4), np.uint8)
    for function in (encode, reconstruct):
        with pytest.raises(
            TypeError, match=r"given torch\.uint8; expected floating point, scaled .* \(pixels: / 255\)"
        ):
            function(model, images)
    with pytest.raises(ValueError, match=r"rows_at_once is -1; expected an integer >= 1"):
        encode(model, images / 255, rows_at_once=-1)
