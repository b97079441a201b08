"""Stacks of mixtures: those of one covariance type and one number of components as arrays, without an object each.

Letters: B mixtures of a stack, K components, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from emalgam.covariance import COVARIANCES
from emalgam.gaussian import Gaussian, as_mixture
from emalgam.mixture import Mixture, MixtureAlgebra, check_numbers, check_symmetric, check_weights
from emalgam.packing import Components, Frame


@dataclass(frozen=True, eq=False)
class MixtureStack(MixtureAlgebra):
    """B mixtures of one type and one K: the arrays of `Mixture` with an axis B in front."""

    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray
    precisions_cholesky: np.ndarray
    covariance_type: str

    def __len__(self) -> int:
        return len(self.weights)

    @classmethod
    def of(cls, mixtures: list[Mixture]) -> MixtureStack:
        """Mixtures that have one type and one K."""
        names = "weights", "means", "covariances", "precisions_cholesky"
        weights, means, covariances, P = (np.stack([getattr(each, name) for each in mixtures]) for name in names)
        return cls(weights, means, covariances, P, mixtures[0].covariance_type)

    @classmethod
    def checked(cls, name: str, rows: np.ndarray, kind: str, *parts: np.ndarray) -> MixtureStack:
        """Of weights, means and covariances, checked as those of a `Mixture` are: `rows` of argument `name`."""
        covariance = COVARIANCES[kind]
        try:
            weights, means, covariances = map(check_numbers, ("weights", "means", "covariances"), parts)
            check_symmetric("covariances", covariance, covariances)
            return cls(check_weights(weights), means, covariances, covariance.factor(covariances), kind)
        except (ValueError, np.linalg.LinAlgError):
            for row, *own in zip(rows.tolist(), *parts, strict=True):
                weights, means, covariances = own
                try:
                    Mixture(weights, means, covariances, kind)
                except ValueError as error:
                    raise ValueError(f"{name}[{row}]: {error}") from None
            raise

    def take(self, rows: Any) -> MixtureStack:
        """Some of the mixtures."""
        weights, means, covariances = self.weights[rows], self.means[rows], self.covariances[rows]
        return MixtureStack(weights, means, covariances, self.precisions_cholesky[rows], self.covariance_type)

    def mixture(self, b: int) -> Mixture:
        """One of the mixtures."""
        one = self.take(b)
        components = Components(one.weights, one.means, one.covariances, one.precisions_cholesky)
        return Mixture.from_components(components, Frame.identity(self.n_features), self.covariance)


@dataclass(frozen=True, slots=True, eq=False)
class Stacks:
    """What a user gave: mixtures of any types and numbers of components.

    Attributes
    ----------
    shape : tuple of int
        () for one mixture.
    groups : list of (rows, MixtureStack)
        Which of the mixtures, flattened, are in each stack: each is in one.
    """

    shape: tuple[int, ...]
    groups: list[tuple[np.ndarray, MixtureStack]]

    def __len__(self) -> int:
        return math.prod(self.shape)

    @property
    def n_features(self) -> int:
        return self.groups[0][1].n_features

    @property
    def most_components(self) -> int:
        """The largest K."""
        return max(stack.n_components for _, stack in self.groups)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The stack that each mixture is in, and its place there."""
        group, place = np.empty(len(self), np.int64), np.empty(len(self), np.int64)
        for number, (rows, _) in enumerate(self.groups):
            group[rows], place[rows] = number, np.arange(len(rows))
        return group, place


def as_stacks(name: str, value: Any) -> Stacks:
    """A mixture, a sequence of them, a stack of Gaussians or the result of many fits; ValueError for anything else."""
    shape: tuple[int, ...]
    if is_many_fits(value):
        shape, groups = (len(value),), value._mixture_stacks(name)
    elif isinstance(value, Gaussian) and value.batch_shape:
        rows = np.arange(math.prod(value.batch_shape))
        shape, groups = value.batch_shape, [(rows, stack_of_gaussians(value, name))]
    elif isinstance(value, Iterable) and not isinstance(value, str):
        members = [as_mixture(f"{name}[{i}]", each) for i, each in enumerate(value)]
        shape, groups = (len(members),), _grouped(members)
    else:
        shape, groups = (), _grouped([as_mixture(name, value)])
    if 0 in shape:
        raise ValueError(f"{name} is empty; expected at least one mixture")
    return Stacks(shape, groups)


def is_many_fits(value: Any) -> bool:
    """Whether `value` is the result of many fits; not by its type, as their module imports this one."""
    return callable(getattr(value, "_mixture_stacks", None))


def _grouped(mixtures: list[Mixture]) -> list[tuple[np.ndarray, MixtureStack]]:
    """Mixtures as stacks of those that are alike."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, mixture in enumerate(mixtures):
        alike.setdefault((mixture.covariance_type, *mixture.means.shape), []).append(i)
    return [(np.array(rows), MixtureStack.of([mixtures[i] for i in rows])) for rows in alike.values()]


def stack_of_gaussians(gaussian: Gaussian, name: str) -> MixtureStack:
    """A stack of Gaussians, argument `name`, as mixtures of one component."""
    D, kind = gaussian.n_features, gaussian.covariance_type
    means = gaussian.mean.reshape(-1, 1, D)
    covariances = gaussian.covariance.reshape(-1, *COVARIANCES[kind].shape(1, D))
    return MixtureStack.checked(name, np.arange(len(means)), kind, np.ones((len(means), 1)), means, covariances)


def both_as_stacks(p: Any, q: Any) -> tuple[Stacks, Stacks]:
    """Two arguments that users give; ValueError if their numbers of features differ."""
    stacks = as_stacks("p", p), as_stacks("q", q)
    check_same_features(p=stacks[0], q=stacks[1])
    return stacks


def check_same_features(**stacks: Stacks) -> None:
    """ValueError naming the first mixture whose number of features differs from the first one's."""
    (first, reference), *_ = stacks.items()
    (expected,) = {stack.n_features for rows, stack in reference.groups if rows[0] == 0}
    for name, given in stacks.items():
        wrong = [(int(rows[0]), stack.n_features) for rows, stack in given.groups if stack.n_features != expected]
        if wrong:
            row, found = min(wrong)
            which = f"{name}[{row}]" if given.shape else name
            raise ValueError(f"{which} has {found} features; {first} has {expected}")
