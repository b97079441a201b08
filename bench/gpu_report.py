"""The tables of bench/RESULTS_GPU.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from bench.gpu_clock import Missing
from bench.gpu_figures import MOST_ERROR, Figures, Torch, Transfer
from bench.gpu_machine import Limits
from bench.tables import Target, describe, milliseconds, number, table, verdict

HEADER: Final = "N, D, K, covariance, dtype"


def cell(value: Any, text: Callable[[Any], str]) -> str:
    """A measurement as text, or why there is none."""
    return str(value) if isinstance(value, Missing) else text(value)


def ratio(slow: Any, fast: Any) -> Any:
    """How many times faster, or the reason why that is not known."""
    missing = [value for value in (slow, fast) if isinstance(value, Missing)]
    return missing[0] if missing else slow / fast


def times(value: float) -> str:
    return f"{number(value)} ×"


# ---- targets


def targets(found: Sequence[Figures]) -> list[tuple[str, Any, float, bool, str]]:
    """What has a bound: figure, measured or missing, bound, whether it is the least, unit."""
    rows: list[tuple[str, Any, float, bool, str]] = []
    for each in found:
        name, bounds = describe(each.case), each.bounds
        if bounds.milliseconds is not None:
            milli = each.iteration if isinstance(each.iteration, Missing) else 1e3 * each.iteration
            rows.append((f"an iteration, {name}", milli, bounds.milliseconds, False, " ms"))
        if bounds.faster is not None:
            slow = each.torch.iteration if isinstance(each.torch, Torch) else each.torch
            faster = ratio(slow, each.iteration)
            rows.append((f"faster than the torch EM, an iteration, {name}", faster, bounds.faster, True, " ×"))
        rows.append((f"error of a log-density, {name}", each.error, MOST_ERROR[each.case.dtype], False, " nats"))
    return rows


def judged(found: Sequence[Figures]) -> str:
    """The table of targets."""
    rows = []
    for figure, measured, bound, at_least, unit in targets(found):
        if isinstance(measured, Missing):
            rows.append([figure, Target(figure, 0.0, bound, at_least, unit).wanted, str(measured), "not measured"])
        else:
            rows.append(Target(figure, measured, bound, at_least, unit).cells())
    for each in found:
        measured = cell(each.same_bits, lambda same: "the same" if same else "different")
        mark = "not measured" if isinstance(each.same_bits, Missing) else verdict(each.same_bits)
        rows.append([f"bits of two runs, {describe(each.case)}", "the same", measured, mark])
    met = sum(row[-1] == "met" for row in rows)
    missed = sum(row[-1] == verdict(False) for row in rows)
    text = f"{met} of {len(rows)} targets met, {missed} missed, {len(rows) - met - missed} not measured.\n\n"
    return text + table(["figure", "target", "measured", ""], rows)


# ---- figures


PASS_NOTE: Final = """Milliseconds. "pass" is `em_statistics` on a tensor that lies on the device, by CUDA events;
"iteration" is a whole iteration of `emalgam.fit` by the wall clock, M-step, guard and convergence test included: the
difference between a long fit and one of one iteration. The floor is 4 N F K operations at the rate of torch.matmul
above; "share" is the floor by the pass. "how" is what the guard chose in the last iteration, and the kernels of a pass.

"""

COMPETITORS_NOTE: Final = """Milliseconds, and how many times faster emalgam is. The plain torch EM (bench/torch_em.py)
does the same algebra by chunks of rows in torch's operations, TF32 off; the way it makes features, its chunk and its
sums are what a tuning on this device found the fastest. Its iteration has emalgam's M-step without guard and policies.
scikit-learn is `GaussianMixture` on the same tensor through the array API: a fit of two iterations less one of one.

"""

TRANSFER_NOTE: Final = """Milliseconds. "in pieces" is the same pass over a NumPy array in pageable main memory, which
crosses the bus in pieces, by the wall clock, for the host takes part: it fills the pinned buffers. GB/s and share are
its own, beside the rate at which one large copy from pinned memory crosses the bus; where a pass takes longer than
that, the bus waits for the arithmetic. "at once" is one copy from pinned memory and the pass after it, by CUDA events.

"""

ACCURACY_NOTE: Final = """Largest difference of `log_prob` of 4096 rows (packed, arithmetic in the dtype of the data)
from the CPU's reference (direct, float64); whether two passes return the same bits; and by how much Σ log p of all
rows differs from that of the plain torch EM.

"""


def passes(found: Sequence[Figures]) -> str:
    """Passes and iterations beside the floor."""
    rows = [
        [
            describe(each.case),
            each.choice,
            cell(each.one_pass, milliseconds),
            cell(each.iteration, milliseconds),
            cell(each.floor, milliseconds),
            cell(ratio(each.floor, each.one_pass), lambda share: f"{100 * share:.0f} %"),
        ]
        for each in found
    ]
    text = table([HEADER, "how", "pass", "iteration", "floor", "share"], rows)
    compilation = sum(each.compilation for each in found)
    return PASS_NOTE + text + f"\nNumba's compilation took {number(compilation)} s, which is in none of the figures.\n"


def competitors(found: Sequence[Figures]) -> str:
    """The plain torch EM and scikit-learn."""
    rows = []
    for each in found:
        em = each.torch
        plain = [str(em), *[""] * 4]
        if isinstance(em, Torch):
            faster = (ratio(em.one_pass, each.one_pass), ratio(em.iteration, each.iteration))
            plain = [str(em.plan), milliseconds(em.one_pass), milliseconds(em.iteration)]
            plain += [cell(value, times) for value in faster]
        rows.append(
            [
                describe(each.case),
                *plain,
                cell(each.scikit_learn, milliseconds),
                cell(ratio(each.scikit_learn, each.iteration), times) if isinstance(each.scikit_learn, float) else "",
            ]
        )
    header = ["torch EM: how", "pass", "iteration", "faster, pass", "faster, iteration", "scikit-learn", "faster"]
    return COMPETITORS_NOTE + table([HEADER, *header], rows)


def transfers(found: Sequence[Figures], limits: Limits | Missing) -> str:
    """From main memory."""
    rows = []
    for each in found:
        moved = each.transfer
        cells = [str(moved), "", "", "", ""]
        if isinstance(moved, Transfer):
            rate = moved.n_bytes / moved.seconds
            share = limits if isinstance(limits, Missing) else rate / limits.pinned
            cells = [f"{moved.rows}", milliseconds(moved.seconds), number(rate / 1e9)]
            cells += [cell(share, lambda part: f"{100 * part:.0f} %"), milliseconds(moved.queued)]
        rows.append([describe(each.case), *cells])
    return TRANSFER_NOTE + table([HEADER, "rows", "in pieces", "GB/s", "share of the pinned copy", "at once"], rows)


def accuracy(found: Sequence[Figures]) -> str:
    """Differences from the reference and from the torch EM, and bits."""
    rows = [
        [
            describe(each.case),
            cell(each.error, lambda value: f"{value:.1e}"),
            cell(each.same_bits, lambda same: "yes" if same else "**no**"),
            f"{each.torch.difference:.1e}" if isinstance(each.torch, Torch) else str(each.torch),
        ]
        for each in found
    ]
    header = [HEADER, "error, nats", "same bits", "relative difference of Σ log p from the torch EM"]
    return ACCURACY_NOTE + table(header, rows)
