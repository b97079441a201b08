"""Every kernel of this backend, for the compile gate."""

from __future__ import annotations

from emalgam_kernels.numba_cuda import batch, direct, fused, kl_kernels, products, sampling
from emalgam_kernels.numba_cuda.device import Kernel


def kernels() -> list[Kernel]:
    """All that numba_cuda may launch."""
    return [kernel for module in (fused, products, direct, kl_kernels, sampling, batch) for kernel in module.kernels()]
