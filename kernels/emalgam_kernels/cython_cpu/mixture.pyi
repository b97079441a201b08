import numpy as np

from emalgam_kernels.parameters import Direct, Packed

def log_prob(x: np.ndarray, parameters: Packed | Direct, out: np.ndarray, n_threads: int = 1) -> None: ...
def responsibilities(
    x: np.ndarray,
    parameters: Packed | Direct,
    out: np.ndarray,
    n_threads: int = 1,
    log_prob: np.ndarray | None = None,
) -> None: ...
def em_statistics(
    x: np.ndarray,
    sample_weight: np.ndarray | None,
    parameters: Packed | Direct,
    out: np.ndarray,
    hard: bool = False,
    n_threads: int = 1,
) -> float: ...
def select_simd_level(wanted: str | None = None) -> str: ...
def simd_level() -> str: ...
def tile_step() -> int: ...
def tile_step_float32() -> int: ...
