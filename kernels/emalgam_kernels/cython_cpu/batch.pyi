import numpy as np

from emalgam_kernels.batch import Mixtures, Outcomes, Problems, Settings

def fit_many(
    problems: Problems, settings: Settings, mixtures: Mixtures, outcomes: Outcomes, n_threads: int = 1
) -> None: ...
def predict_many(
    problems: Problems, mixtures: Mixtures, log_prob: np.ndarray, labels: np.ndarray, n_threads: int = 1
) -> None: ...
