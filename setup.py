"""Package roots and the Cython extension; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# Without a compiler the package installs all the same and numba_cpu runs. Whoever builds wheels wants the extension or
# an error.
REQUIRED = os.environ.get("EMALGAM_REQUIRE_EXTENSION") == "1"
FOLDER = Path("kernels/emalgam_kernels/cython_cpu")


class BuildIfThereIsACompiler(build_ext):
    """setuptools' `optional` forgives a compiler that fails, but not one that is missing."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            if REQUIRED:
                raise
            print(f"emalgam: {ext.name} was not built ({error}); the backend numba_cpu will run", file=sys.stderr)


if sys.platform == "win32" and not REQUIRED:  # the tile loop is written in GNU C
    extensions = []
else:
    extensions = cythonize(
        [
            Extension(
                f"emalgam_kernels.cython_cpu.{source.stem}",
                [str(source)],
                depends=[str(header) for header in FOLDER.glob("*.h")],
                include_dirs=[numpy.get_include(), str(FOLDER)],
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
                extra_compile_args=["-O3", "-fno-math-errno", "-Wno-psabi"],
                optional=not REQUIRED,
            )
            for source in sorted(FOLDER.glob("*.pyx"))
        ],
        include_path=["kernels"],
    )

setup(
    packages=find_packages("src") + find_packages("kernels"),
    package_dir={"": "src", "emalgam_kernels": "kernels/emalgam_kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildIfThereIsACompiler},
)
