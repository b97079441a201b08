"""The failure policy, row by row: every kind of bad or awkward input, on every CPU backend, in both precisions."""

from __future__ import annotations

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import emalgam
from emalgam.guard import TOLERANCE
from tests import oracles
from tests.conftest import Variant
from tests.tolerances import tolerance


def clusters(dtype: str = "float64", N: int = 600) -> np.ndarray:
    """Three well separated clusters in three features."""
    rng = np.random.default_rng(0)
    return (np.repeat([[0.0, 0, 0], [8, 8, 0], [0, 8, -8]], N // 3, axis=0) + rng.normal(size=(N, 3))).astype(dtype)


def fit(x: object, variant: Variant, **arguments: object) -> emalgam.Fit:
    return emalgam.fit(
        x, 3, covariance_type=variant.covariance_type, random_state=0, backend=variant.backend, **arguments
    )


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two labellings cut the rows into the same groups."""
    return (
        len(set(zip(first.tolist(), second.tolist(), strict=True)))
        == len(set(first.tolist()))
        == len(set(second.tolist()))
    )


# ---- NaN, inf


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "inf")])
def test_not_finite_names_row_and_column(variant: Variant, value: float, name: str) -> None:
    x = clusters(variant.dtype)
    x[500, 0] = value
    x[417, 2] = value
    message = f"x contains {name} at row 417, column 2; remove or impute"
    with pytest.raises(ValueError, match=message):
        fit(x, variant)
    mixture = fit(clusters(variant.dtype), variant).mixture
    for method in (mixture.log_prob, mixture.responsibilities, mixture.predict):
        with pytest.raises(ValueError, match=message):
            method(x, backend=variant.backend)


def test_masked_values_are_not_read(variant: Variant) -> None:
    """What lies under a mask is no data; an array that could have a mask, and has none, is."""
    x, hidden = clusters(variant.dtype), np.arange(600) == 7
    masked = np.ma.array(x, mask=np.repeat(hidden[:, None], 3, axis=1))
    message = r"x is a masked array with 3 values masked .*give x\.data"
    with pytest.raises(ValueError, match=message):
        fit(masked, variant)
    model = fit(np.ma.array(x), variant).mixture
    np.testing.assert_array_equal(model.means, fit(x, variant).mixture.means)
    with pytest.raises(ValueError, match=message):
        model.log_prob(masked)
    with pytest.raises(ValueError, match="X is a masked array with 3 values masked"):
        emalgam.GaussianMixture(3).fit(masked)
    with pytest.raises(ValueError, match="sample_weight is a masked array with 1 values masked"):
        fit(x, variant, sample_weight=np.ma.array(np.ones(600), mask=hidden))
    with pytest.raises(ValueError, match="groups is a masked array with 1 values masked"):
        emalgam.fit_many(x, 1, groups=np.ma.array(np.zeros(600), mask=hidden))
    with pytest.raises(ValueError, match="chunk 0 is a masked array with 3 values masked"):
        emalgam.open_stream([masked])


def test_nullable_columns_and_matrices_are_arrays() -> None:
    x = clusters()
    expected = emalgam.fit(x, 3, random_state=0).mixture
    frame = pd.DataFrame(x, columns=["a", "b", "c"]).astype({"a": "Float64", "b": "Float64", "c": object})
    for given in (frame, x.view(np.matrix), emalgam.open_stream([frame]), emalgam.open_stream(frame)):
        found = emalgam.fit(given, 3, random_state=0).mixture
        np.testing.assert_allclose(np.sort(found.means, axis=0), np.sort(expected.means, axis=0), rtol=1e-12)
    weights = pd.Series(np.arange(600) % 3, dtype="Int64")
    found = emalgam.fit(frame, 3, sample_weight=weights, random_state=0).mixture
    expected = emalgam.fit(x, 3, sample_weight=weights.to_numpy(float), random_state=0).mixture
    np.testing.assert_array_equal(found.means, expected.means)
    frame.loc[7, "b"] = pd.NA
    with pytest.raises(ValueError, match="x contains NaN at row 7, column 1"):
        emalgam.fit(frame, 3)
    weights[5] = pd.NA
    with pytest.raises(ValueError, match="sample_weight contains nan at row 5"):
        emalgam.fit(x, 3, sample_weight=weights)


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(["text"] * 600),
        pd.Series(["1", "2"] * 300, dtype=object),
        pd.Series(["1", "2"] * 300, dtype="string"),
        pd.date_range("2026", periods=600),
        pd.timedelta_range("1s", periods=600),
    ],
    ids=["text", "digits", "string", "dates", "times"],
)
def test_columns_of_text_and_dates_are_no_numbers(column: Any) -> None:
    frame = pd.DataFrame(clusters(), columns=["a", "b", "c"]).assign(c=column)
    with pytest.raises(ValueError, match="x has dtype object; expected real numbers"):
        emalgam.fit(frame, 3)
    with pytest.raises(ValueError, match=r"X has shape .* and dtype object"):
        emalgam.fit_many(frame, 2, groups=np.arange(600) % 3)


def test_large_finite_numbers_are_not_mistaken_for_inf(variant: Variant) -> None:
    """Their sum overflows; they are still finite."""
    x = clusters(variant.dtype) * np.asarray(np.finfo(variant.dtype).max / 32, variant.dtype)
    labels = fit(x, variant).mixture.predict(x, backend=variant.backend)
    assert same_partition(labels, np.repeat(range(3), 200))


# ---- shapes and types


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(5), r"x has shape \(5,\); expected two dimensions.*reshape\(-1, 1\)"),
        (np.zeros((5, 3, 2)), r"x has shape \(5, 3, 2\); expected two dimensions"),
        (np.zeros((0, 3)), r"x has shape \(0, 3\); expected at least one sample"),
        (np.zeros((3, 0)), r"x has shape \(3, 0\); expected at least one sample and one feature"),
        ([[1.0, 2.0], [3.0]], "x is a list that cannot be read as an array .*rectangular"),
        (np.array([[1, "a"]], object), "x has dtype object; expected real numbers"),
        (np.zeros((5, 3), complex), "x has dtype complex128; expected real numbers"),
        (np.array([["1", "2"]]), "x has dtype <U1; expected real numbers"),
        (
            np.eye(2, 3) + np.eye(2, 3)[::-1] * 2 + [[0, 0, 1], [0, 0, 2]],
            "there are 2 samples .* for n_components=3; expected at least as many",
        ),
    ],
)
def test_shapes_and_types_are_stated(variant: Variant, bad: object, message: str) -> None:
    if isinstance(bad, np.ndarray) and bad.dtype == np.float64:
        bad = bad.astype(variant.dtype)
    with pytest.raises(ValueError, match=message):
        fit(bad, variant)


def test_other_number_of_features(variant: Variant) -> None:
    mixture = fit(clusters(variant.dtype), variant).mixture
    with pytest.raises(ValueError, match="x has 2 features; the mixture has 3"):
        mixture.log_prob(np.zeros((4, 2), variant.dtype), backend=variant.backend)


# ---- layouts and dtypes that work


def awkward(x: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    """The same numbers in other places of memory."""
    read_only = x.copy()
    read_only.setflags(write=False)
    wide = np.zeros((2 * len(x), 2 * x.shape[1]), x.dtype)
    wide[::2, ::2] = x
    np.save(path / "x.npy", x)
    return {
        "Fortran order": np.asfortranarray(x),
        "strided": wide[::2, ::2],
        "reversed": x[::-1][::-1, ::-1][:, ::-1],
        "read-only": read_only,
        "memory-mapped": np.load(path / "x.npy", mmap_mode="r"),
        "other byte order": x.astype(x.dtype.newbyteorder()),
        "unaligned": np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
        "list": x.tolist(),
    }


def test_every_layout_gives_the_same_fit(variant: Variant, tmp_path: Path) -> None:
    x = clusters(variant.dtype)
    expected = fit(x, variant)
    for name, other in awkward(x, tmp_path).items():
        result = fit(other, variant)
        # A list becomes float64 whatever it was; everything else is the same arithmetic and so the same bits.
        bound = 0 if name != "list" else tolerance("fit", variant.dtype)
        np.testing.assert_allclose(result.lower_bounds, expected.lower_bounds, rtol=bound, atol=bound, err_msg=name)
        np.testing.assert_allclose(
            expected.mixture.log_prob(other, backend=variant.backend),
            expected.mixture.log_prob(x, backend=variant.backend),
            rtol=0,
            atol=0 if name != "list" else tolerance("monotone", variant.dtype),
            err_msg=name,
        )


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "uint64", "int64", "float16", "longdouble", "bool"]
)
def test_every_real_dtype(backend: str, dtype: str) -> None:
    x = (clusters() * 4).round() if dtype != "bool" else clusters() > 4
    x = (x - x.min()).astype(dtype) if dtype.startswith("u") else x.astype(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "constant feature")  # bool: the last column is all False
        result = emalgam.fit(x, 3, random_state=0, backend=backend)
        expected = emalgam.fit(x.astype(np.float64), 3, random_state=0, backend=backend)
    assert result.lower_bounds == expected.lower_bounds
    np.testing.assert_array_equal(result.mixture.predict(x), expected.mixture.predict(x.astype(np.float64)))


@pytest.mark.parametrize("layout", ["int8", "float16", "Fortran", "strided", "memory-mapped", "weighted"])
def test_no_copy_grows_with_the_data(backend: str, layout: str, tmp_path: Path) -> None:
    """Beyond the data a fit keeps at most two numbers per row (k-means++'s distances), whatever the layout.

    Of a memory map it keeps none, but a sample of up to 2²¹ numbers, and another one while they are chosen.
    """
    N, D = 400_000 if layout == "memory-mapped" else 200_000, 12
    x = np.random.default_rng(0).integers(-100, 100, (N, D)).astype("float16" if layout == "float16" else "int8")
    if layout in ("Fortran", "strided", "memory-mapped", "weighted"):
        x = x.astype(np.float64)
    if layout == "Fortran":
        x = np.asfortranarray(x)
    if layout == "strided":
        x = np.repeat(x, 2, axis=1)[:, ::2]
    if layout == "memory-mapped":
        np.save(tmp_path / "x.npy", x)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
    weight = np.ones(N) if layout == "weighted" else None
    arguments = {"max_iter": 2, "tol": 1e300, "random_state": 0, "backend": backend, "sample_weight": weight}
    emalgam.fit(x[:3000], 4, **{**arguments, "sample_weight": None})  # whatever is allocated once
    tracemalloc.start()
    emalgam.fit(x, 4, **arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    constant = 24e6 if backend != "reference" else 40e6  # samples, tiles and partial sums; the data are 2.4 to 38 MB
    if layout == "memory-mapped":
        N, constant = 0, constant + 2 * 8 * 2**21
    assert peak <= 2 * 8 * N + constant, f"{peak / 1e6:.1f} MB"


# ---- degenerate data


def test_constant_feature_fits_and_is_named(variant: Variant) -> None:
    x = np.insert(clusters(variant.dtype), 1, np.asarray(0.1, variant.dtype), axis=1)
    with pytest.warns(UserWarning, match="constant feature: column 1 has one value in all rows"):
        result = fit(x, variant)
    assert np.isfinite(result.lower_bound)
    assert same_partition(result.mixture.predict(x, backend=variant.backend), np.repeat(range(3), 200))


def test_all_features_constant(variant: Variant) -> None:
    with pytest.warns(UserWarning, match="constant features: column 0, 1, 2 "):
        result = fit(np.full((20, 3), 7.5, variant.dtype), variant)
    assert result.effective_components == 1
    np.testing.assert_allclose(result.mixture.means[0], 7.5)


# ---- scales and places


@pytest.mark.parametrize("scale", [1e-5, 1e-30, 1e-200, 1e200, 1e30])
def test_scale_does_not_matter(variant: Variant, scale: float) -> None:
    """1e-5 and 1e200 cluster as the unscaled data do; covariances that overflow do not hurt."""
    if not float(np.finfo(variant.dtype).tiny) < scale < float(np.finfo(variant.dtype).max) / 64:
        scale = 1e-30 if scale < 1 else 1e30  # about as far as float32 data can go
    x = clusters(variant.dtype)
    scaled = x * np.asarray(scale, variant.dtype)
    result = fit(scaled, variant)
    assert same_partition(result.mixture.predict(scaled, backend=variant.backend), np.repeat(range(3), 200))
    reference = fit(x, variant)
    np.testing.assert_allclose(
        result.lower_bound + 3 * np.log(scale), reference.lower_bound, atol=10 * tolerance("monotone", variant.dtype)
    )
    np.testing.assert_allclose(
        result.mixture.responsibilities(scaled, backend=variant.backend),
        reference.mixture.responsibilities(x, backend=variant.backend),
        atol=tolerance("affine", variant.dtype),
    )


def test_offset_does_not_matter(variant: Variant) -> None:
    """1e8 in float64 and 1e4 in float32: where peers return negative variances."""
    offset = {"float64": 1e8, "float32": 1e4}[variant.dtype]
    x = clusters(variant.dtype) + np.asarray(offset, variant.dtype)
    result = fit(x, variant)
    covariances = result.mixture.covariance.matrices(result.mixture.covariances, 3, 3)
    assert np.linalg.eigvalsh(covariances).min() > 0.5
    assert same_partition(result.mixture.predict(x, backend=variant.backend), np.repeat(range(3), 200))
    centred = fit((x.astype(np.float64) - offset).astype(variant.dtype), variant)
    assert result.lower_bound == pytest.approx(centred.lower_bound, abs=tolerance("monotone", variant.dtype) * 10)


@pytest.mark.parametrize("exponent", [5, 15, 30, 100, 155, 250, 307])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_far_queries_are_finite(variant: Variant, exponent: int, sign: float) -> None:
    if exponent > 37 and variant.dtype == "float32":
        exponent = 38
    mixture = fit(clusters(variant.dtype), variant).mixture
    query = np.array([[sign * 10.0**exponent] * 3, [0.0, 0.0, 0.0]], variant.dtype)
    log_prob = mixture.log_prob(query, backend=variant.backend)
    r = mixture.responsibilities(query, backend=variant.backend)
    assert np.isfinite(log_prob).all()
    assert log_prob[0] < -1e8
    assert np.isfinite(r).all()
    np.testing.assert_allclose(r.sum(axis=1), 1, atol=1e-6)
    alone = mixture.log_prob(query[1:], backend=variant.backend)[0]
    assert log_prob[1] == pytest.approx(alone, abs=tolerance("monotone", variant.dtype))
    assert mixture.predict(query, backend=variant.backend)[0] == r[0].argmax()


def test_far_queries_keep_their_digits(variant: Variant) -> None:
    """Rows far from all components, where squares are large but do not overflow: right labels, right densities."""
    mixture = fit(clusters(variant.dtype), variant).mixture
    gaussians = oracles.Gaussians(mixture.weights, mixture.means, mixture.covariances, mixture.covariance_type)
    directions = np.random.default_rng(0).normal(size=(50, 3))
    for distance in (30.0, 100.0, 1e3, 1e5):
        x = (directions * distance).astype(variant.dtype)
        exact = oracles.log_prob(x, gaussians)
        error = np.abs(mixture.log_prob(x, backend=variant.backend) - exact)
        assert (error <= TOLERANCE[variant.dtype] + 1e-13 * np.abs(exact)).all(), f"distance {distance:g}"
        truth = oracles.responsibilities(x, gaussians)
        r = mixture.responsibilities(x, backend=variant.backend)
        assert np.abs(r - truth).max() <= TOLERANCE[variant.dtype] + 1e-13 * np.abs(exact).max()
        assert (mixture.predict(x, backend=variant.backend) == r.argmax(axis=1)).all()


# ---- weights


def test_one_weightless_row_far_away_does_not_spoil_the_frame(backend: str) -> None:
    """A row at 1e10 that weighs 1e-30 is as good as absent."""
    x = np.vstack([np.random.default_rng(0).normal(size=(100, 2)), [[1e10, 1e10]]])
    weight = np.r_[np.ones(100), 1e-30]
    given = {"means_init": [[0.0, 0.0]], "weights_init": [1.0], "precisions_init": [np.eye(2)], "reg_covar": 0.0}
    expected = emalgam.fit(x[:100], 1, backend=backend, **given)
    result = emalgam.fit(x, 1, sample_weight=weight, backend=backend, **given)
    assert result.lower_bound == pytest.approx(expected.lower_bound, abs=1e-9)
    np.testing.assert_allclose(result.mixture.covariances, expected.mixture.covariances, rtol=1e-6)


def test_zero_weights_leave_rows_out_and_two_counts_twice(variant: Variant) -> None:
    x = clusters(variant.dtype)
    weight = np.random.default_rng(0).integers(0, 3, len(x))
    x[weight == 0] = np.finfo(variant.dtype).max / 4
    expected = fit(np.repeat(x, weight, axis=0), variant)
    for kind in (np.float64, np.float32, np.int64, np.uint8):
        result = fit(x, variant, sample_weight=weight.astype(kind))
        bound = tolerance("fit", variant.dtype)
        np.testing.assert_allclose(result.lower_bounds, expected.lower_bounds, rtol=bound, atol=bound)
    strided = np.zeros(2 * len(weight))
    strided[::2] = weight
    assert fit(x, variant, sample_weight=strided[::2]).lower_bounds == result.lower_bounds


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.zeros(600), "sample_weight is zero for every sample"),
        (np.full(600, -1.0), "sample_weight is -1.0 at row 0; expected weights >= 0"),
        (np.full(600, np.nan), "sample_weight contains nan at row 0; expected finite"),
        (np.full(600, np.inf), "sample_weight contains inf at row 0"),
        (np.ones(599), r"sample_weight has shape \(599,\) .* expected one number per sample: \(600,\)"),
        (np.ones((600, 1)), r"sample_weight has shape \(600, 1\)"),
        (np.full(600, "1"), "sample_weight has .* dtype <U1"),
        (np.r_[1.0, 1.0, np.zeros(598)], r"there are 2 samples \(with positive weight\) for n_components=3"),
    ],
)
def test_bad_weights(variant: Variant, weight: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(clusters(variant.dtype), variant, sample_weight=weight)


def test_scale_of_the_weights_does_not_matter(variant: Variant) -> None:
    """Also weights that float32 tiles could not hold."""
    x = clusters(variant.dtype)
    weight = np.random.default_rng(0).uniform(0.5, 2, len(x))
    expected = fit(x, variant, sample_weight=weight)
    for scale in (1e-300, 1e-50, 1e-42, 1e-30, 1e30, 1e39, 1e300):
        result = fit(x, variant, sample_weight=weight * scale)
        bound = tolerance("fit", variant.dtype)
        np.testing.assert_allclose(result.lower_bounds, expected.lower_bounds, rtol=bound, atol=bound)
