"""What comes in from users is checked here, once; everything below may trust it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from emalgam import arrays
from emalgam.namespace import is_tensor, namespace, to_host
from emalgam_kernels.blocks import default_threads
from emalgam_kernels.kl_blocks import ASYMMETRY

ROWS_AT_ONCE = 16384
ROWS_ON_A_GPU = 2**22


def check_data(x: Any, *, n_features: int | None = None, name: str = "x") -> Any:
    """`x` as a two-dimensional real array with at least one row and column, wherever it lies in memory.

    A tensor if it lies on a GPU, else a NumPy array.

    Raises
    ------
    ValueError
        Stating the shape or type received and what is wanted.
    """
    array = arrays.read(x, name)
    if arrays.kind(array) not in "fiub":
        raise ValueError(
            f"{name} has dtype {array.dtype}; expected real numbers (float, int or bool), e.g. x.astype(float)"
        )
    if array.ndim != 2:
        hint = " (for one feature: x.reshape(-1, 1))" if array.ndim == 1 else ""
        raise ValueError(f"{name} has shape {tuple(array.shape)}; expected two dimensions: (samples, features){hint}")
    if 0 in array.shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}; expected at least one sample and one feature")
    if n_features is not None and array.shape[1] != n_features:
        raise ValueError(f"{name} has {array.shape[1]} features; the mixture has {n_features}")
    return array


def check_finite(x: Any, name: str = "x", first: int = 0) -> None:
    """ValueError naming the first row and column that hold NaN or infinity; `first` is the number of row 0."""
    if arrays.kind(x) != "f":
        return
    step = ROWS_ON_A_GPU if is_tensor(x) else ROWS_AT_ONCE
    for start in range(0, len(x), step):
        rows = x[start : start + step]
        if _all_finite(rows):
            continue
        rows = rows.cpu().double().numpy() if is_tensor(rows) else rows
        row, column = np.argwhere(~np.isfinite(rows.astype(np.float64, copy=False)))[0]
        value = "NaN" if np.isnan(rows[row, column]) else "inf"
        raise ValueError(
            f"{name} contains {value} at row {first + start + row}, column {column}; "
            "remove or impute such rows first (missing values are not supported)"
        )


def check_not_rounded(name: str, found: Any, dtype: np.dtype, remedy: str) -> None:
    """ValueError if data are read as float32, and a part of them has numbers of another type."""
    if dtype == np.float32 and found not in (np.dtype("<f4"), np.dtype(">f4")):
        raise ValueError(f"{name} has dtype {found} in data of float32, and may be rounded to it; {remedy}")


def _all_finite(rows: Any) -> bool:
    """Whether no number is NaN or infinite; mostly from one sum, which needs no memory."""
    xp = namespace(rows)
    if not is_tensor(rows) and rows.dtype.itemsize > 8:  # long double: what float64 cannot hold is infinite to kernels
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(xp.sum(rows, dtype=xp.float64)) * 0.0
    return total == 0 or bool(xp.isfinite(rows).all())


def check_weight(sample_weight: Any, n_samples: int, first: int = 0, some: bool = True) -> Any:
    """Sample weights as (N,) float64 where they lie, or None; finite, not negative, and (`some`) not all zero.

    `first` is the number of row 0.
    """
    if sample_weight is None:
        return None
    given = arrays.read(sample_weight, "sample_weight")
    if given.ndim == 0 and arrays.kind(given) in "fiub":
        given = np.full(n_samples, given)
    if tuple(given.shape) != (n_samples,) or arrays.kind(given) not in "fiub":
        raise ValueError(
            f"sample_weight has shape {tuple(given.shape)} and dtype {given.dtype}; expected one number per sample: "
            f"({n_samples},)"
        )
    weight = given.double() if is_tensor(given) else given.astype(np.float64, copy=False)
    low, high = (float(weight.min()), float(weight.max())) if n_samples else (0.0, 0.0)
    if not (np.isfinite(low) and np.isfinite(high)):
        row = int(np.argmax(~np.isfinite(to_host(weight))))
        raise ValueError(
            f"sample_weight contains {float(weight[row])} at row {first + row}; expected finite numbers "
            "(no NaN, no inf)"
        )
    if low < 0:
        row = int(weight.argmin())
        raise ValueError(f"sample_weight is {low} at row {first + row}; expected weights >= 0")
    if some:
        check_some_weight(high)
    return weight


def check_some_weight(weight: float) -> None:
    """ValueError if all weights, their sum or the largest of them, are nothing."""
    if weight == 0:
        raise ValueError("sample_weight is zero for every sample; expected at least one positive weight")


# ---- arrays of any shape, and stacks


def real_array(name: str, values: Any, expected: str = "real numbers (float, int or bool)") -> np.ndarray:
    """`values` as a NumPy array of real numbers, in whatever dtype; ValueError for anything else."""
    array = arrays.to_numbers(values, name)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {array.dtype}; expected {expected}")
    return array


def check_array(name: str, values: Any) -> np.ndarray:
    """`values` as a NumPy array of finite real numbers; ValueError naming the first index that is not."""
    array = real_array(name, values)
    if array.dtype.kind != "f" or _all_finite(array):
        return array
    with np.errstate(over="ignore"):
        index = first_index(~np.isfinite(array.astype(np.float64, copy=False)))
    value = "NaN" if np.isnan(array[index]) else "inf"
    raise ValueError(f"{name} contains {value}{in_words(index)}; expected finite numbers: remove or impute it first")


def check_weight_of(sample_weight: Any, shape: tuple[int, ...]) -> np.ndarray:
    """ω as float64 of the samples' shape (..., N); finite, not negative, in no problem all zero."""
    if sample_weight is None:
        return np.broadcast_to(1.0, shape)
    given = check_array("sample_weight", sample_weight)
    given = np.broadcast_to(given, shape[-1:]) if given.ndim == 0 else given
    if given.shape not in {shape, shape[-1:]}:
        raise ValueError(f"sample_weight has shape {given.shape}; expected one number per sample: {shape}")
    weight = given.astype(np.float64, copy=False)
    if weight.min() < 0:
        index = first_index(weight < 0)
        raise ValueError(f"sample_weight is {weight[index]:g}{in_words(index)}; expected weights >= 0")
    empty = weight.max(axis=-1) == 0
    if empty.any():
        where = in_words(first_index(empty))
        raise ValueError(f"sample_weight is zero for every sample{where}; expected at least one positive weight")
    return np.broadcast_to(weight, shape)


def broadcast(what: str, **shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The common shape of `what`; ValueError naming all shapes if there is none."""
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{what} do not broadcast: {found}; expected equal lengths, or lengths of 1") from None


def asymmetric(matrices: np.ndarray) -> np.ndarray:
    """Which matrices of (..., D, D) are not symmetric but for rounding, (...) bool."""
    size = np.sqrt(np.abs(np.einsum("...ii->...i", matrices)))
    skew = np.abs(matrices - matrices.swapaxes(-1, -2)) > ASYMMETRY * size[..., None] * size[..., None, :]
    wrong: np.ndarray = skew.any(axis=(-1, -2))
    return wrong


def check_symmetric(name: str, matrices: np.ndarray) -> None:
    """ValueError naming the first matrix of (..., D, D) that is not symmetric but for rounding."""
    wrong = asymmetric(matrices)
    if wrong.any():
        raise ValueError(f"{name}{in_words(first_index(wrong))} is not symmetric; pass 0.5 * (c + c.T)")


def factor_covariances(name: str, values: Any) -> np.ndarray:
    """L with L Lᵀ = Σ, (..., D, D) float64; ValueError naming the first Σ without one."""
    matrices = check_array(name, values).astype(np.float64)
    if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2] or matrices.shape[-1] == 0:
        raise ValueError(f"{name} has shape {matrices.shape}; expected square matrices: (..., features, features)")
    check_symmetric(name, matrices)
    try:
        return np.linalg.cholesky(matrices)
    except np.linalg.LinAlgError:
        raise not_positive_definite(name, matrices, first_index(indefinite(matrices))) from None


def indefinite(matrices: np.ndarray) -> np.ndarray:
    """Which symmetric matrices (..., D, D) have no Cholesky factor; (...) bool."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return np.reshape([not _has_cholesky_factor(matrix) for matrix in flat], matrices.shape[:-2])


def _has_cholesky_factor(matrix: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def not_positive_definite(name: str, matrices: np.ndarray, index: tuple[int, ...]) -> ValueError:
    """The error for one matrix of (..., D, D)."""
    return ValueError(
        f"{name}{in_words(index)} is not positive definite (smallest eigenvalue "
        f"{np.linalg.eigvalsh(matrices[index])[0]:.9g}); add to its diagonal"
    )


def first_index(wrong: np.ndarray) -> tuple[int, ...]:
    """Index of the first true entry."""
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def in_words(index: tuple[int, ...]) -> str:
    """An index in words; nothing for a lone number."""
    return f" at [{', '.join(map(str, index))}]" if index else ""


def check_features(features: Sequence[int], n_features: int) -> np.ndarray:
    """Indices of some of the features, all different, as int64; ValueError for one that is not there."""
    chosen = np.asarray(features)
    legal = chosen.ndim == 1 and chosen.dtype.kind in "iu" and len(chosen) > 0
    if not legal or len(set(chosen.tolist())) < len(chosen) or chosen.min() < 0 or chosen.max() >= n_features:
        raise ValueError(f"features is {features!r}; expected different integers from 0 to {n_features - 1}")
    return chosen.astype(np.int64)


# ---- single values


def check_threads(n_threads: int | None) -> int:
    """A number of threads; None means every processor that this process may use."""
    if n_threads is None:
        return default_threads()
    return check_integer("n_threads", n_threads, 1)


def check_integer(name: str, value: Any, least: int) -> int:
    """`value` as an int that is at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer >= {least}")
    return int(value)


def check_number(name: str, value: Any, least: float = 0.0) -> float:
    """`value` as a finite float that is at least `least`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not least <= float(value) < np.inf:
        raise ValueError(f"{name} is {value!r}; expected a finite number >= {least:g}")
    return float(value)


def check_positive(name: str, value: Any) -> float:
    """`value` as a finite float above zero."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0.0 < float(value) < np.inf:
        raise ValueError(f"{name} is {value!r}; expected a finite number > 0")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool: what is true in other ways, such as "no", is refused."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` as one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    return value


def generator(random_state: Any) -> np.random.Generator:
    """A random generator from None, an int, a Generator, a SeedSequence or a RandomState (which it advances)."""
    if random_state is np.random:  # NumPy's global state, as scikit-learn allows
        random_state = np.random.mtrand._rand
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(0, 2**32, size=4, dtype=np.uint64))
    try:
        return np.random.default_rng(random_state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"random_state is {random_state!r}; expected None, an integer >= 0, or a NumPy random generator ({error})"
        ) from None
