"""Test and measure numba_cuda on a machine with a GPU, and write bench/RESULTS_GPU.md.

python bench/run_on_gpu.py               at most eight minutes
python bench/run_on_gpu.py --crossover   the same, and writes the measured crossover.json of the kernels
python bench/run_on_gpu.py --dry-run     everything once on small problems without a GPU; prints, writes nothing

It needs numpy, scipy, numba, numba-cuda, torch (whose mpmath the oracles use) and pytest, and neither
an installation of emalgam nor a network. It ends with 0, with 1 if a test or a measurement failed (the report says
which), and with 2 if there is no GPU that can be used.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from bench.gpu_clock import Run

ROOT: Final = Path(__file__).resolve().parent.parent
REPORT: Final = ROOT / "bench" / "RESULTS_GPU.md"
CROSSOVER: Final = ROOT / "kernels" / "emalgam_kernels" / "numba_cuda" / "crossover.json"
ROOTS: Final = [str(ROOT), str(ROOT / "src"), str(ROOT / "kernels")]

MOST_SECONDS: Final = 480.0
TO_STOP: Final = 30.0  # for what is under way when nothing new is begun
TEST_SECONDS: Final = 240.0
CROSSOVER_SECONDS: Final = 45.0  # kept for the crossover while the figures are measured
DIVERGENCE_SECONDS: Final = 20.0  # that the divergences may take
MANY_SECONDS: Final = 20.0  # that very many fits may take
TESTS: Final = (
    "tests/cuda",
    "kernels/emalgam_kernels/numba_cuda",
    *(f"tests/kernels/test_{part}.py" for part in ("contract", "mixture", "kl", "philox", "sampling", "batch")),
)
DRY_TESTS: Final = ("tests/kernels/test_contract.py",)
NOT_YET: Final = "Not measured: the run ended before this section.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 or 2; see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crossover", action="store_true", help="write crossover.json too")
    parser.add_argument("--dry-run", action="store_true", help="small, without a GPU; prints, writes nothing")
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    prepare(chosen.dry_run)
    import emalgam_kernels

    reason = emalgam_kernels.probe("numba_cuda")
    if reason is not None:
        print(f"numba_cuda cannot run here, and {REPORT.name} is as it was: {reason}", file=sys.stderr)
        return 2
    from bench.gpu_clock import Run
    from emalgam_kernels.numba_cuda.device import default_device

    run = Run(chosen.dry_run, default_device(), started + MOST_SECONDS - TO_STOP)
    if not run.dry:
        threading.Thread(target=give_up, args=(started + MOST_SECONDS,), daemon=True).start()
    report = Report(run, started)
    measure(run, report, chosen.crossover)
    if run.dry:
        print(report.text())
    return 1 if run.failures else 0


def prepare(dry: bool) -> None:
    """Make this checkout importable here and in subprocesses; before NumPy, SciPy, Numba and torch are imported."""
    sys.path[:0] = ROOTS
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*ROOTS, *([known] if known else [])])
    os.environ["NUMBA_ENABLE_CUDASIM"] = "1" if dry else "0"
    os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")
    os.environ["SCIPY_ARRAY_API"] = "1"  # scikit-learn asks for it before it takes tensors


def give_up(end: float) -> None:
    """End the process at `end`: something hangs. What was measured before is in the report already."""
    time.sleep(max(end - time.perf_counter(), 0))
    print(
        f"after {MOST_SECONDS:.0f} s something still ran; {REPORT.name} has what was measured before", file=sys.stderr
    )
    os._exit(1)


# ---- the report


class Report:
    """Sections in their order; written anew after each, so that a run that is cut short leaves what it had."""

    TITLES: Final = (
        "Machine",
        "Tests",
        "Targets",
        "Limits of the device",
        "Passes and iterations",
        "Competitors",
        "From main memory",
        "Accuracy",
        "Sampling",
        "Divergences",
        "Very many fits",
        "Crossover",
    )

    def __init__(self, run: Run, started: float) -> None:
        self.run, self.started = run, started
        self.sections = dict.fromkeys(self.TITLES, NOT_YET)

    def put(self, **sections: str) -> None:
        """Fill sections (their titles with _ for spaces) and write the file."""
        for name, text in sections.items():
            self.sections[name.replace("_", " ")] = text
        if not self.run.dry:
            REPORT.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """RESULTS_GPU.md."""
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        seconds = time.perf_counter() - self.started
        failures = "\n".join(f"- {failure}" for failure in self.run.failures)
        parts = [
            f"# Results on a GPU\n\nWritten by `python bench/run_on_gpu.py` on {date}. Do not edit.\n",
            f"It took {seconds:.0f} s.\n",
            f"## Failures\n\n{failures}\n" if failures else "",
            *(f"## {title}\n\n{text}" for title, text in self.sections.items()),
        ]
        return "\n".join(part for part in parts if part)


# ---- what is measured


def measure(run: Run, report: Report, write_crossover: bool) -> None:
    """Every section; each goes on where another one failed."""
    from bench import gpu_machine, gpu_sampling
    from bench.tables import say, table

    description = run.attempt("machine", lambda: gpu_machine.describe(run))
    report.put(Machine=section(description, lambda found: table(["", ""], found.items())))
    say("tests")
    report.put(Tests=section(run.attempt("tests", lambda: run_tests(run)), str))
    say("limits of the device")
    limits = run.attempt("limits of the device", lambda: gpu_machine.measure(run), 10)
    report.put(Limits_of_the_device=section(limits, lambda found: found.text()))
    say("sampling")
    sampled = run.attempt("sampling", lambda: gpu_sampling.measure(run, limits, CROSSOVER_SECONDS))
    report.put(Sampling=section(sampled, gpu_sampling.text))
    figures(run, report, limits)
    say("divergences")
    divergences(run, report)
    say("very many fits")
    many_fits(run, report)
    say("crossover")
    crossover(run, report, description, write_crossover)


def figures(run: Run, report: Report, limits: Any) -> None:
    """The sections about seconds and accuracy, one case after the other."""
    from bench import gpu_figures, gpu_report
    from bench.gpu_clock import Missing
    from bench.tables import describe, say

    measured = []
    for case, bounds in (gpu_figures.DRY_CASES if run.dry else gpu_figures.CASES).items():
        say(describe(case))
        found = run.attempt(
            describe(case),
            lambda case=case, bounds=bounds: gpu_figures.measure(
                case, bounds, run, limits, CROSSOVER_SECONDS + DIVERGENCE_SECONDS + MANY_SECONDS
            ),
            0 if run.dry else CROSSOVER_SECONDS + DIVERGENCE_SECONDS + MANY_SECONDS + gpu_figures.NEEDED,
        )
        run.free()
        measured.append(gpu_figures.Figures.without(case, bounds, found) if isinstance(found, Missing) else found)
        report.put(
            Targets=gpu_report.judged(measured),
            Passes_and_iterations=gpu_report.passes(measured),
            Competitors=gpu_report.competitors(measured),
            From_main_memory=gpu_report.transfers(measured, limits),
            Accuracy=gpu_report.accuracy(measured),
        )


def divergences(run: Run, report: Report) -> None:
    """The section about Gaussians."""
    from bench import gpu_divergence

    needs = 0 if run.dry else CROSSOVER_SECONDS + DIVERGENCE_SECONDS + MANY_SECONDS
    found = run.attempt("divergences", lambda: gpu_divergence.measure(run), needs)
    report.put(Divergences=section(found, gpu_divergence.text))


def many_fits(run: Run, report: Report) -> None:
    """The section about many problems."""
    from bench import gpu_many

    needs = 0 if run.dry else CROSSOVER_SECONDS + MANY_SECONDS
    found = run.attempt("very many fits", lambda: gpu_many.measure(run), needs)
    report.put(Very_many_fits=section(found, gpu_many.text))


def crossover(run: Run, report: Report, description: Any, write: bool) -> None:
    """The last section, and crossover.json if that is wanted."""
    from bench import gpu_crossover

    points = run.attempt("crossover", lambda: gpu_crossover.measure(run))
    report.put(Crossover=section(points, gpu_crossover.text))
    if write and isinstance(points, list) and not run.dry:
        place = (description["device"], description["date"]) if isinstance(description, dict) else ("", "")
        run.attempt("crossover.json", lambda: gpu_crossover.write(CROSSOVER, points, *place))
    report.put()


def section(found: Any, text: Callable[[Any], str]) -> str:
    """A section's text, or why there is none."""
    from bench.gpu_clock import Missing

    return f"**{found}**\n" if isinstance(found, Missing) else text(found)


# ---- tests


def run_tests(run: Run) -> str:
    """pytest in a process of its own; its failures are the run's."""
    limit, tests = min(TEST_SECONDS, run.left), DRY_TESTS if run.dry else TESTS
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        status, seconds = finished([*command, "--basetemp", f"{folder}/tests", *tests], log, limit)
        output = log.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)
    if status != 0:
        print(output[-8000:], file=sys.stderr, flush=True)
        how = f"not finished after {limit:.0f} s" if status is None else f"pytest ended with {status}"
        run.failures.append(f"tests: {how}, {len(failed)} named below")
    names = "".join(f"- `{line[:300]}`\n" for line in failed)
    what = f"`{' '.join(tests)}` with numba_cuda as the backend under test, in {seconds:.0f} s."
    return f"{what}\n\n{outcome(output, status, seconds)}\n\n{names}".rstrip() + "\n"


def finished(command: Sequence[str], log: Path, limit: float) -> tuple[int | None, float]:
    """The exit status of a process, None if it was stopped after `limit` seconds with all that it had started."""
    backend = dict.fromkeys(("EMALGAM_TESTED_BACKENDS", "EMALGAM_REQUIRED_BACKENDS"), "numba_cuda")
    environment = os.environ | backend | {"COLUMNS": "200"}
    environment.pop("SCIPY_ARRAY_API", None)
    started = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    return status, time.perf_counter() - started


def outcome(output: str, status: int | None, seconds: float) -> str:
    """pytest's own summary, or what there is in its place."""
    if status is None:
        passed = len(re.findall(r" PASSED\b", output))
        return f"**Not finished** after {seconds:.0f} s; {passed} had passed until then."
    summaries = re.findall(r"^=+ (.*\b(?:passed|failed|errors?|no tests ran)\b.*?) =+$", output, re.MULTILINE)
    if summaries:
        return f"pytest: {summaries[-1]}."
    return f"**pytest ended with {status}**: {(output.strip().splitlines() or [''])[-1]}"


if __name__ == "__main__":
    sys.exit(main())
