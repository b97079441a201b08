"""Curves: of a fit, of a parameter's likelihood, of a criterion, of the losses of a training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from emalgam.plot.style import INK, OKABE_ITO, component_colors, pyplot_module, tidy, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def likelihood_trace(trace: Any, ax: Axes | None = None) -> Axes:
    """The mean log-likelihood after each iteration of a fit.

    Parameters
    ----------
    trace : Fit, fitted GaussianMixture, or sequence of float
        Something with `lower_bounds` or `lower_bounds_`, or the numbers themselves, in nats per sample.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there are no numbers.
    """
    pyplot = pyplot_module()
    values = np.asarray(getattr(trace, "lower_bounds", getattr(trace, "lower_bounds_", trace)), np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"the trace has shape {values.shape}; expected one number for each iteration")
    ax = pyplot.subplots()[1] if ax is None else ax
    iterations = np.arange(1, len(values) + 1)
    ax.plot(iterations, values, color=OKABE_ITO[0], marker="o", markersize=3, linewidth=1.5)
    final = f"{values[-1]:.6g}".replace("-", "\N{MINUS SIGN}")
    ax.text(
        0.98, 0.04, f"{final} at the end", transform=ax.transAxes, ha="right", color=INK
    )  # a rising curve is never there
    ax.set(xlabel="iteration", ylabel="log-likelihood (nats per sample)")
    whole_numbers(ax)
    tidy(ax)
    return ax


def likelihood_curve(
    theta: Any, log_likelihood: Any, ax: Axes | None = None, *, log: bool = False, name: str = "θ"
) -> Axes:
    """The likelihood of the data as a function of a parameter, with its largest value marked.

    Parameters
    ----------
    theta : (M,) array of real numbers
        The grid of the parameter, in any order.
    log_likelihood : (M,) array of real numbers
        log p(data given θ) at the grid, in nats; −inf where the data cannot happen.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    log : bool
        Whether to draw the logarithm, for likelihoods that are too small for float64.
    name : str
        Of the parameter, for the labels.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If the arrays are not one-dimensional and of one length, hold NaN or +inf, or nothing can be drawn: the data
        cannot happen at any θ, or float64 cannot hold their likelihood and `log` is not set.

    Examples
    --------
    Three heads and two tails, in this order:

    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> import numpy as np
    >>> from emalgam import plot
    >>> from emalgam.estimation import bernoulli_log_likelihood
    >>> theta = np.linspace(0, 1, 101)
    >>> ax = plot.likelihood_curve(theta, bernoulli_log_likelihood(theta, [1, 1, 1, 0, 0]))
    >>> ax.texts[0].get_text()
    'largest, 0.03456, at θ = 0.6'
    """
    pyplot = pyplot_module()
    grid, values = _curve(theta, log_likelihood, log)
    ax = pyplot.subplots()[1] if ax is None else ax
    best = int(np.nanargmax(values))
    ax.plot(grid, values, color=OKABE_ITO[0], linewidth=1.5)
    ax.plot(grid[best], values[best], "o", color=OKABE_ITO[1], markersize=7)
    text = f"largest, {values[best]:.4g}, at {name} = {grid[best]:.4g}".replace("-", "\N{MINUS SIGN}")
    highest = (float(grid[best]), float(values[best]))  # above it nothing is drawn
    along = (grid[best] - grid[0]) / max(grid[-1] - grid[0], np.finfo(np.float64).tiny)
    side = "left" if along < 0.25 else "right" if along > 0.75 else "center"  # not beyond the edge of the picture
    ax.annotate(text, highest, xytext=(0, 8), textcoords="offset points", ha=side, color=INK)
    ax.margins(y=0.12)
    ax.set(xlabel=name, ylabel="log-likelihood (nats)" if log else "likelihood")
    tidy(ax)
    return ax


def _curve(theta: Any, log_likelihood: Any, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """The grid in ascending order, and what to draw over it: NaN where the logarithm is −inf."""
    grid, values = np.asarray(theta, np.float64), np.asarray(log_likelihood, np.float64)
    if grid.ndim != 1 or len(grid) == 0 or values.shape != grid.shape:
        raise ValueError(f"theta has shape {grid.shape} and log_likelihood {values.shape}; expected the same (M,)")
    if not np.isfinite(grid).all() or np.isnan(values).any() or np.isposinf(values).any():
        raise ValueError("theta or log_likelihood contains NaN or inf; expected numbers, of the likelihood also −inf")
    if np.isneginf(values).all():
        raise ValueError("log_likelihood is −inf everywhere: the data cannot happen at any theta of the grid")
    order = np.argsort(grid, kind="stable")
    with np.errstate(under="ignore", over="ignore"):
        drawn = np.where(np.isneginf(values), np.nan, values) if log else np.exp(values)
    if not log and not 0 < drawn.max() < np.inf:
        raise ValueError(f"float64 cannot hold the likelihood exp({values.max():.6g}); draw the logarithm: log=True")
    return grid[order], drawn[order]


def bic_curve(
    x: Any, n_components_range: Iterable[int], ax: Axes | None = None, **fit_arguments: Any
) -> tuple[Axes, np.ndarray]:
    """Fit a mixture for each number of components and draw Schwarz's criterion over it; the lowest is marked.

    Parameters
    ----------
    x : (N, D) array of real numbers
        The data.
    n_components_range : iterable of int
        The numbers of components K to try.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    **fit_arguments
        Any argument of `emalgam.fit` but sample weights, the same for every K.

    Returns
    -------
    ax : matplotlib Axes
    values : (len(n_components_range),) float64
        −2 Σ log p + parameters · log N, in nats, in the order of `n_components_range`.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there is no K to try, sample weights are given, or `emalgam.fit` refuses the data or an argument.

    References
    ----------
    Schwarz (1978), Estimating the dimension of a model.
    """
    from emalgam.em import fit

    pyplot = pyplot_module()
    candidates = list(n_components_range)
    if not candidates:
        raise ValueError("n_components_range is empty; expected numbers of components, such as range(1, 11)")
    if fit_arguments.get("sample_weight") is not None:
        raise ValueError("BIC counts samples and has no place for sample_weight; leave it out")
    how = {key: fit_arguments[key] for key in ("backend", "algorithm", "n_threads") if key in fit_arguments}
    values = np.array([fit(x, K, **fit_arguments).mixture.bic(x, **how) for K in candidates])
    ax = pyplot.subplots()[1] if ax is None else ax
    best = int(values.argmin())
    order = np.argsort(candidates)
    ax.plot(np.take(candidates, order), values[order], color=OKABE_ITO[0], marker="o", markersize=4, linewidth=1.5)
    ax.plot(candidates[best], values[best], "o", color=OKABE_ITO[1], markersize=9)
    text = f"lowest at K = {candidates[best]}"
    lowest = (candidates[best], float(values[best]))  # below it nothing is drawn
    ax.annotate(text, lowest, xytext=(0, -18), textcoords="offset points", ha="center", color=INK)
    ax.margins(y=0.15)
    ax.set(xlabel="number of components K", ylabel="BIC (nats)")
    whole_numbers(ax)
    tidy(ax)
    return ax, values


def losses(history: Any, ax: Axes | None = None, *, names: str | Iterable[str] = ("loss",)) -> Axes:
    """The losses after each epoch of a training, those of the validation data dashed; the lowest of these is marked.

    Parameters
    ----------
    history : History or mapping
        What `emalgam.nn.train` returns: (epochs,) numbers under each name, those of the validation data under
        ``validation_`` and the name.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    names : str or iterable of str
        Which to draw, such as ("reconstruction", "kl") of a VAE.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If the history has no such losses, or no epoch, or `names` is empty.

    Examples
    --------
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> from emalgam import plot
    >>> ax = plot.losses({"loss": [3.0, 2.0, 1.5], "validation_loss": [3.1, 2.2, 2.4]})
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['loss', 'validation loss', 'lowest 2.2, epoch 2']
    """
    pyplot = pyplot_module()
    curves = [(name, *_curves_of(history, name)) for name in ((names,) if isinstance(names, str) else names)]
    if not curves:
        raise ValueError(f"names is empty; the history has {', '.join(map(repr, history))}")
    ax = pyplot.subplots(layout="constrained")[1] if ax is None else ax
    for color, (name, trained, validated) in zip(component_colors(len(curves)), curves, strict=True):
        label = name.replace("_", " ")
        marker = "o" if len(trained) == 1 else None  # no line has one end only
        look = {"color": color, "linewidth": 1.5, "marker": marker}
        ax.plot(np.arange(1, len(trained) + 1), trained, **look, label=label)
        if validated is None or np.isnan(validated).all():
            continue
        epochs = np.flatnonzero(~np.isnan(validated))  # it may be looked at every few epochs only
        ax.plot(epochs + 1, validated[epochs], **look, linestyle="--", label=f"validation {label}")
        if len(curves) == 1:
            _mark_lowest(ax, validated)
    ax.set(xlabel="epoch", ylabel=curves[0][0].replace("_", " ") if len(curves) == 1 else "loss")
    ax.legend(frameon=False)
    whole_numbers(ax)
    tidy(ax)
    return ax


def _curves_of(history: Any, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A loss of the training data and, if it is there, of the validation data."""
    if name not in history:
        raise ValueError(f"the history has no {name!r}; there are {', '.join(map(repr, history))}")
    trained = np.asarray(history[name], np.float64)
    if trained.ndim != 1 or len(trained) == 0:
        raise ValueError(f"{name!r} of the history has shape {trained.shape}; expected one number for each epoch")
    validation = f"validation_{name}"
    return trained, np.asarray(history[validation], np.float64) if validation in history else None


def _mark_lowest(ax: Axes, values: np.ndarray) -> None:
    """In the legend, as a text beside it would lie on the curves."""
    best = int(np.nanargmin(values))
    text = f"lowest {values[best]:.4g}, epoch {best + 1}".replace("-", "\N{MINUS SIGN}")
    ax.plot(best + 1, values[best], "o", color=OKABE_ITO[1], markersize=7, label=text)
