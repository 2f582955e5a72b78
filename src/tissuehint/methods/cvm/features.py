"""What contrast maps compare when no network is trained: stain densities, and maps of a pretrained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.errors import InputError

if TYPE_CHECKING:
    from tissuehint.nn.encoders import Encoder

# standard deviations, px of the given image, of the Gaussian windows in which stains are averaged
STAIN_SCALES = (3.0, 6.0, 12.0)
ENCODER_LEVELS = (2, 3, 4)
COMPONENTS = 8
# a component with a smaller share of the largest variance is rounding
SMALLEST_VARIANCE = 1e-5
# a channel whose standard deviation is below this says nothing about place
FLAT = 1e-6


def stain_features(
    image: NDArray[np.uint8], scales: Sequence[float] = STAIN_SCALES, components: int = COMPONENTS
) -> Tensor:
    r"""Principal components of the local mean and the local standard deviation of the stain densities.

    Colour deconvolution gives the densities d of haematoxylin, eosin and diaminobenzidine of every pixel (Ruifrok and
    Johnston, Analytical and Quantitative Cytology and Histology 23, 2001; the matrix of ``skimage.color.rgb2hed``).
    With a Gaussian window :math:`G_\sigma` of each scale

    .. math:: m_\sigma = G_\sigma * d, \qquad s_\sigma = \sqrt{G_\sigma * d^2 - m_\sigma^2}

    say colour and texture. Densities are all positive, so that their cosines would all be near 1: the channels are
    standardised over the image. Neighbouring scales say nearly the same, which outweighs what only one of them says:
    of their leading principal components, each is divided by the root of its standard deviation. (Unit variance is a
    little better on crowded tissue, but in a plain image it makes noise as loud as the stains.)

    Args:
        image: (H,W,3) uint8, red green blue.
        scales: standard deviations of the windows, px.
        components: how many principal components to keep, at most 6 for each scale.

    Returns:
        (components,H,W) float32, the strongest last, with mean 0 and standard deviation 1; the others have the root of
        their ratio to it, and are 0 where the image has no such component.

    Raises:
        InputError: no scale, or one that is not positive.
    """
    from scipy.ndimage import gaussian_filter
    from skimage.color import rgb2hed

    if not scales or not all(scale > 0 for scale in scales):
        raise InputError(f"stain scales {list(scales)}", "are not positive numbers", "write 3, 6 and 12 px")
    densities = rgb2hed(np.ascontiguousarray(image)).astype(np.float32).transpose(2, 0, 1)
    channels = []
    for scale in scales:
        window = (0, scale, scale)
        mean = gaussian_filter(densities, window, truncate=3)
        square = gaussian_filter(np.square(densities), window, truncate=3)
        channels += [mean, np.sqrt(np.maximum(square - np.square(mean), 0))]
    leading, deviations = principal_components(standardised(torch.from_numpy(np.concatenate(channels))), components)
    strongest = deviations.amax().clamp_min(FLAT)
    roots = (deviations * strongest).sqrt()
    return leading / torch.where(roots > 0, roots, 1.0)[:, None, None]


def encoder_features(
    encoder: Encoder,
    image: NDArray[np.uint8],
    size: tuple[int, int],
    levels: Sequence[int] = ENCODER_LEVELS,
    components: int = COMPONENTS,
) -> Tensor:
    """Leading principal components of the maps of a pretrained encoder.

    The chosen levels are standardised, resampled bilinearly to the finest of them and divided by the root of their
    channels, so that all weigh the same whatever their widths. The first component has standard deviation 1, the others
    keep their ratio to it: hundreds of channels as they are make every place like itself only.

    Args:
        encoder: of ``nn.encoders.build_encoder``; it is put into evaluation mode.
        image: (H,W,3) uint8, red green blue, sides of at least 32 px.
        size: (h,w) of the result.
        levels: indices of the pyramid, 0 the finest; negative ones count from the coarsest.
        components: how many principal components to keep.

    Returns:
        (components,h,w) float32.

    Raises:
        InputError: a level that the encoder does not have, an image that it does not take, maps that are not finite.
    """
    from tissuehint.data.training_sets import to_tensor

    count = len(encoder.strides)
    if not levels or not all(-count <= level < count for level in levels):
        rule = f"are not levels of encoder '{encoder.config.name}', which has 0..{count - 1}"
        raise InputError(f"levels {list(levels)}", rule, "use these; 0 is the finest")
    chosen = sorted({level % count for level in levels})
    device = next(encoder.parameters()).device
    with torch.no_grad():
        pyramid = encoder.eval()(to_tensor(image)[None].to(device))
    finest, stride = pyramid[chosen[0]], encoder.strides[chosen[0]]
    shape = (finest.shape[2], finest.shape[3])
    maps = [_enlarged(pyramid[level], encoder.strides[level] // stride, shape)[0] for level in chosen]
    if not all(bool(each.isfinite().all()) for each in maps):
        rule = "gives values that are NaN or infinite for this image"
        raise InputError(f"encoder '{encoder.config.name}'", rule, "check its weights and --normalization")
    joined = torch.cat([standardised(each) / each.shape[0] ** 0.5 for each in maps])
    leading, deviations = principal_components(joined, components)
    # cells of the last row and column may reach over the border of the image
    leading = _enlarged(leading[None], stride, (image.shape[0], image.shape[1]))
    resampled = F.interpolate(leading, size, mode="bilinear", align_corners=False)[0]
    return resampled / deviations.amax().clamp_min(FLAT)


def principal_components(features: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Project the places of a centred map on the directions in which they vary most.

    Args:
        features: (C,H,W), each channel with mean 0.
        components: how many to keep; at most C are.

    Returns:
        (K,H,W), the strongest last, and their standard deviations (K,); 0 both where the map has no further direction.
    """
    places = features.flatten(1)
    covariance = (places @ places.T).double() / places.shape[1]
    variances, directions = torch.linalg.eigh(covariance)
    variances, directions = variances[-components:], directions[:, -components:]
    real = variances > SMALLEST_VARIANCE * variances[-1]
    projected = torch.where(real, directions, 0.0).to(features.dtype).T @ places
    deviations = torch.where(real, variances, 0.0).sqrt().to(features.dtype)
    return projected.view(len(projected), *features.shape[1:]), deviations


def standardised(features: Tensor) -> Tensor:
    """Each channel of (C,H,W) with mean 0 and standard deviation 1 over the image; 0 where it is constant."""
    deviation, mean = torch.std_mean(features, dim=(1, 2), correction=0, keepdim=True)
    # relative too: a constant channel of large values varies in its last digits
    flat = deviation < FLAT * (1 + mean.abs())
    return torch.where(flat, 0.0, (features - mean) / deviation.clamp_min(FLAT))


def _enlarged(level: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Enlarge (B,C,h,w) by a factor and cut what reaches over the border of ``size``."""
    if factor > 1:
        level = F.interpolate(level.float(), scale_factor=factor, mode="bilinear", align_corners=False)
    return level[..., : size[0], : size[1]]
