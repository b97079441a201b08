"""EM as plain torch products over chunks of rows, written as well as eager torch allows: the GPU's competitor.

The same algebra as emalgam's, with torch's own operations only: each chunk goes into preallocated memory, Φ (F, C) and
L (K, C) have the rows of the data innermost, and the statistics are added in float64. There are three ways to make the
features of full covariances, and the best one, the rows of a chunk and of a sum are what a short tuning finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from emalgam_kernels import Packed

INDEX_SELECT, SLICES, OUTER_PRODUCT = FEATURES = ("index_select", "slices", "outer product")
ROWS: Final = (2**12, 2**14, 2**16, 2**18, 2**20)  # of a chunk
ROWS_OF_A_SUM: Final = (1024, 8192)  # where a chunk's statistics are several sums
ROWS_TO_TUNE: Final = 2**20
MOST_BYTES: Final = 8 * 2**30  # of memory that a chunk may take


@dataclass(frozen=True)
class Plan:
    """How to go over the rows.

    Attributes
    ----------
    features : {"index_select", "slices", "outer product"}
        Full covariances: products z_i z_j from two gathered matrices, row i of z by its first rows, or all of y yᵀ
        with y = (z, 1), which doubles the arithmetic of the products.
    rows : int
        Of a chunk.
    parts : int
        Sums of a chunk's statistics in the dtype of the data, which a batched product computes side by side.
    """

    features: str
    rows: int
    parts: int = 1

    def __str__(self) -> str:
        sums = "one sum" if self.parts == 1 else f"{self.parts} sums"
        return f"{self.features}, {self.rows} rows at once, {sums} each"


class TorchEm:
    """One pass of EM over rows where they lie.

    Parameters
    ----------
    x : (N, D) float32 or float64 tensor
    like : Packed
        A mixture of the same size, feature map and frame as those that will be asked about; float64 tensors beside x.
    plan : Plan
    """

    def __init__(self, x: torch.Tensor, like: Packed, plan: Plan) -> None:
        self.x, self.plan = x, plan
        self.N, self.D = x.shape
        self.K, self.F = like.natural.shape
        self.rows = min(plan.rows, self.N)
        self.parts = plan.parts if self.rows % plan.parts == 0 else 1
        self.feature_map = like.feature_map
        self.outer = like.feature_map == "full" and plan.features == OUTER_PRODUCT
        self.columns = (self.D + 1) ** 2 if self.outer else self.F
        self.places = self._places() if self.outer else slice(None)
        # z = (x − shift) · scale, as one fused operation: x · scale − shift · scale
        self.scale = self._vector(like.scale)
        self.offset = self._vector(-like.shift * like.scale)
        self._allocate(whitened=like.whitening is not None)

    def _vector(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, device=self.x.device).to(self.x.dtype)[:, None]

    def _places(self) -> torch.Tensor:
        """Where the packed statistics are in y yᵀ, (F,)."""
        i, j = torch.tril_indices(self.D, self.D)
        linear = self.D * (self.D + 1) + torch.arange(self.D + 1)
        return torch.cat([i * (self.D + 1) + j, linear]).to(self.x.device)

    def _allocate(self, whitened: bool) -> None:
        """Everything that a pass needs, once."""
        empty, rows = self.x.new_empty, self.rows
        triangle = self.D * (self.D + 1) // 2
        gathered = self.feature_map == "full" and self.plan.features == INDEX_SELECT
        self.i, self.j = torch.tril_indices(self.D, self.D).to(self.x.device)
        self.phi = empty(self.columns, rows)
        self.y = empty(self.D + 1, rows) if self.outer else self.phi[self.F - self.D - 1 :]
        self.y[-1] = 1
        self.plain = empty(self.D, rows) if whitened else None
        self.left, self.right = (empty(triangle if gathered else 0, rows) for _ in range(2))
        self.squares = empty(self.D if self.feature_map == "spherical" else 0, rows)
        self.logits, self.r = empty(self.K, rows), empty(self.K, rows)
        self.top, self.share = empty(rows), empty(rows)
        self.natural = self.x.new_zeros(self.K, self.columns)
        self.partial = empty(self.parts, self.K, self.columns)
        self.total = torch.zeros((), dtype=torch.float64, device=self.x.device)
        self.sums = torch.zeros(self.K, self.columns, dtype=torch.float64, device=self.x.device)

    def statistics(self, parameters: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """S (K, F) and Σ log p (), float64 beside x."""
        self.natural[:, self.places] = torch.as_tensor(parameters.natural, device=self.x.device).to(self.x.dtype)
        whitening = parameters.whitening
        if whitening is not None:
            whitening = torch.as_tensor(whitening, device=self.x.device).to(self.x.dtype)
        self.sums.zero_()
        self.total.zero_()
        for first in range(0, self.N, self.rows):
            self._chunk(first, min(self.rows, self.N - first), whitening)
        return self.sums[:, self.places], self.total

    def _chunk(self, first: int, n: int, whitening: torch.Tensor | None) -> None:
        phi, y, logits, r = (buffer[:, :n] for buffer in (self.phi, self.y, self.logits, self.r))
        z = y[:-1] if self.plain is None else self.plain[:, :n]
        torch.addcmul(self.offset, self.x[first : first + n].T, self.scale, out=z)
        if whitening is not None:
            # z W
            torch.mm(whitening.T, z, out=y[:-1])
        self._square(y, phi, n)
        # L = η Φ, R = softmax_k(L), log p = max_k L − log max_k R
        torch.mm(self.natural, phi, out=logits)
        torch.softmax(logits, 0, out=r)
        top, share = self.top[:n], self.share[:n]
        torch.amax(logits, 0, out=top)
        torch.amax(r, 0, out=share)
        self.total.add_(top.sub_(share.log_()).sum(dtype=torch.float64))
        self._add(r, phi)

    def _square(self, y: torch.Tensor, phi: torch.Tensor, n: int) -> None:
        """The quadratic rows of Φ."""
        D, z = self.D, y[:-1]
        if self.outer:
            torch.mul(y[:, None], y, out=phi.unflatten(0, (D + 1, D + 1)))
        elif self.feature_map == "diag":
            torch.mul(z, z, out=phi[:D])
        elif self.feature_map == "spherical":
            torch.mul(z, z, out=self.squares[:, :n])
            torch.sum(self.squares[:, :n], 0, out=phi[0])
        elif self.plan.features == SLICES:
            for i in range(D):
                torch.mul(z[: i + 1], z[i], out=phi[i * (i + 1) // 2 : (i + 1) * (i + 2) // 2])
        else:
            left, right = self.left[:, :n], self.right[:, :n]
            torch.index_select(z, 0, self.i, out=left)
            torch.index_select(z, 0, self.j, out=right)
            torch.mul(left, right, out=phi[: len(left)])

    def _add(self, r: torch.Tensor, phi: torch.Tensor) -> None:
        """S += R Φᵀ, in float64 from chunk to chunk."""
        if self.parts == 1 or r.shape[1] < self.rows:
            partial = self.partial[0]
            torch.mm(r, phi.T, out=partial)
            self.sums.add_(partial)
            return
        parts_of_r, parts_of_phi = (matrix.unflatten(1, (self.parts, -1)) for matrix in (r, phi))
        torch.bmm(parts_of_r.transpose(0, 1), parts_of_phi.permute(1, 2, 0), out=self.partial)
        self.sums.add_(self.partial.sum(0, dtype=torch.float64))


# ---- tuning


def plans(x: torch.Tensor, like: Packed) -> Iterator[Plan]:
    """Every way of making features with every chunk that is worth trying."""
    full = like.feature_map == "full"
    K, F = like.natural.shape
    for features in FEATURES if full else ("torch",):
        columns = (3 if features == INDEX_SELECT else 2) * F + 2 * K
        for rows in ROWS:
            fits = rows * columns * x.element_size() <= MOST_BYTES
            if rows == ROWS[0] or (fits and rows < 2 * len(x)):
                yield Plan(features, rows)


def best(
    candidates: Iterable[Plan], x: torch.Tensor, like: Packed, clock: Callable[[Any], float]
) -> tuple[Plan, float]:
    """The candidate whose pass takes the least seconds by `clock`, and these seconds."""
    found = []
    for plan in candidates:
        em = TorchEm(x, like, plan)
        found.append((clock(lambda em=em: em.statistics(like)), plan))
    seconds, plan = min(found, key=lambda each: each[0])
    return plan, seconds


def tune(x: torch.Tensor, like: Packed, clock: Callable[[Any], float]) -> Plan:
    """The fastest plan on the first rows: the features and the chunk, then into how many sums a chunk is divided."""
    some = x[:ROWS_TO_TUNE]
    plan, seconds = best(plans(some, like), some, like, clock)
    divided = [Plan(plan.features, plan.rows, plan.rows // rows) for rows in ROWS_OF_A_SUM if rows < plan.rows]
    if not divided:
        return plan
    other, other_seconds = best(divided, some, like, clock)
    return other if other_seconds < seconds else plan
