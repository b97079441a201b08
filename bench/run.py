"""Measure everything in one run and write bench/RESULTS.md; ``make bench`` calls this.

python bench/run.py                      about fifteen minutes
python bench/run.py --smoke              everything once on small data, the pytest benchmarks too
python bench/run.py --only divergence    one topic of bench/report.py, or several

The last two print and write nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PROCESSORS: Final = 2  # the targets are for two


def main() -> int:
    """0 when everything ran, whether or not targets were met; an exception when a library computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="everything once, small, nothing written")
    parser.add_argument("--only", nargs="+", metavar="TOPIC", help="these topics, nothing written")
    parser.add_argument("--processors", type=int, default=PROCESSORS, help="how many to use (default: %(default)s)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from bench import peers

    if absent := peers.absent():
        print(peers.how_to_install(absent), file=sys.stderr)
        return 1
    use_processors(arguments.processors)
    warnings.simplefilter("error")
    from bench import report  # after the processors are chosen: BLAS libraries count them when they are loaded

    if unknown := set(arguments.only or ()) - set(report.TOPICS):
        parser.error(f"no topic is called {', '.join(sorted(unknown))}; there are {', '.join(report.TOPICS)}")
    text = report.render(report.measure_all(arguments.smoke, arguments.only or tuple(report.TOPICS)))
    print(text)
    if arguments.smoke and not arguments.only:
        return run_tests()
    if not arguments.only:
        (ROOT / "bench" / "RESULTS.md").write_text(text)
    return 0


def use_processors(count: int) -> None:
    """Keep this process and its children on `count` processors; say so where that cannot be had."""
    if not hasattr(os, "sched_setaffinity"):
        print(f"this system cannot keep a process on {count} processors; all are used", file=sys.stderr)
        return
    available = sorted(os.sched_getaffinity(0))
    if len(available) < count:
        print(f"there are {len(available)} processors; the targets are for {count}", file=sys.stderr)
    os.sched_setaffinity(0, available[:count])


def run_tests() -> int:
    """The pytest benchmarks, small, once."""
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-enable", "--benchmark-columns=median"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"EMALGAM_BENCH_SMALL": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
