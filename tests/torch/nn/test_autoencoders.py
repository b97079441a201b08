"""Autoencoders: their sizes, what they learn, and what they say about bad input."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg, stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from emalgam.nn import MODELS, Autoencoder, ConvAutoencoder, LatentModel, LinearAutoencoder


def small_models() -> dict[str, LatentModel]:
    torch.manual_seed(0)
    image = {"data_shape": (2, 9, 6), "channels": (5, 3)}
    return {
        "linear": LinearAutoencoder(6, 2),
        "tied linear": LinearAutoencoder(6, 2, tied=True),
        "dense": Autoencoder((12, 7, 3), "elu", "sigmoid", "tanh", denoising=0.1),
        "tied dense": Autoencoder((12, 7, 3), tied=True),
        "transposed": ConvAutoencoder(**image),
        "nearest": ConvAutoencoder(**image, upsample="nearest", output="identity"),
        "tied transposed": ConvAutoencoder(**image, tied=True),
        "tied nearest": ConvAutoencoder(**image, upsample="nearest", tied=True),
    }


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """scikit-learn's 1797 digits, (1797, 64), in [0, 1]."""
    return torch.tensor(load_digits().data / 16.0, dtype=torch.float32)


def descend(model: LatentModel, x: Tensor, steps: int, learning_rate: float, batch: int | None = None) -> None:
    """Adam; without a batch size every step sees all data."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    shuffle = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=shuffle) if batch else slice(None)
        optimizer.zero_grad()
        model.losses(x[rows], generator=shuffle)["loss"].backward()
        optimizer.step()


# ---- sizes


@pytest.mark.parametrize(
    ("model", "count", "latent_shape"),
    [
        (LinearAutoencoder(3, 2), 17, (2,)),
        (LinearAutoencoder(3, 2, tied=True), 11, (2,)),
        (Autoencoder.shallow(), 157_684, (100,)),
        (Autoencoder.deep(), 437_812, (4,)),
        (Autoencoder.deep(tied=True), 219_636, (4,)),
        (ConvAutoencoder(), 15_241, (8, 7, 7)),
        (ConvAutoencoder(tied=True), 10_633, (8, 7, 7)),
        (ConvAutoencoder((3, 32, 20), (16, 8)), 2_331, (8, 8, 5)),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else str(each),
)
def test_sizes(model: LatentModel, count: int, latent_shape: tuple[int, ...]) -> None:
    assert parameters(model) == count
    assert model.latent_shape == latent_shape
    x = torch.rand(2, *model.data_shape)
    assert model.encode(x).shape == (2, *latent_shape)
    assert model.reconstruct(x).shape == x.shape
    torch.testing.assert_close(model(x), model.decode(model.encode(x)))


@pytest.mark.parametrize("name", small_models())
def test_the_configuration_makes_the_same_model(name: str) -> None:
    model = small_models()[name]
    again = type(model)(**json.loads(json.dumps(model.configuration())))
    again.load_state_dict(model.state_dict())
    x = torch.rand(3, *model.data_shape)
    assert torch.equal(again(x), model(x))
    assert type(model) in MODELS.values()
    assert again.configuration() == model.configuration()


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("data_shape", [(1, 28, 28), (3, 9, 14), (1, 4, 7), (2, 5, 32)])
def test_images_of_any_size(data_shape: tuple[int, ...], tied: bool, upsample: str) -> None:
    model = ConvAutoencoder(data_shape, (6, 3), upsample=upsample, tied=tied)
    x = torch.rand(2, *data_shape)
    assert model.latent_shape == (3, data_shape[1] // 4, data_shape[2] // 4)
    assert model.reconstruct(x).shape == x.shape
    model.losses(x)["loss"].backward()
    assert all(each.grad is not None for each in model.parameters())


# ---- tied weights


@pytest.mark.parametrize("name", [name for name in small_models() if name.startswith("tied")])
def test_tied_weights_are_one_tensor(name: str) -> None:
    """The state holds each weight once, and a copy is tied to its own encoder."""
    model = small_models()[name]
    assert not any(key.startswith("decoder") and key.endswith("weight") for key in model.state_dict())
    other, x = copy.deepcopy(model), torch.rand(2, *model.data_shape)
    with torch.no_grad():
        for each in model.parameters():
            each.zero_()
        z = torch.rand(2, *model.latent_shape)
        offset = model.decode(torch.zeros_like(z))
    assert torch.equal(model.decode(z), offset)
    assert not torch.equal(other(x), model(x))


def test_a_tied_decoder_is_the_transpose() -> None:
    model = LinearAutoencoder(6, 2, tied=True)
    z, W = torch.rand(3, 2), model.encoder[0].weight
    torch.testing.assert_close(model.decode(z), z @ W + model.decoder[0].bias)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_a_tied_convolution_is_the_adjoint(size: int, upsample: str) -> None:
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩, A the encoder's convolution of stride 2, or of stride 1 and y with its pixels repeated."""
    model = ConvAutoencoder((2, size, size), (3,), upsample=upsample, tied=True).double()
    x, y = torch.randn(1, 2, size, size).double(), torch.randn(1, 3, size // 2, size // 2).double()
    layer, weight = model.decoder[0], model.encoder[0].weight
    back = layer(y) - layer.bias[:, None, None]
    if upsample == "transposed":
        forwards = nn.functional.conv2d(x, weight, stride=2, padding=1 - size % 2)
    else:
        forwards, y = nn.functional.conv2d(x, weight, padding=1), nn.functional.interpolate(y, (size, size))
    torch.testing.assert_close((forwards * y).sum(), (back * x).sum())


# ---- what they learn


def plane() -> np.ndarray:
    """100 noisy points of a plane in three dimensions, centred and scaled, as the slides have them."""
    rng = np.random.default_rng(4)
    angles = rng.uniform(0, 1.5 * np.pi, 100) - 0.5
    x = np.stack(
        [
            np.cos(angles) + np.sin(angles) / 2 + 0.1 * rng.normal(size=100) / 2,
            0.7 * np.sin(angles) + 0.1 * rng.normal(size=100) / 2,
            np.zeros(100),
        ],
        axis=1,
    )
    x[:, 2] = 0.1 * x[:, 0] + 0.3 * x[:, 1] + 0.1 * rng.normal(size=100)
    return (x - x.mean(0)) / x.std(0)


def lbfgs(model: LatentModel, x: Tensor) -> None:
    """To the minimum, on all points."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model.losses(x)["loss"]
        value.backward()
        return value

    optimizer.step(loss)


@pytest.mark.parametrize(("tied", "how"), [(False, "adam"), (False, "lbfgs"), (True, "lbfgs")])
def test_the_linear_autoencoder_is_pca(tied: bool, how: str) -> None:
    """The largest principal angle with the first two components is below 1°; 1000 epochs of batches of 32, or LBFGS."""
    x = plane()
    tensor = torch.tensor(x, dtype=torch.float32)
    torch.manual_seed(0)
    model = LinearAutoencoder(3, 2, tied=tied)
    if how == "adam":
        descend(model, tensor, 4 * 1000, 1e-3, batch=32)
    else:
        lbfgs(model, tensor)
    components = np.linalg.svd(x, full_matrices=False)[2][:2].T
    angles = np.degrees(linalg.subspace_angles(model.subspace().numpy(), components))
    assert angles.max() < 1.0
    torch.testing.assert_close(model.subspace().T @ model.subspace(), torch.eye(2))
    error = ((x - x @ components @ components.T) ** 2).mean()
    assert model.losses(tensor)["loss"].item() == pytest.approx(error, rel=0.01)


def test_denoising_beats_its_input(digits: Tensor) -> None:
    """On digits that it has not seen, the reconstruction of a noisy digit is nearer to the clean one than its input."""
    torch.manual_seed(0)
    model = Autoencoder((64, 64, 16), output="sigmoid", denoising=0.5)
    descend(model, digits[:1500], 600, 3e-3, batch=128)
    clean = digits[1500:]
    noisy = model.corrupt(clean, generator=torch.Generator().manual_seed(5))
    before, after = ((each - clean).square().mean().item() for each in (noisy, model.reconstruct(noisy)))
    assert before == pytest.approx(0.25, rel=0.05)
    assert after < 0.2 * before


def test_the_target_of_denoising_is_clean() -> None:
    """With the identity for a network the loss is the noise itself."""
    model = Autoencoder((50, 50), "identity", denoising=0.3)
    with torch.no_grad():
        for layer in (model.encoder[0], model.decoder[0]):
            layer.weight.copy_(torch.eye(50))
            layer.bias.zero_()
    x = torch.randn(400, 50)
    losses = [model.losses(x, generator=torch.Generator().manual_seed(seed))["loss"].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] == pytest.approx(0.09, rel=0.05)  # 20 000 squares: a standard error of 1 %
    model.denoising = 0.0
    assert model.losses(x)["loss"].item() < 1e-12


def test_log_likelihood_of_the_reconstruction() -> None:
    model, x = small_models()["dense"].double(), torch.rand(5, 12).double()
    mean = model.reconstruct(x).detach().numpy()
    expected = stats.norm.logpdf(x.numpy(), mean, math.sqrt(0.1)).sum(1)
    np.testing.assert_allclose(model.log_likelihood(x, variance=0.1).detach(), expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"variance is 0.0; expected a finite number > 0"):
        model.log_likelihood(x, variance=0.0)


def test_under_autocast_the_loss_is_float32() -> None:
    model, x = Autoencoder((12, 7, 3), output="sigmoid"), torch.rand(50, 12)
    expected = model.losses(x)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.losses(x)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.0)  # 8 bits of mantissa


# ---- bad input


def test_sizes_of_numpy() -> None:
    model = Autoencoder(np.array([12, 3]))  # type: ignore[arg-type]
    assert model.configuration() == Autoencoder((12, 3)).configuration()
    with pytest.raises(ValueError, match=r"widths\[0\] is \[12, 3\]; expected an integer >= 1"):
        Autoencoder(np.array([[12, 3], [3, 1]]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", small_models())
def test_no_prior(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"has no prior to draw latents from; .*LatentMixtureSampler\(\).fit"):
        small_models()[name].generate(3)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.zeros((2, 12)), TypeError, r"x is a ndarray; expected a torch tensor, e.g. torch.as_tensor\(x, dtype="),
        (torch.zeros(12), ValueError, r"x has shape \(12,\); expected \(N, 12\); for one datum: x\[None\]"),
        (torch.zeros(2, 3, 4), ValueError, r"x has shape \(2, 3, 4\); expected \(N, 12\); call x.reshape\(-1, 12\)"),
        (torch.zeros(2, 11), ValueError, r"x has shape \(2, 11\); expected \(N, 12\)$"),
        (torch.zeros(2, 12).double(), TypeError, r"dtype torch.float64, the model torch.float32; call x.to\(torch.f"),
        (torch.zeros(2, 12, dtype=torch.uint8), TypeError, r".float32\), scaled as the data are \(pixels: / 255\)"),
        (torch.zeros(2, 12, device="meta"), ValueError, r"x lies on meta, the model on cpu; call x.to\('cpu'\)"),
        (torch.full((2, 12), 1.5), ValueError, r"x is 1.5 at \[0, 0\]; Autoencoder expects values in \[0, 1\]"),
        (torch.full((2, 12), math.nan), ValueError, r"x contains nan at \[0, 0\]; expected finite numbers"),
    ],
)
def test_bad_data(x: Any, error: type[Exception], words: str) -> None:
    model = small_models()["dense"]
    with pytest.raises(error, match=words):
        model.losses(x)
    with pytest.raises(error, match=words):
        model.check(x)


def test_values_matter_only_where_they_are_learnt() -> None:
    """A noisy image may be encoded, though its values leave [0, 1]; a latent of a wrong shape may not be decoded."""
    model = small_models()["dense"]
    assert torch.isfinite(model.encode(torch.full((2, 12), 1.5))).all()
    assert torch.equal(small_models()["linear"].check(x := torch.full((2, 6), -7.0)), x)
    with pytest.raises(ValueError, match=r"z has shape \(2, 4\); expected \(N, 3\)"):
        model.decode(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Autoencoder((12,)), r"widths is \(12,\); expected at least 2 positive integers, e.g. widths=\(64, 16"),
        (lambda: Autoencoder(12), r"widths is 12; expected at least 2 positive integers"),
        (lambda: Autoencoder((12, 0)), r"widths\[1\] is 0; expected an integer >= 1"),
        (lambda: Autoencoder((12, 3), "swish"), r"activation is 'swish'; expected one of relu, elu, "),
        (lambda: Autoencoder((12, 3), output="tanh"), r"output is 'tanh'; expected one of identity, sigmoid"),
        (lambda: Autoencoder((12, 3), latent_activation="x"), r"activation is 'x'; expected one of relu, elu, "),
        (lambda: Autoencoder((12, 3), tied="no"), r"tied is 'no'; expected True or False"),
        (lambda: ConvAutoencoder(tied=1), r"tied is 1; expected True or False"),
        (lambda: Autoencoder((12, 3), denoising=-1.0), r"denoising is -1.0; expected a finite number >= 0"),
        (lambda: LinearAutoencoder(3, 0), r"n_latent is 0; expected an integer >= 1"),
        (
            LinearAutoencoder.shallow,
            r"LinearAutoencoder takes no widths, which are \(784, 100\) here; expected Autoencoder, or "
            r"LinearAutoencoder\(n_features, n_latent, tied\)",
        ),
        (lambda: LinearAutoencoder.deep(tied=True), r"LinearAutoencoder takes no widths, which are \(784, 256, 64"),
        (
            lambda: Autoencoder.shallow(widths=(3, 2)),
            r"widths is \(3, 2\) where they are \(784, 100\); expected none: Autoencoder\(widths, \.\.\.\) takes ",
        ),
        (lambda: ConvAutoencoder((28, 28)), r"data_shape is \(28, 28\); expected at least 3 positive integers"),
        (lambda: ConvAutoencoder((1, 3, 28)), r"of at least 4 x 4 pixels: each of 2 poolings halves them"),
        (lambda: ConvAutoencoder(upsample="cubic"), r"upsample is 'cubic'; expected one of transposed, nearest"),
        (lambda: ConvAutoencoder(channels=()), r"channels is \(\); expected at least 1 positive integers"),
    ],
)
def test_bad_arguments(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
