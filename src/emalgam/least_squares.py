"""Least squares by Householder QR: `ols`.

The normal equations are never formed: they square the condition number κ. The columns are brought near one by powers
of two, and a column is given up only if it is a combination of those before it to the last few bits, whatever its unit.
Where QR alone may leave fewer than eleven digits, the solution and its residuals are refined together, with misfits in
twice the working precision: what comes out is, to nearly all digits, the least-squares solution of the float64 matrix
that was given. Digits that rounding took from that matrix itself (tenth powers, say, or rows multiplied by √ω) are
gone: a relative error of some eps · κ remains.

Letters: B problems, N rows, P columns, R right-hand sides.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from emalgam.blas import one_blas_thread
from emalgam.packing import power_of_two
from emalgam.validation import check_array, check_weight_of

ELEMENTS_AT_ONCE: Final = 2**19
EPS: Final = float(np.finfo(np.float64).eps)
DEPENDENT: Final = 64 * EPS  # relative changes of columns that count as rounding
REFINE_ABOVE: Final = 1e-11  # the relative error of a coefficient that QR alone may leave
REFINEMENTS: Final = 10


@dataclass(frozen=True, eq=False)
class LeastSquares:
    """The result of `ols`. Batch axes (B,) come first, and an axis R for many right-hand sides last.

    Attributes
    ----------
    coefficients : (P,) float64
        β. Zero for a column that depends on those before it.
    rank : int, or (B,) int64
        Columns that do not.
    residual_sum_of_squares : float
        Σ_n ω_n (y_n − x_nᵀβ)².
    residual_degrees_of_freedom : float
        Σ_n ω_n − rank; without weights N − rank. For each problem of a batch.
    standard_errors : (P,) float64
        √(s² [(Σ_n ω_n x_n x_nᵀ)⁻¹]_jj) with s² = residual sum of squares / degrees of freedom. NaN without positive
        degrees of freedom, and for a column that depends on those before it.
    r_squared : float
        1 − residual sum of squares / Σ_n ω_n (y_n − ȳ)². About ȳ if the constant is a column of X or a combination of
        some, else about zero. NaN if y does not vary.
    """

    coefficients: np.ndarray
    rank: int | np.ndarray
    residual_sum_of_squares: float | np.ndarray
    residual_degrees_of_freedom: float | np.ndarray
    standard_errors: np.ndarray
    r_squared: float | np.ndarray


def ols(X: Any, y: Any, *, sample_weight: Any = None) -> LeastSquares:
    """β that minimises Σ_n ω_n (y_n − x_nᵀβ)²: ordinary (weighted) least squares.

    An intercept is a column of ones, which the caller adds: ``np.column_stack([np.ones(len(x)), x])``.

    Parameters
    ----------
    X : (N, P) or (B, N, P) array of real numbers
        One design, or a batch of them. Computed in float64, a few rows at a time.
    y : (N,) or (N, R); for a batch (B, N) or (B, N, R)
        One right-hand side, or R of them.
    sample_weight : (N,) or (B, N) array, optional
        ω_n ≥ 0. Weights count rows, so their sum minus the rank is the degrees of freedom; for weights that only say
        how precise rows are relative to one another, pass ``w / w.mean()``.

    Returns
    -------
    LeastSquares

    Raises
    ------
    ValueError
        For shapes that do not fit, NaN, infinity or negative weights, naming the index.

    Warns
    -----
    numpy.exceptions.RankWarning
        If a column depends on those before it. It has coefficient zero then: this is the basic solution of the other
        columns, not the one of least norm.

    References
    ----------
    Golub & Van Loan (2013), section 5.3; Björck (1967) for the refinement.

    Examples
    --------
    >>> import numpy as np
    >>> line = ols(np.column_stack([np.ones(4), [0, 1, 2, 3]]), [1.0, 3.0, 5.0, 8.0])
    >>> line.coefficients.round(6), line.rank
    (array([0.8, 2.3]), 2)
    >>> round(float(line.residual_sum_of_squares), 6), round(float(line.r_squared), 6)
    (0.3, 0.988785)
    """
    rows, batch, many = _read(X, y, sample_weight)
    B, N, P = rows.x.shape
    R = rows.y.shape[2]
    solution = _Solution.empty(B, P, R)
    step = max(ELEMENTS_AT_ONCE // (N * (P + R)), 1)
    with one_blas_thread():  # more threads are slower on tall, narrow blocks, and round otherwise
        for start in range(0, B, step):
            _solve(rows.take(slice(start, start + step)), start, solution)
    _warn_of_rank(solution.kept, batch)
    lead, each = (B,) if batch else (), (R,) if many else ()
    return LeastSquares(
        solution.coefficients.reshape(*lead, P, *each),
        solution.kept.sum(axis=1) if batch else int(solution.kept.sum()),
        solution.residual_sum_of_squares.reshape(lead + each)[()],
        solution.degrees_of_freedom.reshape(lead)[()],
        solution.standard_errors.reshape(*lead, P, *each),
        solution.r_squared.reshape(lead + each)[()],
    )


# ---- what is solved


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch of problems as they were given, read in blocks of rows as A = √ω X and b = √ω y in a frame.

    x (B, N, P) and y (B, N, R) in any real dtype, `weight` ω (B, N). The frame is made of powers of two that bring the
    largest entries near one: `x_scale` (B, P), `y_scale` (B, R), and `root_scale` (B,) for √ω.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    x_scale: np.ndarray
    y_scale: np.ndarray
    root_scale: np.ndarray
    columns: np.ndarray | None = None

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> Rows:
        """The problems in the frame that suits them."""
        root_scale = power_of_two(np.sqrt(weight.max(axis=1)))
        counts = True if weight.min() > 0 else (weight > 0)[:, :, None]
        return cls(x, y, weight, power_of_two(_largest(x, counts)), power_of_two(_largest(y, counts)), root_scale)

    def take(self, problems: slice | np.ndarray) -> Rows:
        """Some of the problems."""
        if isinstance(problems, np.ndarray) and len(problems) == len(self.x):
            return self  # all of them, not copied
        x, y, weight = self.x[problems], self.y[problems], self.weight[problems]
        return Rows(
            x, y, weight, self.x_scale[problems], self.y_scale[problems], self.root_scale[problems], self.columns
        )

    def with_columns(self, columns: np.ndarray) -> Rows:
        """The problems with some of the columns of X."""
        if len(columns) == self.x.shape[2]:
            return self
        return replace(self, x_scale=self.x_scale[:, columns], columns=columns)

    def with_sides(self, sides: np.ndarray) -> Rows:
        """The problems with some of the right-hand sides."""
        if len(sides) == self.y.shape[2]:
            return self
        return replace(self, y=self.y[:, :, sides], y_scale=self.y_scale[:, sides])

    def root(self, rows: slice = slice(None)) -> np.ndarray:
        """√ω, (B, n)."""
        return np.sqrt(self.weight[:, rows]) * self.root_scale[:, None]

    def blocks(self, width: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Rows, A (B, n, P) and b (B, n, R); so many rows that n · `width` elements a problem are no burden."""
        step = max(ELEMENTS_AT_ONCE // (len(self.x) * width), 1)
        for start in range(0, self.x.shape[1], step):
            rows = slice(start, start + step)
            x = self.x[:, rows] if self.columns is None else self.x[:, rows][:, :, self.columns]
            yield rows, self._weighted(x, self.x_scale, rows), self._weighted(self.y[:, rows], self.y_scale, rows)

    def _weighted(self, values: np.ndarray, scale: np.ndarray, rows: slice) -> np.ndarray:
        """√ω · values in the frame, (B, n, …) float64; zero in rows of weight zero, whatever they hold."""
        root = self.root(rows)[:, :, None]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            weighted = values.astype(np.float64) * scale[:, None] * root
        return weighted if root.all() else np.where(root > 0, weighted, 0.0)


def _largest(values: np.ndarray, counts: Any) -> np.ndarray:
    """max_n |values| over the rows that count, (B, N, n) → (B, n) float64; without a copy of the values."""
    highest = values.max(axis=1, initial=0, where=counts).astype(np.float64)
    return np.maximum(highest, -values.min(axis=1, initial=0, where=counts).astype(np.float64))


@dataclass(frozen=True, eq=False)
class Triangle:
    """A = Q R and what Q makes of b: `upper` R (B, P, P), `projected` Qᵀb (B, P, R), `rest` ‖b − Q Qᵀb‖ (B, R)."""

    upper: np.ndarray
    projected: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, A: np.ndarray, b: np.ndarray) -> Triangle:
        """The factor of rows A (B, n, P), b (B, n, R); rows of zeros stand in where n < P."""
        if A.shape[1] < A.shape[2]:
            missing = ((0, 0), (0, A.shape[2] - A.shape[1]), (0, 0))
            A, b = np.pad(A, missing), np.pad(b, missing)
        q, upper = np.linalg.qr(A)
        projected = q.swapaxes(1, 2) @ b
        return cls(upper, projected, np.linalg.norm(b - q @ projected, axis=1))

    @classmethod
    def of_blocks(cls, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Triangle:
        """The factor of all rows (Demmel et al. 2012): two by two, as a chain would add up its rounding errors."""
        waiting: list[Triangle] = []
        for number, block in enumerate(blocks, 1):
            part, pairs = cls.of(*block), number
            while pairs % 2 == 0:
                part, pairs = waiting.pop().above(part), pairs // 2
            waiting.append(part)
        whole = waiting.pop()
        while waiting:
            whole = waiting.pop().above(whole)
        return whole

    def above(self, other: Triangle) -> Triangle:
        """The factor of these rows with the other's below them."""
        part = Triangle.of(
            np.concatenate([self.upper, other.upper], axis=1), np.concatenate([self.projected, other.projected], axis=1)
        )
        return replace(part, rest=np.hypot(part.rest, np.hypot(self.rest, other.rest)))

    def take(self, problems: np.ndarray, columns: np.ndarray) -> Triangle:
        """The factor of some of the problems and of the columns."""
        part = Triangle.of(self.upper[problems][:, :, columns], self.projected[problems])
        return replace(part, rest=np.hypot(part.rest, self.rest[problems]))


@dataclass(frozen=True, eq=False)
class _Solution:
    """What `LeastSquares` will hold, for every problem and right-hand side; `kept` (B, P) are the columns in use."""

    coefficients: np.ndarray
    kept: np.ndarray
    residual_sum_of_squares: np.ndarray
    degrees_of_freedom: np.ndarray
    standard_errors: np.ndarray
    r_squared: np.ndarray

    @classmethod
    def empty(cls, B: int, P: int, R: int) -> _Solution:
        """Zero coefficients without standard errors: what a dependent column is left with."""
        nan = np.full((B, P, R), np.nan)
        return cls(np.zeros((B, P, R)), np.ones((B, P), bool), np.zeros((B, R)), np.zeros(B), nan, np.zeros((B, R)))


def _read(X: Any, y: Any, sample_weight: Any) -> tuple[Rows, bool, bool]:
    """The problems, whether they are a batch, and whether they have an axis of right-hand sides."""
    x, y = check_array("X", X), check_array("y", y)
    if x.ndim not in {2, 3} or 0 in x.shape:
        hint = " (for one column: X.reshape(-1, 1))" if x.ndim == 1 else ""
        raise ValueError(f"X has shape {x.shape}; expected (samples, columns), or a batch of such{hint}")
    batch, many = x.ndim == 3, y.ndim == x.ndim
    if y.shape[: x.ndim - 1] != x.shape[:-1] or y.ndim - x.ndim not in {-1, 0} or 0 in y.shape:
        raise ValueError(f"y has shape {y.shape}; expected {x.shape[:-1]} for X of shape {x.shape}, or one axis more")
    weight = check_weight_of(sample_weight, x.shape[:-1])
    if not batch:
        x, y, weight = x[None], y[None], weight[None]
    return Rows.of(x, y if many else y[..., None], weight), batch, many


def _warn_of_rank(kept: np.ndarray, batch: bool) -> None:
    """Name the columns that depend on others."""
    deficient = np.flatnonzero(~kept.all(axis=1))
    if len(deficient) == 0:
        return
    first = kept[deficient[0]]
    columns = np.flatnonzero(~first).tolist()
    where = f" in {len(deficient)} problems of the batch; problem {deficient[0]}" if batch else ""
    warnings.warn(
        f"X has dependent columns{where}: rank {first.sum()} of {len(first)}, columns {columns} are combinations of "
        "those before them (or zero). Their coefficients are set to 0; leave these columns out",
        np.exceptions.RankWarning,
        stacklevel=3,
    )


# ---- how it is solved


def _solve(rows: Rows, start: int, solution: _Solution) -> None:
    """Fill in the solution of these problems, the first of which is number `start`."""
    B, _, P = rows.x.shape
    # The constant goes along as one more column, to see whether it is a combination of the others.
    triangle = Triangle.of_blocks(
        (np.concatenate([A, rows.root(where)[:, :, None]], axis=2), b)
        for where, A, b in rows.blocks(P + 1 + rows.y.shape[2])
    )
    independent = _independent(triangle.upper)
    kept, centred = independent[:, :P], ~independent[:, P]
    solution.kept[start : start + B] = kept
    for pattern in np.unique(kept, axis=0):
        problems, columns = np.flatnonzero((kept == pattern).all(axis=1)), np.flatnonzero(pattern)
        some = rows.take(problems).with_columns(columns)
        _fill(solution, problems + start, columns, some, triangle.take(problems, columns), centred[problems])


def _independent(upper: np.ndarray) -> np.ndarray:
    """Columns of R that are no combination of those before them, (B, P) bool.

    Column j is one, a_j = Σ_k c_k a_k, if changes of a few eps in each of the columns would make it one:
    |R_jj| ≤ DEPENDENT · (‖a_j‖ + Σ_k |c_k| ‖a_k‖). With c_k = −R_jj (R⁻¹)_kj this is a sum over a column of R⁻¹.
    """
    length = np.linalg.norm(upper, axis=1)
    diagonal = np.einsum("bjj->bj", upper)
    empty = (diagonal == 0)[:, :, None] * np.eye(upper.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        inverse = np.linalg.solve(upper + empty, np.broadcast_to(np.eye(upper.shape[1]), upper.shape))
        condition = (length[:, None] @ np.abs(inverse))[:, 0]
    kept = (diagonal != 0) & (DEPENDENT * condition < 1)
    for problem in np.flatnonzero(~kept[:, :-1].all(axis=1)):  # the last column decides on no other
        kept[problem] = _independent_in_turn(upper[problem], length[problem])
    return kept


def _independent_in_turn(upper: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The same of one R (P, P), where R⁻¹ says nothing about columns behind a dependent one; (P,) bool."""
    P = len(upper)
    kept = np.zeros(P, bool)
    basis, triangle = np.zeros((P, P)), np.zeros((P, P))
    for j in range(P):
        n = kept.sum()
        # What is orthogonal to the columns kept, by Gram-Schmidt, twice for the sake of orthogonality.
        projected = basis[:, :n].T @ upper[:, j]
        rest = upper[:, j] - basis[:, :n] @ projected
        again = basis[:, :n].T @ rest
        rest, projected = rest - basis[:, :n] @ again, projected + again
        size = np.linalg.norm(rest)
        coefficients = np.linalg.solve(triangle[:n, :n], projected)
        kept[j] = size > DEPENDENT * (length[j] + np.abs(coefficients) @ length[:j][kept[:j]])
        if kept[j]:
            basis[:, n] = rest / size
            triangle[:n, n], triangle[n, n] = projected, size
    return kept


def _fill(
    solution: _Solution,
    problems: np.ndarray,
    columns: np.ndarray,
    rows: Rows,
    triangle: Triangle,
    centred: np.ndarray,
) -> None:
    """Solve for the columns, which are independent, and undo the frame."""
    identity = np.broadcast_to(np.eye(len(columns)), triangle.upper.shape)
    inverse = np.linalg.solve(triangle.upper, identity)
    beta, residual = _coefficients(rows, triangle, inverse)
    freedom = rows.weight.sum(axis=1) - len(columns)
    total = _total(rows, centred)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        unit = rows.x_scale[:, :, None] / rows.y_scale[:, None]
        # s √[(AᵀA)⁻¹]_jj = s ‖row j of R⁻¹‖
        spread = residual / np.sqrt(np.where(freedom > 0, freedom, np.nan))[:, None]
        error = np.linalg.norm(inverse, axis=2)[:, :, None] * spread[:, None] * unit
        solution.coefficients[problems[:, None], columns] = beta * unit
        solution.standard_errors[problems[:, None], columns] = error
        solution.residual_sum_of_squares[problems] = (residual / rows.y_scale / rows.root_scale[:, None]) ** 2
        solution.degrees_of_freedom[problems] = freedom
        solution.r_squared[problems] = 1.0 - (residual / total) ** 2


def _total(rows: Rows, centred: np.ndarray) -> np.ndarray:
    """‖b‖ (B, R), about the mean where `centred` (B,); NaN where nothing varies."""
    y = np.where(rows.weight[:, :, None] > 0, rows.y, 0.0) * rows.y_scale[:, None]
    mass = rows.weight.sum(axis=1)
    share = rows.weight / mass[:, None]
    mean = np.where(centred[:, None], np.einsum("bn,bnr->br", share, y), 0.0)
    norm = np.linalg.norm((y - mean[:, None]) * rows.root()[:, :, None], axis=1)
    rounding = 4 * EPS * np.abs(mean) * np.linalg.norm(rows.root(), axis=1)[:, None]
    return np.where(norm > rounding, norm, np.nan)


def _coefficients(rows: Rows, triangle: Triangle, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """β (B, P, R) and ‖b − Aβ‖ (B, R); refined where QR alone may leave too few digits."""
    beta, residual = np.linalg.solve(triangle.upper, triangle.projected), triangle.rest
    # QR solves for columns a_k that are wrong by eps ‖a_k‖, which moves β_j by about
    #     eps ‖row j of R⁻¹‖ (‖b‖ + Σ_k ‖a_k‖ |β_k| + ‖r‖ √Σ_k ‖a_k‖² ‖row k of R⁻¹‖²)
    length, row = np.linalg.norm(triangle.upper, axis=1), np.linalg.norm(inverse, axis=2)
    terms = np.linalg.norm(triangle.projected, axis=1) + (length[:, :, None] * np.abs(beta)).sum(axis=1)
    terms += residual * np.linalg.norm(length * row, axis=1)[:, None]
    exact = EPS * row[:, :, None] * terms[:, None] <= REFINE_ABOVE * np.abs(beta)
    inexact = ~exact.all(axis=1)
    if inexact.any():
        problems, sides = np.flatnonzero(inexact.any(axis=1)), np.flatnonzero(inexact.any(axis=0))
        some, where = rows.take(problems).with_sides(sides), (problems[:, None], sides)
        every = (problems[:, None], slice(None), sides)  # (n, R, P): the axis of a slice comes last
        beta[every], residual[where] = _refine(some, length[problems], inverse[problems], beta[every], residual[where])
    return beta, residual


# ---- refinement


def _refine(
    rows: Rows, length: np.ndarray, inverse: np.ndarray, beta: np.ndarray, residual: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """β (B, R, P) and ‖r‖ (B, R), refined together as the solution of r + Aβ = b, Aᵀr = 0 (Björck 1967).

    Each step gains about −log₁₀(eps · κ) digits; steps that do not halve the correction are not taken, and without any
    β and ‖r‖ are returned as they are. Here right-hand sides come before columns and rows: r is (B, R, N).
    """
    r = _misfit(rows, inverse, beta, np.zeros((*beta.shape[:2], rows.x.shape[1])))[0]
    size = np.linalg.norm(length[:, None] * beta, axis=2)
    last, taken = size, np.zeros(size.shape, bool)
    for _ in range(REFINEMENTS):
        f, d = _misfit(rows, inverse, beta, r)
        step = d @ inverse.swapaxes(1, 2)
        change = np.linalg.norm(length[:, None] * step, axis=2)
        better = change < 0.5 * last
        if not better.any():
            break
        beta = np.where(better[:, :, None], beta + step, beta)
        r = np.where(better[:, :, None], r + _outside(rows, inverse, f, d), r)
        last = np.where(better & (change > EPS * size), change, 0.0)
        taken |= better
    return beta, np.where(taken, np.linalg.norm(r, axis=2), residual)


def _misfit(rows: Rows, inverse: np.ndarray, beta: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the two equations lack: f = b − r − Aβ (B, R, N), and d = Qᵀf + R⁻ᵀAᵀr (B, R, P) for the step R⁻¹d."""
    f, d = np.empty_like(r), np.zeros_like(beta)
    high, low = np.zeros_like(beta), np.zeros_like(beta)
    for where, A, b in rows.blocks(16 * beta.shape[1] * beta.shape[2]):  # fewer rows, for the processor's cache
        fit, fit_low = _accurate_dot(A.swapaxes(1, 2)[:, None], beta[:, :, :, None])
        rest, first = _two_sum(b.swapaxes(1, 2), -fit)
        rest, second = _two_sum(rest, -r[:, :, where])
        f[:, :, where] = rest + (first + second - fit_low)
        d += f[:, :, where] @ (A @ inverse)
        part, part_low = _accurate_dot(A[:, None], r[:, :, where, None])
        high, error = _two_sum(high, part)
        low += part_low + error
    return f, d + (high + low) @ inverse


def _outside(rows: Rows, inverse: np.ndarray, f: np.ndarray, d: np.ndarray) -> np.ndarray:
    """f − Q d, (B, R, N)."""
    rest = np.empty_like(f)
    for where, A, _ in rows.blocks(inverse.shape[1]):
        rest[:, :, where] = f[:, :, where] - d @ (A @ inverse).swapaxes(1, 2)
    return rest


def _accurate_dot(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Σ a b along axis −2 as a pair high + low, in twice the working precision: Ogita, Rump & Oishi (2005)."""
    high, low = _two_product(a, b)
    while (n := high.shape[-2]) > 1:
        first, second, odd = slice(n // 2), slice(n // 2, n // 2 * 2), slice(n // 2 * 2, n)
        total, error = _two_sum(high[..., first, :], high[..., second, :])
        error += low[..., first, :] + low[..., second, :]
        high = np.concatenate([total, high[..., odd, :]], axis=-2)
        low = np.concatenate([error, low[..., odd, :]], axis=-2)
    return high[..., 0, :], low[..., 0, :]


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b and its rounding error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a b and its rounding error (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a as a sum of two numbers with half the bits."""
    large = 134217729.0 * a  # 2²⁷ + 1
    high = large - (large - a)
    return high, a - high
