"""The torch operators: values and gradients against SciPy and torch's own formula, and torch's checks of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

import emalgam
from emalgam import backends
from emalgam.nn import mixture_log_prob, mixture_responsibilities
from emalgam.nn import operators as operators_module
from emalgam.nn.gradients import Evaluation
from emalgam_kernels import Direct
from tests.tolerances import tolerance

OPERATORS = {"log_prob": operators_module._log_prob, "responsibilities": operators_module._responsibilities}
every_dtype = pytest.mark.parametrize("dtype", ["float64", "float32"])
every_operator = pytest.mark.parametrize("operator", [mixture_log_prob, mixture_responsibilities])
Operator = Callable[..., Tensor]


def parameters(N: int, D: int, K: int, dtype: str = "float64", seed: int = 0) -> list[Tensor]:
    """x (N, D), weights that do not sum to one, means and Cholesky factors, all requiring gradients."""
    rng = np.random.default_rng(seed)
    lower = np.tril(rng.normal(size=(K, D, D)) / (2 + D), -1) + np.eye(D) * rng.uniform(0.6, 1.4, (K, 1, D))
    values = (2 * rng.normal(size=(N, D)), rng.uniform(0.2, 2, K), 2 * rng.normal(size=(K, D)), lower)
    return [torch.tensor(value, dtype=getattr(torch, dtype), requires_grad=True) for value in values]


def plain_logits(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    """log w_k N(x_n; μ_k, L_k L_kᵀ), (N, K), by torch's own distributions."""
    normal = torch.distributions.MultivariateNormal(means, scale_tril=scale_tril.tril(), validate_args=False)
    return normal.log_prob(x[:, None]) + weights.log()


def plain(operator: Operator, *arguments: Tensor) -> Tensor:
    logits = plain_logits(*arguments)
    return logits.logsumexp(1) if operator is mixture_log_prob else logits.softmax(1)


def assert_same_gradients(operator: Operator, arguments: list[Tensor], digits_lost: float = 1.0) -> None:
    """Of the operator and of torch's formula in float64, for gradients of either sign."""
    found, dtype = operator(*arguments), str(arguments[0].dtype).removeprefix("torch.")
    size = float(mixture_log_prob(*arguments).detach().abs().max()) + 1
    bound = digits_lost * size * tolerance("mixture operators", dtype)
    doubles = [each.detach().double().requires_grad_() for each in arguments]
    expected = plain(operator, *doubles)
    assert found.dtype == arguments[0].dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = torch.autograd.grad(found, arguments, gradient.to(found.dtype))
    theirs = torch.autograd.grad(expected, doubles, gradient)
    for name, own, their in zip(("x", "weights", "means", "scale_tril"), ours, theirs, strict=True):
        assert own.dtype == found.dtype
        error = (own.double() - their).abs().max() / their.abs().max().clamp_min(1e-3)
        assert error <= bound, f"the gradient in {name} is off by {error:.2g} of its largest entry"


@every_operator
def test_components_far_apart(operator: Operator) -> None:
    """Rows near the first two components, with a third one 1e12 away: neither values nor gradients lose digits."""
    x, weights, means, lower = (each.detach() for each in parameters(20, 3, 3))
    means[2] += 1e12
    assert_same_gradients(operator, [each.requires_grad_() for each in (x, weights, means, lower)])


# ---- values


@every_dtype
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
def test_log_prob_is_scipys(shape: tuple[int, ...], dtype: str) -> None:
    x, weights, means, lower = (each.detach() for each in parameters(max(int(np.prod(shape)), 1), 3, 4, dtype))
    x = x[: int(np.prod(shape))].reshape(*shape, 3)
    found = mixture_log_prob(x, weights, means, lower)
    logits = np.stack(
        [
            np.log(float(w)) + np.reshape(stats.multivariate_normal.logpdf(x.double(), m, L @ L.T), shape)
            for w, m, L in zip(weights.double(), means.double().numpy(), lower.double().numpy(), strict=True)
        ],
        axis=-1,
    )
    assert (tuple(found.shape), found.dtype) == (shape, x.dtype)
    bound = tolerance("mixture operators", dtype) * (1 + np.abs(logits).max(initial=0.0))
    np.testing.assert_allclose(found, special.logsumexp(logits, axis=-1), rtol=0, atol=bound)
    r = mixture_responsibilities(x, weights, means, lower)
    assert tuple(r.shape) == (*shape, 4)
    np.testing.assert_allclose(r, special.softmax(logits, axis=-1), rtol=0, atol=bound)


@every_operator
def test_an_empty_batch_has_gradients_of_zero(operator: Operator) -> None:
    arguments = parameters(0, 3, 4)
    operator(*arguments).sum().backward()
    assert [tuple(each.grad.shape) for each in arguments] == [(0, 3), (4,), (4, 3), (4, 3, 3)]
    assert not any(each.grad.any() for each in arguments)


@every_operator
def test_views_are_read_as_they_lie(operator: Operator) -> None:
    """Transposed, reversed, strided and expanded tensors, and gradients like that."""
    x, weights, means, lower = (each.detach() for each in parameters(6, 2, 3))
    views = (
        x.t().contiguous().t(),
        torch.stack([weights, weights], 1)[:, 0],
        means.flip(0).flip(0),
        lower.mT.contiguous().mT,
    )
    torch.testing.assert_close(operator(*views), operator(x, weights, means, lower), rtol=0, atol=0)
    one = operator(x[:1], weights, means, lower)
    torch.testing.assert_close(operator(x[:1].expand(5, 2), weights, means, lower), one.expand(5, *one.shape[1:]))


def test_upper_triangle_is_not_read() -> None:
    x, weights, means, lower = (each.detach() for each in parameters(5, 3, 2))
    full = lower + torch.full_like(lower, 7.0).triu(1)
    torch.testing.assert_close(mixture_log_prob(x, weights, means, full), mixture_log_prob(x, weights, means, lower))


def test_kernels_get_the_tensors_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *rest = (each.detach() for each in parameters(5, 3, 2))
    kernels = backends.kernels("reference")
    original, seen = kernels.log_prob, []

    def spy(data: np.ndarray, *arguments: Any, **keywords: Any) -> None:
        seen.append(data)
        original(data, *arguments, **keywords)

    monkeypatch.setattr(kernels, "log_prob", spy)
    with emalgam.use_backend("reference"):
        mixture_log_prob(x, *rest)
    assert [data.__array_interface__["data"][0] for data in seen] == [x.data_ptr()]


@pytest.mark.parametrize("backend", ["reference", "numba_cpu", "cython_cpu"])
def test_backends_agree(backend: str) -> None:
    arguments = parameters(300, 3, 4)
    with emalgam.use_backend(backend):
        for operator in (mixture_log_prob, mixture_responsibilities):
            assert_same_gradients(operator, arguments)


# ---- gradients

SIZES = [(1, 1, 1), (300, 3, 4), (1500, 2, 3), (200, 40, 3), (100, 3, 70)]  # one block of rows, several, one and a rest


@every_operator
@every_dtype
@pytest.mark.parametrize(("N", "D", "K"), SIZES)
def test_gradients(N: int, D: int, K: int, dtype: str, operator: Operator) -> None:
    assert_same_gradients(operator, parameters(N, D, K, dtype))


@every_operator
def test_gradcheck(operator: Operator) -> None:
    assert torch.autograd.gradcheck(operator, parameters(6, 2, 3))


@every_operator
@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_one_argument(wanted: int, operator: Operator) -> None:
    arguments = parameters(20, 2, 3)
    for i, each in enumerate(arguments):
        each.requires_grad_(i == wanted)
    operator(*arguments).square().sum().backward()
    assert [each.grad is not None for each in arguments] == [i == wanted for i in range(4)]
    (expected,) = torch.autograd.grad(plain(operator, *arguments).square().sum(), arguments[wanted])
    torch.testing.assert_close(arguments[wanted].grad, expected)


@every_operator
@every_dtype
def test_gradients_where_packed_products_would_cancel(dtype: str, operator: Operator) -> None:
    """Clusters a thousand (float32: a hundred) times as far apart as wide: the guard takes the direct form."""
    x, weights, means, lower = (each.detach() for each in parameters(200, 3, 4, dtype))
    apart = {"float64": 1e3, "float32": 1e2}[dtype]
    means = means * apart
    labels = torch.arange(200) % 4
    x = (x / 4 + means[labels]).to(x.dtype)
    arguments = [each.requires_grad_() for each in (x, weights, means, lower)]
    with torch.no_grad():
        run = Evaluation(x.detach(), weights.detach(), means.detach(), lower.detach(), n_threads=1)
    assert isinstance(run.query.parameters, Direct) or run.query.parameters.arithmetic == "float64"
    assert run.direct == (dtype == "float64")
    assert_same_gradients(operator, arguments, digits_lost=apart)  # those that x − μ loses


@every_operator
@every_dtype
def test_rows_far_away(dtype: str, operator: Operator) -> None:
    """Beyond the reach of packed products, where a few other rows are within."""
    x, weights, means, lower = (each.detach() for each in parameters(100, 3, 4, dtype))
    x[::10] *= {"float64": 1e6, "float32": 1e3}[dtype]
    run = Evaluation(x, weights, means, lower, n_threads=1)
    log_prob = run.log_prob()
    assert (run.direct, int(run.query.beyond_reach(log_prob).sum())) == (False, 10)
    assert_same_gradients(operator, [each.requires_grad_() for each in (x, weights, means, lower)])


def test_gradient_of_a_weight_of_zero() -> None:
    """N_k(x_n) / p(x_n): what a little weight would change."""
    x, weights, means, lower = parameters(50, 2, 3)
    with torch.no_grad():
        weights[1] = 0.0
    g = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad(mixture_log_prob(x, weights, means, lower), weights, g)
    logits = plain_logits(x, torch.ones_like(weights), means, lower)
    ratios = logits.exp() / (logits.exp() @ weights)[:, None]
    torch.testing.assert_close(found, g @ ratios)
    G = torch.randn(50, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found,) = torch.autograd.grad(mixture_responsibilities(x, weights, means, lower), weights, G)
    r = ratios * weights
    # ∂ r_j / ∂ w_k = ρ_k (δ_jk − r_j)
    torch.testing.assert_close(found, (ratios * (G - (G * r).sum(1, keepdim=True))).sum(0))


def test_gradient_of_a_weight_of_zero_does_not_overflow() -> None:
    """A row at the absent component's mean, far from all others: through a softmax it has to become 0, not NaN."""
    x = torch.tensor([[0.0], [100.0]])
    weights = torch.tensor([1.0, 0.0], requires_grad=True)
    mixture_log_prob(x, weights, torch.tensor([[0.0], [100.0]]), torch.ones(2, 1, 1)).sum().backward()
    assert weights.grad is not None
    assert weights.grad[1] == torch.finfo(torch.float32).max


def test_large_and_small_gradients() -> None:
    """Beyond what float32 tiles can hold: they are scaled by a power of two."""
    arguments = parameters(300, 2, 3, "float32")
    log_prob = mixture_log_prob(*arguments)
    ones = torch.autograd.grad(log_prob, arguments, torch.ones_like(log_prob), retain_graph=True)
    for exponent in (-100, 60):
        scaled = torch.autograd.grad(log_prob, arguments, torch.full_like(log_prob, 2.0**exponent), retain_graph=True)
        for one, other in zip(ones, scaled, strict=True):
            torch.testing.assert_close(other * 2.0**-exponent, one, rtol=1e-6, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    arguments = parameters(5000, 3, 4)

    def results(n_threads: int) -> list[Tensor]:
        torch.set_num_threads(n_threads)
        values = [mixture_log_prob(*arguments), mixture_responsibilities(*arguments)]
        return [each for value in values for each in (value, *torch.autograd.grad(value.square().sum(), arguments))]

    for one, two in zip(results(1), results(2), strict=True):
        assert torch.equal(one, two)


@every_operator
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")  # torch's own use of it
def test_no_derivatives_in_forward_mode(operator: Operator) -> None:
    """torch would give zeros."""
    arguments = [each.detach() for each in parameters(4, 2, 3)]
    for i in range(len(arguments)):

        def of(value: Tensor, i: int = i) -> Tensor:
            return operator(*arguments[:i], value, *arguments[i + 1 :])

        with pytest.raises(NotImplementedError, match=r"no derivatives in forward mode .*grad has them backward"):
            torch.func.jvp(of, (arguments[i],), (torch.ones_like(arguments[i]),))


@every_operator
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap(operator: Operator) -> None:
    x, *rest = (each.detach() for each in parameters(4, 2, 3))
    torch.testing.assert_close(torch.func.vmap(lambda row: operator(row, *rest))(x), operator(x, *rest))


@every_operator
def test_no_second_derivatives(operator: Operator) -> None:
    arguments = parameters(5, 2, 2)
    for argument in (arguments[0], arguments[2]):
        (first,) = torch.autograd.grad(operator(*arguments).square().sum(), argument, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"have no second derivatives .*MixtureSameFamily has them"):
            first.sum().backward()


# ---- numbers that are none


def test_nan_row_is_nan_alone() -> None:
    x, *rest = (each.detach() for each in parameters(5, 2, 3))
    x[2, 1] = float("nan")
    assert mixture_log_prob(x, *rest).isnan().tolist() == [False, False, True, False, False]
    assert mixture_responsibilities(x, *rest).isnan().all(1).tolist() == [False, False, True, False, False]


@every_operator
@pytest.mark.parametrize("bad", ["NaN weight", "negative weight", "NaN mean", "singular factor"])
def test_bad_parameters_are_nan_without_warnings(bad: str, operator: Operator) -> None:
    arguments = parameters(3000, 2, 3)
    _, weights, means, lower = arguments
    with torch.no_grad():
        {"NaN weight": weights, "negative weight": weights, "NaN mean": means, "singular factor": lower}[bad].view(-1)[
            0
        ] = {"NaN weight": float("nan"), "negative weight": -9.0, "NaN mean": float("nan"), "singular factor": 0.0}[bad]
    result = operator(*arguments)
    result.sum().backward()
    assert result.isnan().any()


# ---- torch's ways to call an operator


@every_dtype
@pytest.mark.parametrize("name", list(OPERATORS))
def test_opcheck(name: str, dtype: str) -> None:
    torch.library.opcheck(OPERATORS[name], parameters(9, 2, 3, dtype))


@every_operator
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch's compiler causes them
def test_compiles_into_one_graph(backend: str, operator: Operator) -> None:
    def loss(x: Tensor, weights: Tensor, means: Tensor, raw: Tensor) -> Tensor:
        lower = raw.tril(-1) + raw.diagonal(dim1=1, dim2=2).exp().diag_embed()
        return operator(2 * x, weights.softmax(0), means, lower).square().sum()

    arguments = parameters(20, 2, 3)
    torch.compiler.reset()
    found = torch.compile(loss, fullgraph=True, backend=backend)(*arguments)
    expected = loss(*arguments)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, arguments), torch.autograd.grad(expected, arguments), strict=True):
        torch.testing.assert_close(one, other)


@every_operator
def test_autocast_computes_in_float32(operator: Operator) -> None:
    x, weights, means, lower = parameters(50, 2, 3, "float32")
    layer = torch.nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(x)
        assert z.dtype == torch.bfloat16
        found = operator(z, weights, means, lower)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, operator(z.float(), weights, means, lower))
    found.square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32


# ---- bad input


@every_operator
def test_what_does_not_fit_is_named(operator: Operator) -> None:
    x, weights, means, lower = (each.detach() for each in parameters(5, 2, 3))
    with pytest.raises(TypeError, match=r"x is a ndarray; expected a torch tensor"):
        operator(x.numpy(), weights, means, lower)
    with pytest.raises(
        TypeError, match=r"weights is a list; expected a torch tensor, e\.g\. torch\.as_tensor\(weights"
    ):
        operator(x, [0.5, 0.5, 0.5], means, lower)
    with pytest.raises(
        TypeError, match=r"x is a tensor of layout torch\.sparse_coo; expected a dense one: x\.to_dense"
    ):
        operator(x.to_sparse(), weights, means, lower)
    with pytest.raises(ValueError, match=r"x is a single number; expected \(\.\.\., features\)"):
        operator(torch.tensor(1.0), weights, means, lower)
    with pytest.raises(ValueError, match=r"x has shape \(2, 0\); expected \(\.\.\., features\), at least one of them"):
        operator(x.new_zeros(2, 0), weights, means, lower)
    with pytest.raises(TypeError, match=r"x has dtype torch\.bfloat16; expected float32 or float64: x\.float\(\)"):
        operator(x.bfloat16(), weights, means, lower)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64 but means torch\.float32; expected one type"):
        operator(x, weights, means.float(), lower)
    with pytest.raises(ValueError, match=r"x is on cpu but scale_tril on meta; expected one device: scale_tril\.to"):
        operator(x, weights, means, lower.to("meta"))
    with pytest.raises(ValueError, match=r"means has shape \(3, 4\) beside x of 2 features and 3 weights"):
        operator(x, weights, torch.zeros(3, 4, dtype=x.dtype), lower)
    with pytest.raises(ValueError, match=r"weights has shape \(0,\) beside"):
        operator(x, weights[:0], means[:0], lower[:0])
    with pytest.raises(ValueError, match=r"scale_tril has shape \(3, 2\)"):
        operator(x, weights, means, lower[:, 0])
