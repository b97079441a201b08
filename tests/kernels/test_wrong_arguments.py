"""Arguments of a wrong kind, shape, dtype or layout are an error in every backend, before anything is read or written.

What they ask for is in `emalgam_kernels.contract`, and in `emalgam_kernels.parameters` for what is wrong by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Final

import numpy as np
import pytest

from emalgam_kernels import FILES, HOMES, Direct, Gaussians, Packed, Sampler, load
from emalgam_kernels.batch import COVARIANCE_TYPES, Mixtures, Outcomes, Problems, Settings, Status
from emalgam_kernels.checks import expect
from emalgam_kernels.parameters import take
from tests.conftest import TESTED_BACKENDS

N, D, K, F, B = 5, 3, 2, 7, 4
Arguments = dict[str, Any]
Fault = tuple[type[Exception], str, Callable[[Arguments], Any]]


# ---- arguments that are right


def untouched(*shape: int, dtype: Any = np.float64) -> np.ndarray:
    """An array to write to; a kernel that writes seldom writes this."""
    return np.full(shape, 77, dtype)


def packed(n_features: int = D) -> Packed:
    natural = np.full((K, 2 * n_features + 1), -0.5)
    return Packed("diag", np.zeros(n_features), np.ones(n_features), np.eye(n_features), natural)


def direct() -> Direct:
    return Direct("full", np.zeros(D), np.ones(D), np.zeros((K, D)), np.stack([np.eye(D)] * K), np.zeros(K))


def gaussians(count: int = B, dtype: str = "float64") -> Gaussians:
    identity = np.broadcast_to(np.eye(D, dtype=dtype), (count, D, D))
    return Gaussians("full", np.zeros((count, D), dtype), identity, identity)


def sampler() -> Sampler:
    return Sampler(np.zeros((K, D)), np.stack([np.eye(D)] * K), np.full(K, 0.5))


def stack(mixture: Any) -> Any:
    """B times the same."""
    return take(take(mixture, None), np.zeros(B, int))


def problems() -> Problems:
    offsets, order = np.array([0, 2, 2, 3, N]), np.arange(N)[::-1].copy()
    return Problems(np.zeros((N, D)), offsets, order, np.ones(N), np.arange(B, dtype=np.uint64))


def settings() -> Settings:
    return Settings("diag", np.full(B, 1), np.full(B, K))


def mixtures() -> Mixtures:
    means, variances = untouched(B, K, D), untouched(B, K, D)
    return Mixtures("diag", np.zeros(B, np.int64), untouched(B, K), means, variances)


def outcomes() -> Outcomes:
    integers = [untouched(B, dtype=np.int64) for _ in range(2)]
    return Outcomes(untouched(B), untouched(B), integers[0], np.ones(B, bool), integers[1])


def covariances(dtype: str = "float64") -> np.ndarray:
    return np.stack([np.eye(D, dtype=dtype)] * B)


RIGHT: Final[dict[str, Callable[[], Arguments]]] = {
    "log_prob": lambda: {"x": np.zeros((N, D)), "parameters": packed(), "out": untouched(N)},
    "responsibilities": lambda: {
        "x": np.zeros((N, D)),
        "parameters": packed(),
        "out": untouched(N, K),
        "log_prob": untouched(N),
    },
    "em_statistics": lambda: {
        "x": np.zeros((N, D)),
        "sample_weight": np.ones(N),
        "parameters": packed(),
        "out": untouched(K, F),
    },
    "precision_factors": lambda: {"covariances": covariances(), "out": untouched(B, D, D)},
    "check_covariances": lambda: {"covariances": covariances()},
    "kl_pairs": lambda: {"p": gaussians(), "q": gaussians(), "out": untouched(B)},
    "kl_all_pairs": lambda: {"p": gaussians(), "q": gaussians(N), "out": untouched(B, N)},
    "philox_words": lambda: {"seed": 0, "stream": 3, "block": 0, "first": 0, "out": untouched(N, 4, dtype=np.uint32)},
    "uniforms": lambda: {"seed": 0, "stream": 3, "first": 0, "out": untouched(N)},
    "normals": lambda: {"seed": 0, "stream": 3, "first": 0, "out": untouched(N, D)},
    "sample_mixture": lambda: {
        "sampler": sampler(),
        "seed": 0,
        "first": 0,
        "out": untouched(N, D),
        "labels": untouched(N, dtype=np.int64),
    },
    "kl_monte_carlo": lambda: {
        "sampler": stack(sampler()),
        "p": stack(packed()),
        "q": stack(direct()),
        "seed": 0,
        "first": 0,
        "n": N,
        "out": untouched(B, 5),
        "control": (stack(packed()), stack(packed())),
    },
    "fit_many": lambda: {
        "problems": problems(),
        "settings": settings(),
        "mixtures": mixtures(),
        "outcomes": outcomes(),
    },
    "predict_many": lambda: {
        "problems": problems(),
        "mixtures": mixtures(),
        "log_prob": untouched(N),
        "labels": untouched(N, dtype=np.int64),
    },
}
FILE_OF: Final = {**HOMES, "precision_factors": "kl", "check_covariances": "kl", "philox_words": "sampling"}


# ---- what can be wrong with them


def locked(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same numbers, one byte behind where they should lie."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    return memory[1:].view(array.dtype).reshape(array.shape)


# Of an array that is asked for with a shape and a dtype: (what, error, message, from a right one to a wrong one).
OF_ANY_ARRAY: Final[dict[str, tuple[type[Exception], str, Callable[[np.ndarray], Any]]]] = {
    "no array": (TypeError, "is list; expected a NumPy array", lambda a: a.tolist()),
    "nothing": (TypeError, "is NoneType; expected a NumPy array", lambda _: None),
    "a number": (TypeError, "is float; expected a NumPy array", lambda _: 0.0),
    "one axis more": (ValueError, r"has shape \(.*1\); expected", lambda a: a[..., None]),
    "one axis less": (ValueError, r"has shape \(.*\); expected", lambda a: a[0, ...]),
    "one element more": (
        ValueError,
        r"has shape \(.*\); expected",
        lambda a: np.stack([*np.moveaxis(a, -1, 0)] * 2, -1),
    ),
}
OF_A_RESULT: Final = {
    "half": (ValueError, "is float16; expected ", lambda a: a.astype(np.float16)),
    "another byte order": (ValueError, "is [<>].[48]; expected ", lambda a: a.astype(a.dtype.newbyteorder())),
    "read-only": (ValueError, "is read-only; expected an aligned array to write to", locked),
    "unaligned": (ValueError, "is unaligned; expected an aligned array", unaligned),
}


def given(name: str, change: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    """One argument changed."""
    return lambda arguments: {**arguments, name: change(arguments[name])}


def part(name: str, field: str, change: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    """One field of an argument changed."""
    return given(name, lambda value: replace(value, **{field: change(getattr(value, field))}))


def of_array(name: str, *, leaving_out: tuple[str, ...] = ()) -> dict[str, Fault]:
    """What can be wrong with an array that is read; any number of rows is right for some."""
    return {
        f"{name}: {what}": (error, message, given(name, change))
        for what, (error, message, change) in OF_ANY_ARRAY.items()
        if what not in leaving_out
    }


def of_result(name: str, *, leaving_out: tuple[str, ...] = ()) -> dict[str, Fault]:
    """What can be wrong with an array that is written."""
    found = {f"{name}: {w}": (error, message, given(name, c)) for w, (error, message, c) in OF_A_RESULT.items()}
    return {**of_array(name, leaving_out=leaving_out), **found}


def of_fields(name: str, fields: tuple[str, ...], faults: tuple[str, ...]) -> dict[str, Fault]:
    """The same of some fields of an argument."""
    every = {**OF_ANY_ARRAY, **OF_A_RESULT}
    return {
        f"{name}.{field}: {what}": (every[what][0], every[what][1], part(name, field, every[what][2]))
        for field in fields
        for what in faults
    }


OF_SAMPLES: Final[dict[str, Fault]] = {
    **of_array("x", leaving_out=("one element more",)),
    "x: a column more": (
        ValueError,
        rf"x has shape \(5, 4\); expected \(N, {D}\)",
        given("x", lambda _: np.zeros((N, 4))),
    ),
    "x: a column less": (
        ValueError,
        rf"x has shape \(5, 2\); expected \(N, {D}\)",
        given("x", lambda _: np.zeros((N, 2))),
    ),
    "x: complex": (ValueError, "x is complex128; expected a real dtype", given("x", lambda a: a.astype(complex))),
    "x: objects": (ValueError, "x is object; expected a real dtype", given("x", lambda a: a.astype(object))),
    "x: dates": (ValueError, r"x is datetime64\[D\]; expected a real", given("x", lambda a: a.astype("datetime64[D]"))),
    "parameters: none": (
        TypeError,
        "parameters is NoneType; expected Packed or Direct",
        given("parameters", lambda _: None),
    ),
    "parameters: others": (TypeError, "parameters is Sampler; expected", given("parameters", lambda _: sampler())),
    "parameters: a stack": (ValueError, "a stack of 4 mixtures; expected one mixture", given("parameters", stack)),
    "parameters: a part": (TypeError, "expected a NumPy array", given("parameters", lambda one: take(one, 0))),
    "parameters: more features": (ValueError, r"expected \(N, 8\)", given("parameters", lambda _: packed(8))),
    "parameters: one feature": (ValueError, r"expected \(N, 1\)", given("parameters", lambda _: packed(1))),
}
OF_COUNTERS: Final[dict[str, Fault]] = {
    "seed: negative": (ValueError, "seed is -1; expected an integer from 0", given("seed", lambda _: -1)),
    "seed: large": (ValueError, "seed is 18446744073709551616; expected", given("seed", lambda _: 2**64)),
    "seed: no integer": (TypeError, "integer", given("seed", lambda _: 0.5)),
    "first: negative": (ValueError, "first is -1; expected", given("first", lambda _: -1)),
}
OF_A_STREAM: Final[dict[str, Fault]] = {
    **OF_COUNTERS,
    "stream: large": (ValueError, "stream is 4294967296; expected", given("stream", lambda _: 2**32)),
}
OF_COVARIANCES: Final[dict[str, Fault]] = {
    **of_array("covariances"),
    "covariances: integers": (
        ValueError,
        "is int64; expected float64 or",
        given("covariances", lambda a: a.astype(int)),
    ),
    "covariances: transposed": (
        ValueError,
        "expected a C-contiguous",
        given("covariances", lambda a: a.transpose(0, 2, 1)),
    ),
    "covariances: unaligned": (ValueError, "is unaligned", given("covariances", unaligned)),
}
OF_TWO_STACKS: Final[dict[str, Fault]] = {
    "p: none": (TypeError, "p is NoneType; expected Gaussians", given("p", lambda _: None)),
    "q: a mixture": (TypeError, "q is Packed; expected Gaussians", given("q", lambda _: packed())),
    "q: float32": (
        ValueError,
        "p is float64 and q float32; expected one",
        given("q", lambda q: gaussians(len(q), "float32")),
    ),
    "q: diagonal": (
        ValueError,
        "p are full and those of q diag; expected one type",
        given("q", lambda q: Gaussians("diag", q.means, q.means, q.means)),
    ),
    "q: other features": (
        ValueError,
        "p has 3 features and q 1; expected as many",
        given("q", lambda q: Gaussians("full", q.means[:, :1], q.covariances[:, :1, :1], q.covariances[:, :1, :1])),
    ),
}
OF_DRAWS: Final[dict[str, Fault]] = {
    **OF_COUNTERS,
    "sampler: none": (TypeError, "sampler is NoneType; expected Sampler", given("sampler", lambda _: None)),
    "draw: unknown": (
        ValueError,
        "draw is 'all'; expected one of plain,",
        lambda arguments: {**arguments, "draw": "all"},
    ),
    "draw: of no strata": (
        ValueError,
        "n_total is 0; expected an integer from 1",
        lambda arguments: {**arguments, "draw": "stratified"},
    ),
}
OF_PROBLEMS: Final[dict[str, Fault]] = {
    **of_fields("problems", ("x", "offsets", "order"), ("no array", "one axis more", "unaligned")),
    "problems: integers": (
        ValueError,
        "x is int64; expected float64 or",
        part("problems", "x", lambda x: x.astype(int)),
    ),
    "problems: int32 offsets": (
        ValueError,
        "offsets is int32",
        part("problems", "offsets", lambda o: o.astype(np.int32)),
    ),
    "problems: no offsets": (ValueError, r"offsets has shape \(0,\)", part("problems", "offsets", lambda o: o[:0])),
    "problems: too many rows": (
        ValueError,
        "offsets lead from 0 to 6",
        part("problems", "offsets", lambda o: o + (o == N)),
    ),
    "problems: before row 0": (ValueError, "offsets lead from -1", part("problems", "offsets", lambda o: o - 1)),
    "problems: down": (ValueError, "or down", part("problems", "offsets", lambda o: np.array([0, 4, 2, 3, N]))),
    "problems: short order": (ValueError, "from 0 to 4", part("problems", "order", lambda o: o[:-1])),
    "problems: order outside": (
        ValueError,
        "order has numbers from 1 to 5",
        part("problems", "order", lambda o: o + 1),
    ),
    "problems: negative order": (ValueError, "order has numbers from -1", part("problems", "order", lambda o: o - 1)),
    **of_fields("mixtures", ("n_components", "weights", "means", "covariances"), ("no array", "one axis more")),
    **of_fields("mixtures", ("weights", "means", "covariances"), ("half", "unaligned")),
    "mixtures: of another type": (
        ValueError,
        "covariances has shape",
        given("mixtures", lambda m: replace(m, covariance_type="full")),
    ),
    "mixtures: of no type": (ValueError, "'round'", given("mixtures", lambda m: replace(m, covariance_type="round"))),
    "mixtures: fewer": (
        ValueError,
        r"expected \(4,\)",
        given("mixtures", lambda _: Mixtures.empty("diag", B - 1, K, D)),
    ),
    "mixtures: other features": (
        ValueError,
        r"means has shape \(4, 2, 2\)",
        given("mixtures", lambda _: Mixtures.empty("diag", B, K, D - 1)),
    ),
}

FAULTS: Final[dict[str, dict[str, Fault]]] = {
    "log_prob": {**OF_SAMPLES, **of_result("out")},
    "responsibilities": {
        **OF_SAMPLES,
        **of_result("out"),
        **of_result("log_prob", leaving_out=("nothing",)),
        "out: of the logs": (
            ValueError,
            r"out has shape \(5,\); expected \(5, 2\)",
            given("out", lambda _: untouched(N)),
        ),
    },
    "em_statistics": {
        **OF_SAMPLES,
        **of_array("sample_weight", leaving_out=("nothing",)),
        "sample_weight: too short": (ValueError, r"\(4,\); expected \(5,\)", given("sample_weight", lambda w: w[1:])),
        "sample_weight: float32": (
            ValueError,
            "is float32; expected",
            given("sample_weight", lambda w: w.astype("f4")),
        ),
        "sample_weight: unaligned": (ValueError, "is unaligned", given("sample_weight", unaligned)),
        **of_result("out"),
    },
    "precision_factors": {
        **OF_COVARIANCES,
        **of_result("out"),
        "out: float32": (ValueError, "out is float32; expected float64, as", given("out", lambda a: a.astype("f4"))),
        "out: transposed": (ValueError, "expected a C-contiguous", given("out", lambda a: a.transpose(0, 2, 1))),
    },
    "check_covariances": OF_COVARIANCES,
    "kl_pairs": {
        **OF_TWO_STACKS,
        **of_result("out"),
        "q: fewer": (ValueError, "p has 4 Gaussians and q 3; expected as many", given("q", lambda _: gaussians(B - 1))),
    },
    "kl_all_pairs": {
        **OF_TWO_STACKS,
        **of_result("out"),
        "q: no factors": (
            ValueError,
            "q.precisions_cholesky is None; kl_all_pairs needs them: compute them with precision_factors",
            part("q", "precisions_cholesky", lambda _: None),
        ),
    },
    "philox_words": {
        **OF_A_STREAM,
        **of_array("out"),
        "block: large": (ValueError, "block is 4294967296", given("block", lambda _: 2**32)),
        "out: int32": (ValueError, "out is int32; expected uint32", given("out", lambda a: a.astype(np.int32))),
    },
    "uniforms": {**OF_A_STREAM, **of_result("out", leaving_out=("one element more",))},
    "normals": {
        **OF_A_STREAM,
        **of_result("out", leaving_out=("one element more",)),
        "out: no features": (ValueError, r"\(5, 0\); expected \(5, 1\)", given("out", lambda _: untouched(N, 0))),
    },
    "sample_mixture": {
        **OF_DRAWS,
        **of_result("out"),
        **of_array("labels"),
        "labels: int32": (ValueError, "labels is int32; expected int64", given("labels", lambda a: a.astype(np.int32))),
        "sampler: a stack": (ValueError, "a stack of 4 mixtures; expected one mixture", given("sampler", stack)),
    },
    "kl_monte_carlo": {
        **OF_DRAWS,
        **of_result("out"),
        "sampler: of one mixture": (ValueError, "expected a stack of 4", given("sampler", lambda _: sampler())),
        "n: negative": (ValueError, "n is -1; expected", given("n", lambda _: -1)),
        "p: of one mixture": (
            ValueError,
            "p has one mixture, no stack; expected a stack",
            given("p", lambda _: packed()),
        ),
        "p: fewer": (ValueError, "p has a stack of 3 mixtures; expected", given("p", lambda p: take(p, slice(3)))),
        "q: none": (TypeError, "q is NoneType; expected Packed or Direct", given("q", lambda _: None)),
        "q: other features": (ValueError, "q has 4 features; expected 3", given("q", lambda _: stack(packed(4)))),
        "control: one mixture": (TypeError, "control is Packed; expected two", given("control", lambda pair: pair[0])),
        "control: other features": (
            ValueError,
            r"control\[1\] has 4 features",
            given("control", lambda pair: (pair[0], stack(packed(4)))),
        ),
        "control: no room": (ValueError, r"\(4, 2\); expected \(4, 5\)", given("out", lambda _: untouched(B, 2))),
    },
    "fit_many": {
        **OF_PROBLEMS,
        **of_fields("problems", ("sample_weight", "numbers"), ("no array", "one axis more", "one element more")),
        **of_fields("mixtures", ("n_components", "weights", "means", "covariances"), ("read-only",)),
        **of_fields("settings", ("fewest", "most"), ("no array", "one axis more", "one element more")),
        **of_fields(
            "outcomes",
            ("log_likelihood", "entropy", "n_iter", "converged", "status"),
            ("no array", "one axis more", "one element more", "half", "read-only"),
        ),
        "problems: integer weights": (
            ValueError,
            "sample_weight is int64",
            part("problems", "sample_weight", lambda w: w.astype(int)),
        ),
        "settings: another type": (
            ValueError,
            "the settings say full, and the mixtures diag",
            part("settings", "covariance_type", lambda _: "full"),
        ),
        "settings: most": (ValueError, "most has numbers from 3 to 3", part("settings", "most", lambda m: m + 1)),
        "settings: fewest": (ValueError, "fewest has numbers from 0 to 0", part("settings", "fewest", lambda m: m - 1)),
        "settings: criterion": (ValueError, "criterion is 'mdl'", part("settings", "criterion", lambda _: "mdl")),
        "settings: seed": (ValueError, "seed is -1", part("settings", "seed", lambda _: -1)),
        "settings: no start": (
            ValueError,
            "n_init is 0; expected an integer from 1 to",
            part("settings", "n_init", lambda _: 0),
        ),
        "settings: too many starts": (ValueError, "n_init is 2147483648", part("settings", "n_init", lambda _: 2**31)),
        "settings: half a start": (TypeError, "integer", part("settings", "n_init", lambda _: 2.5)),
        "settings: max_iter": (
            ValueError,
            "max_iter is -5; expected an integer from 0 to",
            part("settings", "max_iter", lambda _: -5),
        ),
        "settings: half an iteration": (TypeError, "integer", part("settings", "max_iter", lambda _: 0.5)),
    },
    "predict_many": {
        **OF_PROBLEMS,
        **of_result("log_prob"),
        **of_array("labels"),
        "labels: int32": (ValueError, "labels is int32; expected int64", given("labels", lambda a: a.astype(np.int32))),
        "mixtures: too many": (
            ValueError,
            "n_components has numbers from 3 to 3",
            part("mixtures", "n_components", lambda n: n + 3),
        ),
    },
}


# ---- the kernels


def test_every_kernel_is_here() -> None:
    assert set(RIGHT) == set(FAULTS) == {*(k for kernels in FILES.values() for k in kernels), *FILE_OF}


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_arguments(backend: str, kernel: str) -> None:
    """Those that faults are made of: an error has no other cause than the fault."""
    getattr(load(backend, FILE_OF[kernel]), kernel)(**RIGHT[kernel]())


def arrays_in(value: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """All arrays of arguments, those in parameters too, with their names."""
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from arrays_in(each, f"{name}.{key}".lstrip("."))
    elif isinstance(value, tuple):
        yield from arrays_in(dict(enumerate(value)), name)
    elif is_dataclass(value):
        yield from arrays_in({field.name: getattr(value, field.name) for field in fields(value)}, name)


@pytest.mark.parametrize("kernel", RIGHT)
def test_arrays_in_arguments(kernel: str) -> None:
    """What is compared in `test_wrong_arguments`: whatever a kernel is given."""
    found = {name.split(".")[0] for name, _ in arrays_in(RIGHT[kernel]())}
    assert found == {name for name, value in RIGHT[kernel]().items() if not isinstance(value, int)}


@pytest.mark.parametrize(("kernel", "fault"), [(kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]])
def test_wrong_arguments(backend: str, kernel: str, fault: str) -> None:
    error, message, change = FAULTS[kernel][fault]
    arguments = change(RIGHT[kernel]())
    before = [(name, array.copy()) for name, array in arrays_in(arguments)]
    with pytest.raises(error, match=message):
        getattr(load(backend, FILE_OF[kernel]), kernel)(**arguments)
    for (name, array), (_, value) in zip(arrays_in(arguments), before, strict=True):
        np.testing.assert_array_equal(array, value, err_msg=f"{name} has changed")


@pytest.mark.parametrize("form", [packed, direct])
@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
def test_arithmetic_of_a_gpu_is_refused_by_others(backend: str, form: Callable[[], Any], arithmetic: str) -> None:
    kernels, out = load(backend), untouched(N)
    kernels.log_prob(np.zeros((N, D)), replace(form(), arithmetic=arithmetic), out)
    tf32 = replace(form(), arithmetic="tf32")
    if backend == "numba_cuda":
        kernels.log_prob(np.zeros((N, D)), tf32, out)
    else:
        with pytest.raises(ValueError, match="arithmetic is 'tf32'; expected one of float32, float64"):
            kernels.log_prob(np.zeros((N, D)), tf32, out)


@pytest.mark.skipif("numba_cuda" not in TESTED_BACKENDS, reason="of tensors")
@pytest.mark.parametrize(
    ("kernel", "tensors"),
    [
        ("log_prob", ("x",)),
        ("responsibilities", ("x",)),
        ("em_statistics", ("x",)),
        ("sample_mixture", ("out",)),
        ("precision_factors", ("covariances",)),
        ("precision_factors", ("out",)),
        *((kernel, tensors) for kernel in ("kl_pairs", "kl_all_pairs") for tensors in (("q",), ("out",), ("p", "q"))),
    ],
)
def test_arrays_in_two_places(backend: str, kernel: str, tensors: tuple[str, ...]) -> None:
    import torch

    def moved(value: Any) -> Any:
        if isinstance(value, Gaussians):
            return replace(value, **{name: moved(array) for name, array in arrays_in(value)})
        return torch.tensor(value, device="cuda" if torch.cuda.is_available() else "cpu")

    arguments = RIGHT[kernel]()
    arguments.update({name: moved(arguments[name]) for name in tensors})
    with pytest.raises(TypeError, match="some arrays are NumPy's and some tensors; expected all of them in one place"):
        getattr(load(backend, FILE_OF[kernel]), kernel)(**arguments)


# ---- parameters


def wide(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that are not contiguous along the last axis."""
    return np.zeros((*shape[:-1], 2 * shape[-1]))[..., ::2]


PARAMETERS: Final[dict[str, Callable[[], Any]]] = {
    "packed": packed,
    "direct": direct,
    "gaussians": gaussians,
    "sampler": sampler,
    "stack of packed": lambda: stack(packed()),
    "stack of direct": lambda: stack(direct()),
}
ARRAYS_OF: Final = {
    "packed": ("shift", "scale", "whitening", "natural"),
    "direct": ("shift", "scale", "means", "precisions_cholesky", "log_constants"),
    "gaussians": ("means", "covariances", "precisions_cholesky"),
    "sampler": ("means", "factors", "weights"),
}
ARRAYS_OF_ALL: Final = [(kind, field) for kind in PARAMETERS for field in ARRAYS_OF[kind.removeprefix("stack of ")]]


@pytest.mark.parametrize("fault", ["no array", "a number", "one axis more", "one element more", "half"])
@pytest.mark.parametrize(("kind", "field"), ARRAYS_OF_ALL)
def test_wrong_parameters(kind: str, field: str, fault: str) -> None:
    error, _, change = {**OF_ANY_ARRAY, **OF_A_RESULT}[fault]
    right = PARAMETERS[kind]()
    with pytest.raises(error, match="expected"):
        replace(right, **{field: change(getattr(right, field))})


@pytest.mark.parametrize(("kind", "field"), [each for each in ARRAYS_OF_ALL if each != ("sampler", "weights")])
def test_parameters_that_are_not_contiguous(kind: str, field: str) -> None:
    right = PARAMETERS[kind]()
    with pytest.raises(ValueError, match=rf"{field} has strides .*; expected a C-contiguous array"):
        replace(right, **{field: wide(getattr(right, field).shape)})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("packed", {"feature_map": "round"}, "feature_map is 'round'; expected one of full, diag, spherical"),
        ("packed", {"feature_map": "full"}, r"natural has shape \(2, 7\); expected \(2, 10\)"),
        ("packed", {"arithmetic": "float16"}, "arithmetic is 'float16'; expected one of float32, float64, tf32"),
        ("packed", {"natural": np.empty((0, F))}, r"natural has shape \(0, 7\); expected \(1, 7\)"),
        ("packed", {"whitening": np.eye(D)[:, :2]}, r"whitening has shape \(3, 2\); expected \(3, 3\)"),
        ("packed", {"shift": np.empty(0)}, r"shift has shape \(0,\); expected \(1,\)"),
        ("direct", {"feature_map": "spherical"}, "feature_map is 'spherical'; expected one of full, diag"),
        ("direct", {"feature_map": "diag"}, r"precisions_cholesky has shape \(2, 3, 3\); expected \(2, 3\)"),
        ("direct", {"log_constants": np.zeros(3)}, r"log_constants has shape \(3,\); expected \(2,\)"),
        ("stack of direct", {"log_constants": np.zeros(K)}, r"has shape \(2,\); expected \(4, 2\)"),
        ("stack of packed", {"scale": np.ones((B + 1, D))}, r"scale has shape \(5, 3\); expected \(4, 3\)"),
        ("gaussians", {"covariance_type": "tied"}, "covariance_type is 'tied'; expected one of full, diag"),
        ("gaussians", {"means": np.zeros((B, D), "f4")}, "covariances is float64; expected float32, as the means are"),
        ("gaussians", {"covariances": None}, "covariances is NoneType; expected a NumPy array"),
        ("sampler", {"weights": np.ones(3)}, r"weights has shape \(3,\); expected \(2,\)"),
        ("sampler", {"factors": np.zeros((K, D, D - 1))}, r"factors has shape \(2, 3, 2\); expected \(2, 3, 3\)"),
    ],
)
def test_parameters_that_do_not_fit_each_other(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        replace(PARAMETERS[kind](), **changes)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_empty_mixtures_fit(backend: str, covariance_type: str) -> None:
    """What `Mixtures.empty` makes room for, the kernels take."""
    how, outcomes = replace(settings(), covariance_type=covariance_type), Outcomes.empty(B)
    load(backend, "batch").fit_many(problems(), how, Mixtures.empty(covariance_type, B, K, D), outcomes)
    assert outcomes.status[1] == Status.TOO_FEW_ROWS, "the second problem has no samples"


def test_what_components_share_may_have_any_stride() -> None:
    """Along a stack, and along K for factors: nothing is copied."""
    shared = np.broadcast_to(np.eye(D), (K, D, D))
    replace(direct(), precisions_cholesky=shared)
    replace(sampler(), factors=np.stack([np.eye(D)] * 2 * K)[::2])
    replace(gaussians(), means=np.zeros((2 * B, D))[::-2])
    one = take(packed(), None)
    Packed("diag", *(np.broadcast_to(getattr(one, f), (B, *getattr(one, f).shape[1:])) for f in ARRAYS_OF["packed"]))


def test_arrays_of_other_names_for_the_same_dtype() -> None:
    """Two dtypes that are equal need not be one object."""
    expect("out", np.empty(2, np.longlong), (2,), (np.dtype(np.int64),))


@pytest.mark.parametrize("kernel", FILES["mixture"])
@pytest.mark.parametrize(("fault", "change"), [("x", lambda x: x[:, 1:]), ("out", lambda out: out[..., 1:])])
def test_means_and_factors_are_checked_too(backend: str, kernel: str, fault: str, change: Callable[[Any], Any]) -> None:
    """`Direct`, for which statistics have the features of Σ and of the mean."""
    arguments = {**RIGHT[kernel](), "parameters": direct()}
    if kernel == "em_statistics":
        arguments["out"] = np.empty((K, direct().n_statistics))
    getattr(load(backend), kernel)(**arguments)
    with pytest.raises(ValueError, match=f"{fault} has shape .*; expected"):
        getattr(load(backend), kernel)(**{**arguments, fault: change(arguments[fault])})
