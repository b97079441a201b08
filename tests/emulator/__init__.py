"""A GPU without a GPU: what the compiler made of the CUDA kernels runs on the CPU, in blocks of the real size.

Numba's simulator interprets the Python of a kernel, with few threads. Here the PTX that NVIDIA's compiler wrote, which
a driver would turn into machine code, is translated to C statement by statement (`translation`), compiled, and run
(`machine`, `runtime.h`): float32 is float32, integers overflow, blocks have their hundreds of threads. As each access
to memory is looked at, races show, too.

`EMALGAM_EMULATED_CUDA=1` makes the tests run so; `make test-emulated` does. With `EMALGAM_EMULATED_PRODUCTS=joined`
too, products are joined with the sums they go into wherever PTX lets NVIDIA's assembler do so.
"""

from __future__ import annotations

import os
from typing import Final

EMULATED: Final = os.environ.get("EMALGAM_EMULATED_CUDA") == "1"
