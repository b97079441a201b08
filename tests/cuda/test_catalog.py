"""The list of kernels that the compile gate goes through."""

from __future__ import annotations

from emalgam_kernels.numba_cuda import catalog


def test_every_kernel_has_a_name_of_its_own() -> None:
    names = [kernel.name for kernel in catalog.kernels()]
    assert len(set(names)) == len(names)
