"""A mixture fitted to the latents of a trained model, and data decoded from what it generates.

A plain autoencoder has no distribution over its latents to draw from. A mixture fitted to the latents of the training
data is one, found after training and without touching the model (Ghosh et al. 2020, "From variational to deterministic
autoencoders", section 4: ex-post density estimation). It serves a VAE too, whose latents never quite follow its prior.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from emalgam.covariance import COVARIANCES
from emalgam.draws import philox_seed
from emalgam.em import ConvergenceWarning, Fit, Settings, fit_observations, not_converged
from emalgam.mixture import Mixture
from emalgam.nn.data import ROWS_AT_ONCE, as_loader
from emalgam.nn.evaluation import as_input, encode, evaluating
from emalgam.nn.model import LatentModel
from emalgam.nn.tensors import at_least_float32
from emalgam.parts import observe
from emalgam.stream import Stream, open_stream
from emalgam.validation import check_choice, check_finite, check_integer

CRITERIA: Final = ("bic", "aic")
BYTES_IN_MEMORY: Final = 2**30

__all__ = ["LatentMixtureSampler", "LatentStream"]


class LatentMixtureSampler:
    """Draws data from a model whose latents follow a Gaussian mixture.

    Parameters
    ----------
    n_components : int or iterable of int
        K, or those among which `criterion` chooses. Numbers that have as many parameters as there are latents, or more,
        are left out, but for the smallest. 1 is a single Gaussian.
    covariance_type : {"full", "tied", "diag", "spherical"}
        "diag" for latents of many dimensions, such as the maps of a convolutional model.
    criterion : {"bic", "aic"}
        The lowest value chooses K.
    random_state : None, int or NumPy generator
        Of the fits. The same integer gives the same mixture, and each K the one it has alone.
    n_init, tol, max_iter, reg_covar, backend, n_threads
        As in `emalgam.fit`.

    Attributes
    ----------
    mixture : Mixture
        Of the latents, taken as flat.
    latent_shape : tuple of int
    criterion_values : dict of int to float
        The criterion of each K that was fitted, in nats.
    model : LatentModel or None
        What `sample` decodes with.

    Raises
    ------
    ValueError
        Naming the argument.

    References
    ----------
    Ghosh, Sajjadi, Vergari, Black, Schölkopf (2020), "From variational to deterministic autoencoders", section 4;
    Schwarz (1978), "Estimating the dimension of a model".

    Examples
    --------
    >>> from emalgam.nn import Autoencoder, LatentMixtureSampler
    >>> _ = torch.manual_seed(0)
    >>> model, x = Autoencoder((8, 2)), torch.randn(500, 8)          # trained, one would hope
    >>> sampler = LatentMixtureSampler(range(1, 5), random_state=0).fit(model, x)
    >>> samples, labels = sampler.sample(3, random_state=0)
    >>> samples.shape, sampler.mixture.n_components
    (torch.Size([3, 8]), 1)
    """

    mixture: Mixture
    latent_shape: tuple[int, ...]
    criterion_values: dict[int, float]

    def __init__(
        self,
        n_components: int | Iterable[int] = range(1, 33),
        covariance_type: str = "full",
        criterion: str = "bic",
        random_state: Any = None,
        *,
        n_init: int = 1,
        tol: float = 1e-3,
        max_iter: int = 500,
        reg_covar: float | str = "auto",
        backend: str = "auto",
        n_threads: int | None = None,
    ) -> None:
        counts = list(n_components) if np.iterable(n_components) else [n_components]
        if not counts:
            raise ValueError("n_components is empty; expected a number of components, or several, such as range(1, 33)")
        self.n_components = sorted({check_integer("n_components", K, 1) for K in counts})
        self.criterion = check_choice("criterion", criterion, CRITERIA)
        self.random_state = random_state
        self.settings: dict[str, Any] = {
            "covariance_type": covariance_type,
            "n_init": n_init,
            "tol": tol,
            "max_iter": max_iter,
            "reg_covar": reg_covar,
        }
        Settings(**self.settings)  # says what is wrong before anything is encoded
        self.backend, self.n_threads = backend, n_threads
        self.model: LatentModel | None = None

    @property
    def covariance_type(self) -> str:
        """Of the mixture."""
        return str(self.settings["covariance_type"])

    # ---- fitting

    def fit(
        self,
        model: LatentModel,
        data: Any,
        *,
        scale: float | None = None,
        rows_at_once: int = ROWS_AT_ONCE,
        max_bytes: int = BYTES_IN_MEMORY,
    ) -> LatentMixtureSampler:
        """Encode the data and fit a mixture to their latents.

        Parameters
        ----------
        model : LatentModel
            Trained; it is used in evaluation mode, without gradients, and left as it was.
        data : array, tensor, dataset or loader
            As `emalgam.nn.as_loader` takes them; labels are ignored. The mixture depends on their order, as a start
            chooses rows: a loader that shuffles gives another one each time.
        scale : float, optional
            What to multiply with, such as 1 / 255 for images of bytes.
        rows_at_once : int
            How many data to encode at a time.
        max_bytes : int
            Latents that need more are not kept, but computed again in every pass of every fit.

        Returns
        -------
        LatentMixtureSampler
            Itself.

        Raises
        ------
        ValueError
            If there are no data, they are not of the model, or a latent is not finite.
        """
        stream = LatentStream(model, data, rows_at_once, scale)
        self.fit_latents(stream.in_memory(max_bytes))
        self.model, self.latent_shape = model, tuple(model.latent_shape)
        return self

    def fit_latents(self, z: Any) -> LatentMixtureSampler:
        """Fit a mixture to latents that are there already, and return itself.

        (N, *latent_shape) array, sequence or tensor, whose gradients are left alone; or `emalgam.Stream` of (n, D).
        """
        z, shape = _flat(z)
        data = observe(z, None, COVARIANCES[self.covariance_type], self.backend, self.n_threads)
        rows = data.rows_with_weight()
        chosen: Fit | None = None
        values: dict[int, float] = {}
        seed = philox_seed(self.random_state)
        for K in self._candidates(rows, data.n_features):
            settings = Settings(K, random_state=seed, **self.settings)
            found = fit_observations(data, settings)
            how = {"backend": self.backend, "n_threads": self.n_threads}
            values[K] = getattr(found.mixture, self.criterion)(z, **how)
            if chosen is None or values[K] < values[chosen.mixture.n_components]:
                chosen, of_chosen = found, settings
        assert chosen is not None  # there is a candidate
        if chosen.short_of_convergence:
            warnings.warn(not_converged(chosen, of_chosen), ConvergenceWarning, stacklevel=3)
        self.mixture, self.criterion_values = chosen.mixture, values
        self.latent_shape = shape or (chosen.mixture.n_features,)
        return self

    def _candidates(self, rows: int, D: int) -> list[int]:
        """The numbers of components with fewer parameters than there are latents, and the smallest."""
        covariance = COVARIANCES[self.covariance_type]
        smallest, *others = self.n_components
        return [smallest, *(K for K in others if covariance.n_parameters(K, D) + K * D + K - 1 < rows)]

    # ---- sampling

    def sample_latents(self, n: int, random_state: Any = None) -> tuple[Tensor, Tensor]:
        """Latents from the mixture, in random order.

        Parameters
        ----------
        n : int
        random_state : None, int or NumPy generator
            The same integer gives the same latents; the first ones do not depend on n.

        Returns
        -------
        z : (n, *latent_shape)
            In the model's dtype, on its device.
        labels : (n,) int64
            The component of each, there too.

        Raises
        ------
        ValueError
            If n is not positive, or nothing was fitted.
        """
        z, labels = self._fitted().sample(n, random_state, backend=self.backend, n_threads=self.n_threads)
        shaped = z.reshape(n, *self.latent_shape)
        if self.model is None:
            return torch.from_numpy(shaped).float(), torch.from_numpy(labels)
        latents = as_input(self.model, shaped)
        return latents, torch.from_numpy(labels).to(latents.device)

    def sample(self, n: int, random_state: Any = None, *, rows_at_once: int = ROWS_AT_ONCE) -> tuple[Tensor, Tensor]:
        """Data decoded from latents of the mixture, in random order.

        Parameters
        ----------
        n : int
        random_state : None, int or NumPy generator
            As in `sample_latents`.
        rows_at_once : int
            How many latents to decode at a time.

        Returns
        -------
        x : (n, *data_shape)
            The mean of the data given each latent, on the model's device.
        labels : (n,) int64
            The component of each.

        Raises
        ------
        ValueError
            As `sample_latents`, and if there is no model to decode with.
        """
        if self.model is None:
            raise ValueError("there is no model to decode with; set .model, or call fit(model, data)")
        check_integer("rows_at_once", rows_at_once, 1)
        z, labels = self.sample_latents(n, random_state)
        with evaluating(self.model):
            return torch.cat([self.model.decode(rows) for rows in z.split(rows_at_once)]), labels

    def _fitted(self) -> Mixture:
        if not hasattr(self, "mixture"):
            raise ValueError("this LatentMixtureSampler has no mixture yet; call fit(model, data) first")
        return self.mixture

    # ---- files

    def state(self) -> dict[str, Any]:
        """What `from_state` needs: NumPy arrays, and beside them what JSON can hold. ValueError before a fit."""
        mixture = self._fitted()
        return {
            "weights": np.array(mixture.weights),
            "means": np.array(mixture.means),
            "covariances": np.array(mixture.covariances),
            "covariance_type": mixture.covariance_type,
            "latent_shape": list(self.latent_shape),
            "criterion": self.criterion,
            "criterion_values": {str(K): float(value) for K, value in self.criterion_values.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], model: LatentModel | None = None) -> LatentMixtureSampler:
        """The sampler that `state` describes, which decodes with `model`.

        ValueError naming the field, if there is no mixture in it, or not one of the model's latents.
        """
        missing = sorted({"weights", "means", "covariances", "covariance_type", "latent_shape"} - set(state))
        if missing:
            raise ValueError(f"the state of the sampler has no {missing[0]!r}")
        mixture = Mixture(*(state[name] for name in ("weights", "means", "covariances", "covariance_type")))
        shape = _latent_shape(state["latent_shape"], mixture.n_features)
        if model is not None and shape != tuple(model.latent_shape):
            raise ValueError(f"latent_shape is {shape}; the model's latents have shape {tuple(model.latent_shape)}")
        sampler = cls(mixture.n_components, mixture.covariance_type, state.get("criterion", "bic"))
        sampler.mixture, sampler.latent_shape, sampler.model = mixture, shape, model
        sampler.criterion_values = _criterion_values(state.get("criterion_values", {}))
        return sampler


class LatentStream:
    """The latents of data as chunks (n, D), encoded anew each time one goes through it.

    ``LatentStream(model, data).again()`` is the stream that fits take.
    """

    def __init__(
        self, model: LatentModel, data: Any, rows_at_once: int = ROWS_AT_ONCE, scale: float | None = None
    ) -> None:
        self.model, self.data, self.scale = model, data, scale
        self.rows_at_once = check_integer("rows_at_once", rows_at_once, 1)

    def __iter__(self) -> Iterator[np.ndarray]:
        first = 0
        for x in as_loader(self.data, self.model, batch_size=self.rows_at_once, scale=self.scale):
            z = encode(self.model, x, rows_at_once=self.rows_at_once)
            z = z.reshape(len(z), -1)
            check_finite(z, "the array of latents", first)
            first += len(z)
            yield z

    def in_memory(self, max_bytes: int = BYTES_IN_MEMORY) -> np.ndarray | Stream:
        """All latents, (N, D), if they need no more than `max_bytes`; else the stream of them."""
        chunks: list[np.ndarray] = []
        total = 0
        for z in self:
            total += z.nbytes
            if total > max_bytes:
                return self.again()
            chunks.append(z)
        if not chunks:
            raise ValueError("there are no data to encode; expected at least one")
        return np.concatenate(chunks)

    def again(self) -> Stream:
        """The stream of them; ValueError if the data can be gone through once only."""
        if isinstance(self.data, Iterator):
            raise ValueError(
                f"the data are a {type(self.data).__name__}, which can be gone through once, and their latents "
                "need more than max_bytes; give a loader, or raise max_bytes"
            )
        return open_stream(self)


def _flat(z: Any) -> tuple[Any, tuple[int, ...]]:
    """Latents (N, *shape) as (N, D), and their shape; a stream as it is, and ()."""
    if isinstance(z, Stream):
        return z, ()
    rows = at_least_float32(z.detach()) if isinstance(z, Tensor) else z if hasattr(z, "reshape") else np.asarray(z)
    if rows.ndim == 0:
        raise ValueError("z is a single number; expected latents (N, *latent_shape)")
    return rows.reshape(len(rows), math.prod(rows.shape[1:])), tuple(rows.shape[1:])


def _latent_shape(given: Any, n_features: int) -> tuple[int, ...]:
    legal = isinstance(given, list | tuple) and all(type(length) is int and length > 0 for length in given)
    if not legal or math.prod(given) != n_features:
        raise ValueError(f"latent_shape is {given!r}; expected lengths whose product is {n_features}, as means has")
    return tuple(given)


def _criterion_values(given: Any) -> dict[int, float]:
    try:
        return {int(K): float(value) for K, value in given.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"criterion_values is {given!r}; expected a number under each number of components") from None
