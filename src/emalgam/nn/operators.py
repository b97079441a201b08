"""emalgam's kernels as torch operators: log-densities and responsibilities of a mixture, with gradients.

``emalgam::mixture_log_prob`` and ``emalgam::mixture_responsibilities`` run the kernels of `emalgam.backends` on the
tensors' own memory, on the CPU with torch's number of threads and on a GPU on the caller's stream. They have first
derivatives in x, weights, means and Cholesky factors (`emalgam.nn.gradients`), no second ones; `torch.compile` takes
them as they are; under autocast they compute in float32. torch.func.grad and jacrev raise, as torch has them not for
operators written in Python: `torch.autograd.grad` of the sum over rows gives each row's gradient. So do derivatives in
forward mode (torch.func.jvp and jacfwd). torch.func.vmap takes rows one by one.

On a GPU the parameters are brought to the host, where their factors are inverted: one wait for the device in each
call. That path is checked in Numba's simulator; it has not yet run on a GPU.

Letters: N rows, D features, K components.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from emalgam import arrays
from emalgam.nn.gradients import Evaluation, ParameterGradients
from emalgam.nn.tensors import as_rows, check_alike, check_tensor

DTYPES: Final = (torch.float32, torch.float64)
# Parameters and results may cross to the host, which a captured graph of kernels would not repeat.
TAGS: Final = (torch.Tag.cudagraph_unsafe,)


def mixture_log_prob(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    """log p(x) = log Σ_k w_k N(x; μ_k, L_k L_kᵀ), differentiable in all arguments.

    Parameters
    ----------
    x : (..., D) float32 or float64
    weights : (K,)
        w_k ≥ 0; they need not sum to one. The gradient is that of each by itself, Σ_n g_n r_nk / w_k.
    means : (K, D)
    scale_tril : (K, D, D)
        L_k with a positive diagonal. The upper triangle is not read, and has no gradient.

    Returns
    -------
    (...) of the type of x
        In nats, as accurate as `emalgam.Mixture.log_prob`. NaN if a number is not finite, a weight negative or the
        diagonal of a factor not positive.

    Raises
    ------
    ValueError, TypeError
        For shapes, dtypes or devices that do not go together.
    NotImplementedError
        For second derivatives, and for derivatives in forward mode.

    References
    ----------
    The backward pass: `emalgam.nn.gradients`.

    Examples
    --------
    >>> means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    >>> half, unit = torch.full((2,), 0.5, dtype=torch.float64), torch.ones(2, 1, 1, dtype=torch.float64)
    >>> log_p = mixture_log_prob(torch.zeros(1, dtype=torch.float64), half, means, unit)
    >>> round(log_p.item(), 6)
    -1.418939
    >>> log_p.backward()
    >>> means.grad.tolist()
    [[0.5], [-0.5]]
    """
    _check_arguments(x=x, weights=weights, means=means, scale_tril=scale_tril)
    rows: Tensor = _log_prob(as_rows("x", x), weights, means, scale_tril)
    return rows.reshape(x.shape[:-1])


def mixture_responsibilities(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    """r_k(x) = w_k N(x; μ_k, L_k L_kᵀ) / p(x), (..., K), differentiable in all arguments; see `mixture_log_prob`.

    Examples
    --------
    >>> unit = torch.ones(2, 1, 1)
    >>> mixture_responsibilities(torch.zeros(3, 1), torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), unit)
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    _check_arguments(x=x, weights=weights, means=means, scale_tril=scale_tril)
    rows: Tensor = _responsibilities(as_rows("x", x), weights, means, scale_tril)
    return rows.reshape(*x.shape[:-1], weights.shape[0])


def _check_arguments(**given: Tensor) -> None:
    """Dense tensors without a tangent: torch takes operators that have no rule for forward mode as constants."""
    for name, each in given.items():
        check_tensor(name, each)
        if each.layout != torch.strided:
            raise TypeError(f"{name} is a tensor of layout {each.layout}; expected a dense one: {name}.to_dense()")
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(each).tangent is not None:
            raise NotImplementedError(
                "emalgam's mixture operators have no derivatives in forward mode (jvp, jacfwd); "
                "torch.autograd.grad has them backward"
            )


# ---- log-densities


@torch.library.custom_op("emalgam::mixture_log_prob", mutates_args=(), tags=TAGS)
def _log_prob(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    return _like(_evaluation(x, weights, means, scale_tril).log_prob(), x)


@_log_prob.register_fake
def _(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    _check(x, weights, means, scale_tril)
    return x.new_empty(x.shape[:1])


@torch.library.custom_op("emalgam::mixture_log_prob_input_gradient", mutates_args=(), tags=TAGS)
def _input_gradient(gradient: Tensor, x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    return _like(_evaluation(x, weights, means, scale_tril).input_gradient(gradient.detach()), x)


@_input_gradient.register_fake
def _(gradient: Tensor, x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("emalgam::mixture_log_prob_parameter_gradients", mutates_args=(), tags=TAGS)
def _parameter_gradients(
    gradient: Tensor, log_prob: Tensor, x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    run = _evaluation(x, weights, means, scale_tril)
    return _parameters_like(run.parameter_gradients(gradient.detach(), log_prob.detach()), x)


@_parameter_gradients.register_fake
def _(
    gradient: Tensor, log_prob: Tensor, x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(weights.shape), means.new_empty(means.shape), scale_tril.new_empty(scale_tril.shape)


def _save_log_prob(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _log_prob_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, log_prob = ctx.saved_tensors
    of_x, *of_parameters = ctx.needs_input_grad
    return (
        _input_gradient(gradient, *inputs) if of_x else None,
        *(_parameter_gradients(gradient, log_prob, *inputs) if any(of_parameters) else (None,) * 3),
    )


# ---- responsibilities


@torch.library.custom_op("emalgam::mixture_responsibilities", mutates_args=(), tags=TAGS)
def _responsibilities(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    return _like(_evaluation(x, weights, means, scale_tril).responsibilities(), x)


@_responsibilities.register_fake
def _(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Tensor:
    _check(x, weights, means, scale_tril)
    return x.new_empty(x.shape[0], weights.shape[0])


@torch.library.custom_op("emalgam::mixture_responsibilities_gradients", mutates_args=(), tags=TAGS)
def _responsibility_gradients(
    gradient: Tensor, x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = _evaluation(x, weights, means, scale_tril)
    of_x, of_parameters = run.responsibility_gradients(gradient.detach())
    return _like(of_x, x), *_parameters_like(of_parameters, x)


@_responsibility_gradients.register_fake
def _(
    gradient: Tensor, x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second, third, fourth = (each.new_empty(each.shape) for each in (x, weights, means, scale_tril))
    return first, second, third, fourth


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _responsibilities_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _responsibility_gradients(gradient, *ctx.saved_tensors)
    return gradients


# ---- what all of them share


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "emalgam's mixture operators have no second derivatives (create_graph=True was asked for); "
        "torch.distributions.MixtureSameFamily has them, in more time and memory"
    )


_log_prob.register_autograd(_log_prob_backward, setup_context=_save_log_prob)
_responsibilities.register_autograd(_responsibilities_backward, setup_context=_save_inputs)
for _operator in (_input_gradient, _parameter_gradients, _responsibility_gradients):
    _operator.register_autograd(_no_second_derivative)
for _device in ("cpu", "cuda"):
    _log_prob.register_autocast(_device, torch.float32)
    _responsibilities.register_autocast(_device, torch.float32)


def _evaluation(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> Evaluation:
    _check(x, weights, means, scale_tril)
    parameters = weights.detach(), means.detach(), scale_tril.detach()
    return Evaluation(x.detach(), *parameters, n_threads=torch.get_num_threads())


def _check(x: Tensor, weights: Tensor, means: Tensor, scale_tril: Tensor) -> None:
    """Shapes, dtypes and devices; ValueError or TypeError naming what does not fit."""
    given = {"x": x, "weights": weights, "means": means, "scale_tril": scale_tril}
    for name, each in given.items():
        if each.dtype not in DTYPES:
            raise TypeError(
                f"{name} has dtype {each.dtype}; expected float32 or float64: {name}.float(), or torch.autocast"
            )
    check_alike(**given)
    K, D = weights.shape[-1] if weights.ndim else 0, x.shape[-1]
    for name, shape in {"weights": (K,), "means": (K, D), "scale_tril": (K, D, D)}.items():
        if tuple(given[name].shape) != shape or 0 in shape:
            raise ValueError(
                f"{name} has shape {tuple(given[name].shape)} beside x of {D} features and {K} weights; "
                "expected weights (K,), means (K, D), scale_tril (K, D, D)"
            )


def _like(values: Any, x: Tensor) -> Tensor:
    """`values` as a tensor of the type of x beside it."""
    tensor: Tensor = arrays.like(values, x)
    return tensor.to(dtype=x.dtype, device=x.device)


def _parameters_like(gradients: ParameterGradients, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as tensors; what overflows the type of x is its largest number."""
    largest = torch.finfo(x.dtype).max
    first, second, third = (_like(each.clip(-largest, largest), x) for each in gradients)
    return first, second, third
