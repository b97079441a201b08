"""Measure and write bench/RESULTS.md; ``make bench`` calls this.

python bench/run.py                      every topic of bench/report.py, about twenty minutes
python bench/run.py divergence           one topic, or several: the others stay as they were measured last
python bench/run.py --render             measure nothing, write what was measured
python bench/run.py --smoke              everything once on small data, the pytest benchmarks too; writes nothing
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
RECORDS: Final = ROOT / "bench" / "results"
PROCESSORS: Final = 2  # the targets are for two


def main() -> int:
    """0 when everything ran, whether or not targets were met; an exception when a library computes something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help="what to measure (default: everything)")
    parser.add_argument("--smoke", action="store_true", help="once, small, nothing written")
    parser.add_argument("--render", action="store_true", help="only write RESULTS.md of what was measured")
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

    if unknown := set(arguments.topics) - set(report.TOPICS):
        parser.error(f"no topic is called {', '.join(sorted(unknown))}; there are {', '.join(report.TOPICS)}")
    for name in () if arguments.render else arguments.topics or report.TOPICS:
        record = report.measure(name, arguments.smoke)
        print("\n".join(record.topic.sections))
        if not arguments.smoke:
            report.save(record, RECORDS / f"{name}.json")
    if arguments.smoke:
        return 0 if arguments.topics else run_tests()
    (ROOT / "bench" / "RESULTS.md").write_text(report.render(report.load_all(RECORDS)))
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
