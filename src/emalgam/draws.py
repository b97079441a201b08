"""What the sampling kernels are given: the mixture, and the key of the random numbers."""

from __future__ import annotations

import numbers
from typing import Any, Final

import numpy as np

from emalgam.mixture import Mixture
from emalgam.namespace import invert_triangular
from emalgam.validation import generator
from emalgam_kernels.parameters import Sampler

LARGEST_SEED: Final = 2**64 - 1


def sampler_of(mixture: Mixture, n_total: int = 0) -> Sampler:
    """What the sampling kernels need to know about a mixture; `n_total` as in `emalgam_kernels.parameters.Sampler`."""
    K, D = mixture.means.shape
    P = mixture.precisions_cholesky
    if mixture.covariance.direct_map == "full":
        lower = np.ascontiguousarray(invert_triangular(P.reshape(-1, D, D).swapaxes(1, 2)))
        factors = np.broadcast_to(lower, (K, D, D))
    else:
        deviations = 1.0 / P
        factors = np.ascontiguousarray(np.broadcast_to(deviations.reshape(K, -1), (K, D)))
    return Sampler(np.ascontiguousarray(mixture.means), factors, mixture.weights, n_total)


def philox_seed(random_state: Any) -> int:
    """The key of the random numbers: an integer from 0 to 2⁶⁴ − 1 as it is, anything else draws one."""
    if isinstance(random_state, numbers.Integral) and not isinstance(random_state, bool):
        seed = int(random_state)
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"random_state is {seed}; expected an integer from 0 to 2**64 - 1")
        return seed
    return int(generator(random_state).integers(0, LARGEST_SEED, dtype=np.uint64, endpoint=True))
