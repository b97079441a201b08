"""The command line: ``emalgam fit | fit-many | score | predict | sample | kl | train-ae | generate | info``.

A command is a function in the file of its name, or of what it is about: `mixtures` has four, `autoencoders` two. What
they share is in `options`, `input`, `output` and `report`.

Results go to standard output, as text or (``--json``) as one JSON object; progress, warnings and errors go to standard
error, each on one line. Libraries that a command can do without are imported in the functions that use them: a short
fit should not wait for pyarrow or rich.

======  ==================================================================
exit    meaning
======  ==================================================================
0       done; a fit that stopped at --max-iter warns and says so in its report
1       the input, the model file or the fit is at fault
2       the command line is: an unknown option, a value out of range
3       the backend that was asked for cannot run here
130     interrupted
======  ==================================================================
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import typer

from emalgam import __version__
from emalgam.backends import BackendUnavailable
from emalgam.cli import autoencoders, fit, fit_many, info, mixtures

EXIT_FAULT: Final = 1
EXIT_BACKEND: Final = 3
EPILOG: Final = (
    "Exit codes: 0 done (a fit that did not converge warns), 1 input, model or fit at fault, 2 command line at fault, "
    "3 backend unavailable, 130 interrupted."
)
COMMANDS: Final[Sequence[Callable[..., None]]] = (  # as --help lists them
    fit.fit,
    fit_many.fit_many,
    mixtures.score,
    mixtures.predict,
    mixtures.sample,
    mixtures.kl,
    autoencoders.train_ae,
    autoencoders.generate,
    info.info,
)

app = typer.Typer(
    help="Fit, score and sample Gaussian mixtures.",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in COMMANDS:
    app.command(epilog=EPILOG)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"emalgam {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fit, score and sample Gaussian mixtures; train autoencoders that draw from them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; `arguments` are those of the process by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _show_warning
    try:
        status = app(args=list(arguments) or ["--help"], prog_name="emalgam", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        _say("error", f"{error.format_message()} (see emalgam --help)")
        return error.exit_code
    except BackendUnavailable as error:
        _say("error", error)
        return EXIT_BACKEND
    except BrokenPipeError:  # whoever read the output has left; a second error at exit would help nobody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAULT
    except OSError as error:
        _say("error", _os_error(error))
    except MemoryError as error:
        _say("error", f"out of memory: {error}")
    except (ValueError, ImportError, FloatingPointError) as error:
        _say("error", error)
    return EXIT_FAULT


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say("warning", message)


def _say(kind: str, message: object) -> None:
    """One line on standard error."""
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)


def _os_error(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
