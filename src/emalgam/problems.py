"""Many sets of samples, however they are given: (B, N, D), a list of arrays, or rows with groups or offsets.

Kernels get them a slice of problems at a time (`Source.slices`), so that nothing here grows with the data: lists are
joined and other types converted a slice at a time, arrays of float32 or float64 are read where they lie.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from emalgam import arrays
from emalgam.validation import check_integer
from emalgam_kernels.batch import Problems

ELEMENTS_OF_A_SLICE: Final = 2**21  # numbers that are joined or converted at once: 16 MB
MODERATE_EXPONENTS: Final = (-500, 500)  # of weights whose sums, of any number of rows, keep their digits
FORMS: Final = (
    "expected an array (B, N, D), a list of arrays (N_b, D), or an array (N, D) with groups (N,) or offsets (B + 1,)"
)


@dataclass(frozen=True, eq=False)
class Source:
    """B problems of D features.

    Attributes
    ----------
    parts : (N, D) array, or list of arrays (N_b, D)
    offsets : (B + 1,) int64
    order : (N,) int64 or None
        As in `emalgam_kernels.batch.Problems`, of an array whose groups are not each in one piece.
    sample_weight : (N,) float64 or None
        In the order of the rows, of lists one after the other.
    groups : (B,) array or None
        The label of each problem.
    shape : tuple of int
        Of results per sample: (B, N) or (N,).
    """

    parts: Any
    offsets: np.ndarray
    order: np.ndarray | None
    sample_weight: np.ndarray | None
    groups: np.ndarray | None
    shape: tuple[int, ...]

    @classmethod
    def of(cls, X: Any, groups: Any = None, offsets: Any = None, sample_weight: Any = None) -> Source:
        """Read where the problems begin and end; the samples themselves are looked at by the kernels.

        Raises
        ------
        ValueError
            For a shape or type that is none of the forms, naming what was received.
        """
        if isinstance(X, list | tuple) and not (X and np.ndim(X[0]) < 2):
            if groups is not None or offsets is not None:
                raise ValueError("X is a list of arrays, which says where problems begin; leave out groups and offsets")
            parts = [_numbers(part, f"X[{b}]") for b, part in enumerate(X)]
            return cls._of_list(parts, sample_weight)
        if isinstance(groups, str) or isinstance(sample_weight, str):
            X, groups, sample_weight = _columns(X, groups, sample_weight)
        x = _numbers(X, "X")
        if x.ndim == 3:
            if groups is not None or offsets is not None:
                raise ValueError(f"X has shape {x.shape}, (B, N, D); leave out groups and offsets, or give (N, D)")
            B, N, D = x.shape
            rows = x.reshape(B * N, D)
            return cls(rows, np.arange(B + 1) * N, None, _weights(sample_weight, (B, N)), None, (B, N))
        if x.ndim != 2 or (groups is None) == (offsets is None):
            given = [name for name, value in (("groups", groups), ("offsets", offsets)) if value is not None]
            raise ValueError(
                f"X has shape {x.shape} with {' and '.join(given) or 'neither groups nor offsets'}; {FORMS}"
            )
        weight = _weights(sample_weight, (len(x),))
        if groups is None:
            return cls(x, _offsets(offsets, len(x)), None, weight, None, (len(x),))
        labels, ends, order = _grouped(groups, len(x))
        return cls(x, ends, order, weight, labels, (len(x),))

    @classmethod
    def _of_list(cls, parts: list[np.ndarray], sample_weight: Any) -> Source:
        shapes = {part.shape[1:] for part in parts}
        if len(shapes) != 1 or any(part.ndim != 2 for part in parts):
            found = sorted({str(part.shape) for part in parts})[:5]
            raise ValueError(f"X is a list of {len(parts)} arrays of shapes {', '.join(found)}; {FORMS}")
        sizes = [len(part) for part in parts]
        weight = None
        if sample_weight is not None:
            alone = not np.iterable(sample_weight)
            if alone or len(sample_weight) != len(parts):
                given = f"is {sample_weight!r}" if alone else f"has length {len(sample_weight)}"
                raise ValueError(f"sample_weight {given}; expected a list of {len(parts)} arrays (N_b,)")
            each = zip(sample_weight, sizes, strict=True)
            weights = [_weights_of(one, (size,), f"sample_weight[{b}]") for b, (one, size) in enumerate(each)]
            weight = np.concatenate(weights)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(parts, offsets, None, weight, None, (int(offsets[-1]),))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each problem, (B,)."""
        return np.diff(self.offsets)

    @property
    def n_features(self) -> int:
        first = self.parts[0] if isinstance(self.parts, list) else self.parts
        return int(first.shape[1])

    def slices(self, most: int) -> Iterator[tuple[slice, slice, Problems]]:
        """Up to `most` problems at a time: which, which samples of all, and what the kernels take.

        Where rows are read in another order, or where they lie, the samples are all of them.
        """
        in_place = not isinstance(self.parts, list) and self.parts.dtype in (np.float32, np.float64)
        first = 0
        while first < len(self):
            rows = int(self.offsets[-1]) if in_place else ELEMENTS_OF_A_SLICE // self.n_features
            last = end_of_slice(self.offsets, first, most, rows)
            chosen = slice(int(self.offsets[first]), int(self.offsets[last]))
            yield slice(first, last), chosen, self._problems(first, last, chosen, in_place)
            first = last

    def _problems(self, first: int, last: int, chosen: slice, in_place: bool) -> Problems:
        offsets, numbers = self.offsets[first : last + 1], np.arange(first, last, dtype=np.uint64)
        if in_place:
            return Problems(self.parts, offsets, self.order, self.sample_weight, numbers)
        rows = self.rows(chosen) if not isinstance(self.parts, list) else None
        x = np.concatenate(self.parts[first:last]) if rows is None else self.parts[rows]
        if x.dtype not in (np.float32, np.float64):
            x = x.astype(np.float64)
        weight = None if self.sample_weight is None else self.sample_weight[chosen if rows is None else rows]
        return Problems(np.ascontiguousarray(x), offsets - offsets[0], None, weight, numbers)

    def rows(self, chosen: slice) -> slice | np.ndarray:
        """Which rows of the caller's array those samples are."""
        return chosen if self.order is None else self.order[chosen]

    def moderated(self) -> tuple[Source, np.ndarray]:
        """The same with the largest weight of each problem within 2^±500, and the powers of two that did it, (B,).

        Beyond, sums would overflow or lose digits. That far from one, weights of another size choose no other number of
        components: either Σ ω log p or the penalty decides alone, to all digits, and the sign of log Σ ω is the same.
        """
        weight = self.sample_weight
        if weight is None or not len(self):
            return self, np.ones(len(self))
        finite = np.where(np.isfinite(weight), weight, 0.0)
        finite = finite if self.order is None else finite[self.order]
        largest = np.maximum.reduceat(np.append(finite, 0.0), self.offsets[:-1])
        exponents = np.frexp(np.where((largest > 0) & (self.sizes > 0), largest, 1.0))[1]
        powers = np.ldexp(1.0, np.clip(exponents, *MODERATE_EXPONENTS) - exponents)
        if (powers == 1).all():
            return self, powers
        factors = np.repeat(powers, self.sizes)
        if self.order is not None:
            factors[self.order] = factors.copy()
        # Negative ones stay as they are, for the kernels to find.
        return replace(self, sample_weight=np.multiply(weight, factors, out=weight.copy(), where=weight > 0)), powers

    def total_weight(self) -> np.ndarray:
        """Σ ω of each problem, (B,): the number of its samples without weights."""
        if self.sample_weight is None:
            return self.sizes.astype(np.float64)
        return self.sums(self.sample_weight if self.order is None else self.sample_weight[self.order])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Σ over each problem of numbers in the order of `offsets`, (B,); each of its own numbers alone."""
        totals = np.add.reduceat(np.append(values, 0.0), self.offsets[:-1]) if len(self) else np.empty(0)
        return np.where(self.sizes > 0, totals, 0.0)


def end_of_slice(offsets: np.ndarray, first: int, most: int, rows: int) -> int:
    """The end of the problems from `first` on that are at most so many and have at most so many rows; one at least.

    >>> end_of_slice(np.array([0, 10, 20, 100, 110]), 0, most=3, rows=50)
    2
    """
    last = int(np.searchsorted(offsets, offsets[first] + rows, side="right")) - 1
    return min(max(last, first + 1), first + most, len(offsets) - 1)


def _columns(X: Any, groups: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
    """The features, groups and weights of a data frame; the latter two may be names of its columns."""
    columns = list(getattr(X, "columns", ()))
    named = [name for name in (groups, sample_weight) if isinstance(name, str)]
    for name in named:
        if columns.count(name) != 1:
            found = f"the columns are {', '.join(map(str, columns))}" if columns else f"X is a {type(X).__name__}"
            raise ValueError(f"there is no column {name!r}; {found}; expected a column of a data frame, or an array")
    groups, sample_weight = (X[each] if isinstance(each, str) else each for each in (groups, sample_weight))
    return X[[column for column in columns if column not in named]], groups, sample_weight


def _numbers(X: Any, name: str) -> np.ndarray:
    """X as an array of real numbers on the host; not copied, but for columns that mark missing values: NaN here."""
    x = arrays.to_numbers(X, name)
    if x.dtype.kind not in "fiub" or x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {x.shape} and dtype {x.dtype}; {FORMS} of real numbers")
    return x


def _weights(sample_weight: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """(N,) float64; what they hold is a matter of each problem's status."""
    return None if sample_weight is None else _weights_of(sample_weight, shape, "sample_weight")


def _weights_of(sample_weight: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    weight = arrays.to_numbers(sample_weight, name)
    if weight.shape != shape or weight.dtype.kind not in "fiub":
        raise ValueError(
            f"{name} has shape {weight.shape} and dtype {weight.dtype}; expected one number per sample: {shape}"
        )
    return weight.astype(np.float64, copy=False).reshape(-1)


def _offsets(offsets: Any, n_samples: int) -> np.ndarray:
    ends = np.asarray(offsets)
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or len(ends) < 1:
        raise ValueError(f"offsets has shape {ends.shape} and dtype {ends.dtype}; expected integers (B + 1,)")
    ends = ends.astype(np.int64)
    if ends[0] != 0 or ends[-1] != n_samples or (np.diff(ends) < 0).any():
        raise ValueError(
            f"offsets go from {ends[0]} to {ends[-1]}{', not always upwards' if (np.diff(ends) < 0).any() else ''}; "
            f"expected numbers that never fall, from 0 to the number of rows, {n_samples}"
        )
    return ends


def _grouped(groups: Any, n_samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The labels in ascending order, where each begins, and the rows in that order (None: they are)."""
    zoned = getattr(getattr(groups, "dtype", None), "tz", None) is not None
    labels = np.asarray(groups, dtype="datetime64[ns]") if zoned else arrays.to_numpy(groups, "groups")
    if labels.shape != (n_samples,):
        raise ValueError(f"groups has shape {labels.shape}; expected one label per row: ({n_samples},)")
    text = {"U": str, "S": bytes}.get(labels.dtype.kind, object)
    if isinstance(groups, list | tuple) and not all(isinstance(label, text) for label in groups):
        check_labels(np.array(groups, dtype=object))  # NumPy has made text of numbers and NaN among text
    check_labels(labels)
    ascending = n_samples == 0 or bool((labels[1:] >= labels[:-1]).all())
    order = None if ascending else np.argsort(labels, kind="stable")
    ordered = labels if order is None else labels[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if n_samples else np.empty(0, int)
    return ordered[begins], np.append(begins, n_samples).astype(np.int64), order


def check_labels(labels: np.ndarray) -> None:
    """ValueError if one is missing or they have no order."""
    if labels.dtype.kind in "cV":
        raise _without_order(labels.dtype)
    if labels.dtype == object:
        missing = np.array([_is_missing(label) for label in labels], bool)
    else:
        missing = np.not_equal(labels, labels)  # NaN and NaT are not what they are
    if missing.any():
        row = int(missing.argmax())
        raise ValueError(f"groups contains {labels[row]} at row {row}; expected a label for each row")
    kinds = sorted({type(label).__name__ for label in labels}) if labels.dtype == object else []
    if len(kinds) > 1:
        raise ValueError(
            f"groups has labels of types {', '.join(kinds)}, which have no common order; expected one type"
        )
    if kinds:
        try:
            operator.lt(labels[0], labels[0])
        except TypeError:
            raise _without_order(kinds[0]) from None


def _without_order(kind: Any) -> ValueError:
    return ValueError(f"groups has labels of type {kind}, which have no order; expected numbers, text or times")


def _is_missing(label: Any) -> bool:
    """None, what is not equal to itself, and pandas's NA, which does not say whether it is."""
    same = label == label  # noqa: PLR0124
    return label is None or not (isinstance(same, bool | np.bool_) and same)


def places_of(known: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Where each label is among those that are known, which may be in any order: the first of equals.

    ValueError naming the first that is not there, with its type and theirs if these differ.

    >>> places_of(np.array(["c", "a", "b"]), np.array(["a", "c"]))
    array([1, 0])
    """
    kinds = [type(label).__name__ for each in (known, labels) for label in each[:1].tolist()]
    order = np.argsort(known, kind="stable")
    try:
        found = np.minimum(np.searchsorted(known, labels, sorter=order), max(len(known) - 1, 0))
        places = order[found] if len(known) else found
        unknown = np.flatnonzero(known[places] != labels) if len(known) else np.arange(len(labels))
    except TypeError:  # they have no common order
        places, unknown = np.arange(0), np.arange(len(labels))
    if len(unknown):
        label = labels[unknown[:1]].tolist()[0]
        types = f"; it is of type {kinds[1]}, and those of the fits are of type {kinds[0]}" if len({*kinds}) > 1 else ""
        raise ValueError(f"groups contains {label!r}, for which there was no fit{types}")
    return places


def repeated(labels: np.ndarray) -> list[Any]:
    """The first label in ascending order that is there twice, in a list; empty if there is none."""
    ordered = np.sort(labels)
    return ordered[1:][ordered[1:] == ordered[:-1]][:1].tolist()


def problem_numbers(numbers: Any, n_problems: int) -> np.ndarray:
    """What takes the place of each problem's index in its random numbers, (B,) uint64: the index by default."""
    if numbers is None:
        return np.arange(n_problems, dtype=np.uint64)
    given = np.asarray(numbers)
    if given.shape != (n_problems,) or given.dtype.kind not in "iu" or (given < 0).any():
        raise ValueError(
            f"numbers has shape {given.shape} and dtype {given.dtype}; expected one integer >= 0 per problem: "
            f"({n_problems},)"
        )
    return given.astype(np.uint64)


def component_counts(n_components: Any, n_problems: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The fewest and most components of each problem, (B,) int64 each, and the most of all.

    Raises
    ------
    ValueError
        Unless it is an integer, B integers, or a range in steps of one.
    """
    if isinstance(n_components, np.ndarray | Sequence) and not isinstance(n_components, range | str):
        counts = np.asarray(n_components)
        if counts.shape != (n_problems,) or counts.dtype.kind not in "iu" or (counts < 1).any():
            raise ValueError(
                f"n_components has shape {counts.shape} and dtype {counts.dtype}; expected an integer >= 1, a range, "
                f"or one integer >= 1 per problem: ({n_problems},)"
            )
        return counts.astype(np.int64), counts.astype(np.int64), int(counts.max(initial=1))
    if not isinstance(n_components, range):
        count = check_integer("n_components", n_components, 1)
        n_components = range(count, count + 1)
    if n_components.step != 1 or len(n_components) == 0 or n_components.start < 1:
        raise ValueError(f"n_components is {n_components}; expected a range of integers >= 1 in steps of one")
    fewest, most = n_components.start, n_components.stop - 1
    return np.full(n_problems, fewest, np.int64), np.full(n_problems, most, np.int64), most
