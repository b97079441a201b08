"""What the sampling kernels are given: the mixture, and the key of the random numbers."""

from __future__ import annotations

import numbers
from typing import Any, Final

import numpy as np

from emalgam.mixture import MixtureAlgebra
from emalgam.namespace import invert_triangular
from emalgam.validation import generator
from emalgam_kernels.parameters import Sampler

LARGEST_SEED: Final = 2**64 - 1


def sampler_of(mixture: MixtureAlgebra, n_total: int = 0) -> Sampler:
    """What the sampling kernels need to know about a mixture, or a stack of them.

    `n_total` as in `emalgam_kernels.parameters.Sampler`.
    """
    covariance, P = mixture.covariance, mixture.precisions_cholesky
    sizes = mixture.n_components, mixture.n_features
    if covariance.direct_map == "full":
        factors = covariance.matrices(np.ascontiguousarray(invert_triangular(P.swapaxes(-1, -2))), *sizes)
    else:
        factors = np.ascontiguousarray(covariance.diagonals(1.0 / P, *sizes))
    return Sampler(np.ascontiguousarray(mixture.means), factors, mixture.weights, n_total)


def philox_seed(random_state: Any) -> int:
    """The key of the random numbers: an integer from 0 to 2⁶⁴ − 1 as it is, anything else draws one."""
    if isinstance(random_state, numbers.Integral) and not isinstance(random_state, bool):
        seed = int(random_state)
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"random_state is {seed}; expected an integer from 0 to 2**64 - 1")
        return seed
    return int(generator(random_state).integers(0, LARGEST_SEED, dtype=np.uint64, endpoint=True))
