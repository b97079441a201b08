"""Package roots and the Cython extension; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import sys

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

# Without a compiler the package installs all the same and numba_cpu runs; whoever builds wheels wants the extension or
# an error.
REQUIRED = os.environ.get("EMALGAM_REQUIRE_EXTENSION") == "1"

if sys.platform == "win32" and not REQUIRED:  # the tile loop is written in GNU C
    extensions = []
else:
    extensions = cythonize(
        [
            Extension(
                "emalgam_kernels.cython_cpu.mixture",
                ["kernels/emalgam_kernels/cython_cpu/mixture.pyx"],
                depends=[
                    f"kernels/emalgam_kernels/cython_cpu/{name}.h"
                    for name in ("tile", "tile_types", "tiles", "lanes", "polynomials")
                ],
                include_dirs=[numpy.get_include(), "kernels/emalgam_kernels/cython_cpu"],
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
                extra_compile_args=["-O3", "-fno-math-errno", "-Wno-psabi"],
                optional=not REQUIRED,
            )
        ],
        include_path=["kernels"],
    )

setup(
    packages=find_packages("src") + find_packages("kernels"),
    package_dir={"": "src", "emalgam_kernels": "kernels/emalgam_kernels"},
    ext_modules=extensions,
)
