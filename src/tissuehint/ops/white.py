"""White: pixels of a slide without tissue, found by brightness.

Grey is the luma .299 R + .587 G + .114 B (ITU-R BT.601), as in common image libraries. A pixel is bright where its grey
is above a threshold; bright spots that are smaller than ``min_area`` are tissue (a lumen, a pale nucleus), not white.
Two pixels belong to one spot where they share an edge (4-connected).

WSSS-Tissue and TPRO use grey > 200 of 255 and drop spots below 50 and 80 px.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.errors import InputError

GREY_WEIGHTS = (0.299, 0.587, 0.114)
WHITE_THRESHOLD = 200 / 255
WHITE_MIN_AREA = 50
TPRO_WHITE_MIN_AREA = 80

# a grey level that equals the threshold must not pass it by rounding; 8-bit colours differ by 3.9e-6 in grey or more
_ROUNDING = 1e-6


def white_mask(
    image: NDArray[Any], threshold: float = WHITE_THRESHOLD, min_area: int = WHITE_MIN_AREA
) -> NDArray[np.bool_]:
    """White pixels of one image.

    Args:
        image: (H,W,3) RGB, uint8 in 0..255 or float in [0,1].
        threshold: grey in [0,1] that white exceeds.
        min_area: smallest white spot in px, 4-connected; 0 or 1 keeps all.

    Returns:
        (H,W) bool.

    Raises:
        InputError: another shape or type, a float outside [0,1].

    Example:
        >>> image = np.full((10, 10, 3), 250, np.uint8)
        >>> image[:, 3] = 90
        >>> white_mask(image, min_area=50).sum(axis=0)
        array([ 0,  0,  0,  0, 10, 10, 10, 10, 10, 10])
    """
    kept: NDArray[np.bool_] = _without_small_spots(_bright(image, threshold)[None], min_area)[0]
    return kept


def white_fraction(image: NDArray[Any], threshold: float = WHITE_THRESHOLD) -> float:
    """Share of bright pixels in an image, spots of any size: the measure by which white patches are left out.

    Args:
        image: (H,W,3) RGB, uint8 in 0..255 or float in [0,1].
        threshold: grey in [0,1] that white exceeds.

    Returns:
        A number in [0,1].

    Raises:
        InputError: another shape or type, a float outside [0,1].

    Example:
        >>> white_fraction(np.full((4, 4, 3), 255, np.uint8))
        1.0
    """
    return float(_bright(image, threshold).mean())


def white_masks(images: Tensor, threshold: float = WHITE_THRESHOLD, min_area: int = WHITE_MIN_AREA) -> Tensor:
    """White pixels of a batch; the same as ``white_mask`` image by image.

    Brightness is computed where the images are, spots on the CPU, all images in one call.

    Args:
        images: (B,3,H,W) float RGB in [0,1].
        threshold: grey in [0,1] that white exceeds.
        min_area: smallest white spot in px, 4-connected; 0 or 1 keeps all.

    Returns:
        (B,H,W) bool on the device of ``images``.

    Raises:
        InputError: another shape.

    Example:
        >>> white_masks(torch.ones(2, 3, 8, 8), min_area=64).float().mean().item()
        1.0
    """
    if images.ndim != 4 or images.shape[1] != 3:
        rule = f"have shape {tuple(images.shape)}, not (batch, 3, height, width)"
        raise InputError("images", rule, "give a batch of RGB images")
    weights = torch.tensor(GREY_WEIGHTS, device=images.device)
    grey = torch.einsum("bchw,c->bhw", images.detach().float(), weights)
    bright = grey > threshold + _ROUNDING
    if min_area <= 1:
        return bright
    kept = _without_small_spots(bright.cpu().numpy(), min_area)
    return torch.from_numpy(kept).to(images.device)


def _bright(image: NDArray[Any], threshold: float) -> NDArray[np.bool_]:
    """(H,W) bool: grey above the threshold."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError("image", f"has shape {image.shape}, not (height, width, 3)", "give one RGB image")
    if image.dtype == np.uint8:
        scale = 255.0
    elif np.issubdtype(image.dtype, np.floating) and image.size and image.min() >= 0 and image.max() <= 1:
        scale = 1.0
    else:
        rule = f"is {image.dtype} and not uint8 or float in [0, 1]"
        raise InputError("image", rule, "give RGB in 0..255 as uint8, or divide by 255")
    grey: NDArray[np.float64] = image.astype(np.float64) @ np.asarray(GREY_WEIGHTS)
    return grey > (threshold + _ROUNDING) * scale


def _without_small_spots(bright: NDArray[np.bool_], min_area: int) -> NDArray[np.bool_]:
    """(B,H,W) bool without 4-connected spots below ``min_area`` px; images of the batch don't touch."""
    if min_area <= 1:
        return bright
    from scipy.ndimage import label

    cross = np.zeros((3, 3, 3), bool)
    cross[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    spots, _ = label(bright, structure=cross)
    large = np.bincount(spots.reshape(-1)) >= min_area
    large[0] = False
    kept: NDArray[np.bool_] = large[spots]
    return kept
