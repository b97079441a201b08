"""Pictures of mixtures, fits, likelihoods and autoencoders, with matplotlib.

Every function draws into `ax`, or into a new figure, and returns the Axes. Components and classes have the colours of
Okabe and Ito, which people with any kind of colour vision can tell apart, and their name as a label; beyond seven,
colours are steps of the colour map viridis and the label is what tells them apart.

Many images are one picture: a sheet of rows and columns, drawn in one piece. Images are arrays or tensors (N, H, W),
(N, 1, H, W), (N, 3, H, W) or, flat, (N, H²); anything else needs ``shape=``.
"""

from emalgam.plot.curves import bic_curve, likelihood_curve, likelihood_trace, losses
from emalgam.plot.images import reconstructions, samples
from emalgam.plot.latents import interpolation, latent_scatter, manifold_grid
from emalgam.plot.mixtures import ellipses, responsibilities
from emalgam.plot.style import INK, OKABE_ITO, component_colors

__all__ = [
    "INK",
    "OKABE_ITO",
    "bic_curve",
    "component_colors",
    "ellipses",
    "interpolation",
    "latent_scatter",
    "likelihood_curve",
    "likelihood_trace",
    "losses",
    "manifold_grid",
    "reconstructions",
    "responsibilities",
    "samples",
]
