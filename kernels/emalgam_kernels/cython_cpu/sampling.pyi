import numpy as np

from emalgam_kernels.parameters import Direct, Packed, Sampler

def philox_words(seed: int, stream: int, block: int, first: int, out: np.ndarray) -> None: ...
def uniforms(seed: int, stream: int, first: int, out: np.ndarray) -> None: ...
def normals(seed: int, stream: int, first: int, out: np.ndarray, n_threads: int = 1) -> None: ...
def sample_mixture(
    sampler: Sampler,
    seed: int,
    first: int,
    out: np.ndarray,
    labels: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
) -> None: ...
def kl_monte_carlo(
    sampler: Sampler,
    p: Packed | Direct,
    q: Packed | Direct,
    seed: int,
    first: int,
    n: int,
    out: np.ndarray,
    draw: str = "plain",
    n_threads: int = 1,
    control: tuple[Packed, Packed] | None = None,
) -> None: ...
