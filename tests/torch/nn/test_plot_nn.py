"""Pictures of images, latents and losses: what is drawn, at which place, in which values."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from emalgam import plot
from emalgam.nn import Autoencoder, LatentModel, LinearAutoencoder

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures() -> Iterator[None]:
    yield
    pyplot.close("all")


class Decoding(LatentModel):
    """Three latents; each value of a 2 × 2 image is z_0 + 10 z_1 + 100 z_2 + its number / 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.data_shape, self.latent_shape = (1, 2, 2), (3,)
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        value = z @ torch.tensor([1.0, 10.0, 100.0], dtype=z.dtype)
        return value.reshape(-1, 1, 1, 1) + torch.arange(4, dtype=z.dtype).reshape(1, 1, 2, 2) / 1000

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.check_input(x).flatten(1)[:, :3]


def sheet_of(ax: Axes) -> np.ndarray:
    """What the only image of the axes holds; NaN where nothing is drawn."""
    (image,) = ax.images
    return np.ma.filled(np.ma.masked_invalid(image.get_array()).astype(float), np.nan)


def cell(sheet: np.ndarray, row: int, column: int, size: int, gap: int) -> np.ndarray:
    top, left = row * (size + gap), column * (size + gap)
    return sheet[top : top + size, left : left + size]


# ---- sheets of images


@pytest.mark.parametrize("form", ["flat", "images", "one channel", "tensor with a gradient", "bfloat16", "shape"])
def test_reconstructions_are_two_rows_of_ten(form: str) -> None:
    x = np.random.default_rng(0).integers(0, 129, (12, 64)) / 128  # bfloat16 has eight bits
    y = x[::-1].copy()
    shape = (8, 8) if form == "shape" else None
    given = {
        "flat": (x, y),
        "images": (x.reshape(-1, 8, 8), y.reshape(-1, 8, 8)),
        "one channel": (x.reshape(-1, 1, 8, 8), y.reshape(-1, 1, 8, 8)),
        "bfloat16": (torch.tensor(x).bfloat16(), torch.tensor(y).bfloat16()),
        "tensor with a gradient": (torch.tensor(x, requires_grad=True), torch.tensor(y)),
        "shape": (x.reshape(-1, 4, 16), y.reshape(-1, 4, 16)),
    }[form]
    ax = plot.reconstructions(*given, shape=shape)
    sheet = sheet_of(ax)
    assert sheet.shape == (2 * 8 + 1, 10 * 8 + 9)
    for column in range(10):
        np.testing.assert_array_equal(cell(sheet, 0, column, 8, 1), x[column].reshape(8, 8))
        np.testing.assert_array_equal(cell(sheet, 1, column, 8, 1), y[column].reshape(8, 8))
    assert np.isnan(sheet[8]).all()
    assert np.isnan(sheet[:, 8::9]).all()
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["input", "output"]
    assert ax.images[0].get_clim() == (0.0, 1.0)


def test_rows_are_labelled_where_they_are() -> None:
    ax = plot.reconstructions(np.zeros((4, 9)), np.ones((4, 9)), names=("noisy", "denoised"))
    ax.figure.canvas.draw()
    top, bottom = ax.get_yticks()
    image = ax.images[0]
    left, right, low, high = image.get_extent()
    height, width = image.get_array().shape
    for place, value in ((top, 0.0), (bottom, 1.0)):
        row = int((place - high) / (low - high) * height)
        assert image.get_array()[row, int((0 - left) / (right - left) * width)] == value
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["noisy", "denoised"]


def test_colours_are_those_of_the_inputs() -> None:
    x, y = np.full((3, 4), 7.0), np.full((3, 4), 40.0)
    x[0, 0] = -2.0
    assert plot.reconstructions(x, y).images[0].get_clim() == (-2.0, 7.0)
    assert plot.reconstructions(x, y, limits=(0, 50)).images[0].get_clim() == (0, 50)
    assert plot.samples(np.full((2, 4), 3.0)).images[0].get_clim() == (3.0, 4.0)  # constant
    assert plot.samples(np.full((2, 4), 3, np.uint8), cmap="magma").images[0].get_cmap().name == "magma"


def test_images_in_colour() -> None:
    x = np.zeros((3, 3, 2, 2))
    x[0, 0], x[1, 1], x[2, 2] = 1.0, 1.0, 1.0
    (image,) = plot.samples(x, n_columns=3).images
    sheet = image.get_array()
    assert sheet.shape == (2, 8, 4)
    assert sheet[0, [0, 3, 6]].tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]
    assert (sheet[:, [2, 5], 3] == 0).all()  # gaps are transparent
    bright = plot.samples(np.full((1, 3, 2, 2), 30.0), limits=(0, 10)).images[0].get_array()
    assert bright.max() == 1.0


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (4, 2, 2), (5, 2, 3), (64, 8, 8)])
def test_samples_make_a_square(n: int, rows: int, columns: int) -> None:
    sheet = sheet_of(plot.samples(np.arange(n * 4.0).reshape(n, 2, 2)))
    assert sheet.shape == (3 * rows - 1, 3 * columns - 1)
    for number in range(rows * columns):
        drawn = cell(sheet, *divmod(number, columns), 2, 1)
        if number < n:
            np.testing.assert_array_equal(drawn, np.arange(4.0).reshape(2, 2) + 4 * number)
        else:
            assert np.isnan(drawn).all()


def test_images_that_are_not_square_are_not_distorted() -> None:
    ax = plot.samples(np.zeros((6, 4, 12)), n_columns=3)
    left, right, low, high = ax.images[0].get_extent()
    height, width = ax.images[0].get_array().shape
    assert ax.get_aspect() * (low - high) / (right - left) == pytest.approx(height / width)


def test_an_axes_is_kept() -> None:
    _, axes = pyplot.subplots(1, 2)
    assert plot.samples(np.zeros((2, 4)), axes[0]) is axes[0]
    assert plot.latent_scatter(np.zeros((2, 2)), ax=axes[1]) is axes[1]
    assert pyplot.get_fignums() == [1]


# ---- latents


def test_latents_are_points_in_the_colour_of_their_class() -> None:
    z = np.random.default_rng(0).normal(size=(60, 3))
    labels = np.arange(60) % 3
    ax = plot.latent_scatter(torch.tensor(z), labels, axes=(2, 0))
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_offsets(), z[:, [2, 0]])
    colors = [to_hex(color) for color in points.get_facecolors()]
    assert colors == [plot.OKABE_ITO[label].lower() for label in labels]
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2"]
    for label, text in enumerate(ax.texts):
        np.testing.assert_allclose(text.get_position(), np.median(z[labels == label][:, [2, 0]], axis=0))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 2", "latent 0")


def test_latents_of_any_shape_and_without_classes() -> None:
    z = np.random.default_rng(0).normal(size=(50, 2, 2, 2))
    ax = plot.latent_scatter(z, axes=(1, 7))
    np.testing.assert_allclose(ax.collections[0].get_offsets(), z.reshape(50, 8)[:, [1, 7]])
    assert list(ax.texts) == []
    few = plot.latent_scatter(z, max_points=20)
    offsets = few.collections[0].get_offsets()
    assert len(offsets) == 20
    assert {tuple(row) for row in offsets.tolist()} <= {tuple(row) for row in z.reshape(50, 8)[:, :2].tolist()}
    assert few.get_title() == "20 of 50 latents"


def test_the_manifold_is_decoded_over_quantiles() -> None:
    center, scale = np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.0, 1.0])
    ax = plot.manifold_grid(Decoding(), n=5, limits=(0.1, 0.9), axes=(2, 0), center=center, scale=scale)
    sheet = sheet_of(ax)
    assert sheet.shape == (14, 14)
    quantiles = [NormalDist().inv_cdf(u) for u in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for row in range(5):
        for column in range(5):
            across, up = 3.0 + quantiles[column], 1.0 + 0.5 * quantiles[4 - row]
            expected = up + 10 * 2.0 + 100 * across + np.arange(4).reshape(2, 2) / 1000
            np.testing.assert_allclose(cell(sheet, row, column, 2, 1), expected, rtol=1e-12)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 2", "latent 0")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1.7", "2.5", "3", "3.5", "4.3"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["1.6", "1.3", "1", "0.74", "0.36"]


def test_an_interpolation_is_a_straight_line_between_latents() -> None:
    a, b = np.zeros((2, 1, 2, 2)), np.ones((2, 1, 2, 2))
    b[1] = 3.0
    ax = plot.interpolation(Decoding(), a, b, n=4)
    sheet = sheet_of(ax)
    for row, end in enumerate((1.0, 3.0)):
        for column in range(4):
            expected = 111.0 * end * column / 3 + np.arange(4).reshape(2, 2) / 1000
            np.testing.assert_allclose(cell(sheet, row, column, 2, 1), expected, rtol=1e-12)
    one = sheet_of(plot.interpolation(Decoding(), a[0], torch.tensor(b[0]), n=4))
    np.testing.assert_array_equal(one, sheet[:2])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["t = 0", "t = 1"]


def test_pictures_leave_the_model_in_its_mode() -> None:
    model = Autoencoder((16, 2))
    model.train()
    plot.manifold_grid(model, n=2)
    plot.interpolation(model, np.zeros(16), np.ones(16))
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- losses


def legend_of(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_losses_over_epochs() -> None:
    history = {"loss": [3.0, 2.0, 1.0, 0.5], "validation_loss": [3.5, np.nan, 2.0, 2.5], "kl": [0.0, 1.0, 2.0, 3.0]}
    ax = plot.losses(history)
    trained, validated, mark = ax.lines
    assert trained.get_xdata().tolist() == [1, 2, 3, 4]
    assert trained.get_ydata().tolist() == history["loss"]
    assert validated.get_xdata().tolist() == [1, 3, 4]
    assert validated.get_ydata().tolist() == [3.5, 2.0, 2.5]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (3, 2.0)
    assert legend_of(ax) == ["loss", "validation loss", "lowest 2, epoch 3"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")
    ax = plot.losses(history, names=("loss", "kl"))
    assert legend_of(ax) == ["loss", "validation loss", "kl"]
    assert legend_of(plot.losses(history, names="kl")) == ["kl"]
    assert to_hex(ax.lines[0].get_color()) == to_hex(ax.lines[1].get_color()) != to_hex(ax.lines[2].get_color())


def test_losses_of_one_epoch_are_points() -> None:
    ax = plot.losses({"loss": [1.0], "validation_loss": [1.1]})
    assert [line.get_marker() for line in ax.lines] == ["o", "o", "o"]
    ax.figure.canvas.draw()
    assert [tick for tick in ax.get_xticks() if 0.9 < tick < 1.1] == [1.0]


def test_names_of_classes_hide_no_more_than_they_have_to() -> None:
    ax = plot.latent_scatter(np.zeros((2, 2)), ["a name of some length"] * 2)
    ax.figure.canvas.draw()
    text = ax.texts[0]
    box, letters = text.get_bbox_patch().get_window_extent(), text.get_window_extent()
    assert letters.width <= box.width < letters.width + letters.height
    assert letters.height <= box.height < 2 * letters.height


# ---- bad arguments


def test_bad_arguments_say_what_is_expected() -> None:
    x, model = np.zeros((3, 4)), Decoding()
    with pytest.raises(
        ValueError, match=r"x has shape \(3, 5\), and 5 values are no square; give the shape of an image"
    ):
        plot.samples(np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\); images of shape \(3, 3\) have 9 values"):
        plot.samples(x, shape=(3, 3))
    with pytest.raises(ValueError, match=r"x has shape \(3, 2, 2, 2\); expected images: \(N, H, W\)"):
        plot.samples(np.zeros((3, 2, 2, 2)))
    with pytest.raises(ValueError, match=r"x has shape \(4,\); expected images"):
        plot.samples(x[0])
    with pytest.raises(ValueError, match=r"x contains NaN at \[0, 0\]"):
        plot.samples(np.full((2, 4), np.nan))
    with pytest.raises(ValueError, match=r"limits is \(1, 0\); expected a smaller and a larger number"):
        plot.samples(x, limits=(1, 0))
    with pytest.raises(
        ValueError, match=r"x holds images \(3, 2, 2\) and reconstructed \(2, 2, 2\); expected the same"
    ):
        plot.reconstructions(x, x[:2])
    with pytest.raises(ValueError, match="n is 0; expected an integer >= 1"):
        plot.reconstructions(x, x, n=0)
    with pytest.raises(ValueError, match=r"z has shape \(3, 1\); expected \(N, D\) latents of at least two dimensions"):
        plot.latent_scatter(x[:, :1])
    with pytest.raises(ValueError, match=r"axes is \(0, 4\); expected two different integers from 0 to 3"):
        plot.latent_scatter(x, axes=(0, 4))
    with pytest.raises(ValueError, match=r"axes is \(0,\); expected two of the 4 latent dimensions"):
        plot.latent_scatter(x, axes=(0,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels has shape \(2,\); expected one for each of the 3 latents"):
        plot.latent_scatter(x, [0, 1])
    with pytest.raises(ValueError, match="labels has 31 different values; expected at most 30 classes"):
        plot.latent_scatter(np.zeros((31, 2)), np.arange(31))
    with pytest.raises(ValueError, match=r"have shape \(1,\); a plane needs two dimensions"):
        plot.manifold_grid(LinearAutoencoder(4, 1))
    with pytest.raises(ValueError, match=r"limits is \(0, 1\); expected two probabilities"):
        plot.manifold_grid(model, limits=(0, 1))
    with pytest.raises(ValueError, match="scale is 0; expected positive standard deviations"):
        plot.manifold_grid(model, scale=0)
    with pytest.raises(ValueError, match=r"center has shape \(2,\); expected one number, or one for each of 3 latents"):
        plot.manifold_grid(model, center=[0, 1])
    with pytest.raises(ValueError, match="n is 1; expected an integer >= 2"):
        plot.manifold_grid(model, n=1)
    with pytest.raises(ValueError, match="there are 1 data in a and 2 in b; expected as many"):
        plot.interpolation(model, np.zeros((1, 2, 2)), np.zeros((2, 1, 2, 2)))
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\); expected \(N, 1, 2, 2\)"):
        plot.interpolation(model, x, x)
    with pytest.raises(ValueError, match="the history has no 'kl'; there are 'loss'"):
        plot.losses({"loss": [1.0]}, names=("kl",))
    with pytest.raises(ValueError, match="names is empty; the history has 'loss'"):
        plot.losses({"loss": [1.0]}, names=())
    with pytest.raises(ValueError, match=r"'loss' of the history has shape \(0,\)"):
        plot.losses({"loss": []})
    assert pyplot.get_fignums() == []  # nothing was begun
