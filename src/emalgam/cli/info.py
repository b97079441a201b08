"""``emalgam info``: what this machine can run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from emalgam.cli.options import Json
from emalgam.cli.report import print_line


def info(
    compile_kernels: Annotated[
        bool,
        typer.Option("--compile", help="Compile the Numba kernels now, if they are not in the cache, and time it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """What can compute here, and why not: backends, threads, SIMD level, GPU, versions."""
    from emalgam.machine import describe

    machine = describe(compile_kernels)
    if as_json:
        typer.echo(json.dumps(machine))
        return
    for key in ("default_backend", "n_threads", "simd_level", "gpu"):
        print_line(key.replace("_", " "), machine[key])
    print_line("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print_line("numba kernels", *_compilation(machine["numba_kernels"]))
    for backend in machine["backends"]:
        remedy = f"unavailable: {backend['reason']}", f"to install it: {backend['install']}"
        print_line(backend["name"], *(("available",) if backend["available"] else remedy))


def _compilation(kernels: Mapping[str, Any]) -> list[str]:
    """Where compiled Numba kernels are, and how long each took to compile."""
    folder = f"on disk in {kernels['cache']}" if kernels["cache"] else "not compiled yet"
    if kernels["error"]:
        return [folder, f"compiling failed with {kernels['error']}"]
    took = [f"{name}: compiled in {seconds:.1f} s" for name, seconds in kernels["compile_seconds"].items()]
    return [folder, *took, "emalgam info --compile compiles and times those that are not on disk"]
