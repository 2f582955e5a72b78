"""A model on a device, and its maps of images of any pixel size."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tissuehint.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tissuehint.model import TissueModel

# pixel sizes within 1 % are the same: scanners do not agree better than that
SAME_SIZE = 0.01


class Device(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def load_model(folder: Path, device: Device) -> TissueModel:
    """A model of a run directory or model folder, on a device; ``auto`` takes a GPU where there is one.

    Raises:
        InputError: no or a damaged model, or no such device.
    """
    import torch

    from tissuehint.model import TissueModel

    cuda = torch.cuda.is_available()
    if device is Device.CUDA and not cuda:
        raise InputError("--device cuda", "torch finds no CUDA device", "use --device cpu; tissuehint doctor says more")
    chosen = "cuda" if cuda and device is not Device.CPU else "cpu"
    return TissueModel.load(folder, device=chosen)


def zoom_to_model(model: TissueModel, um_per_px: float | None) -> float:
    """Factor from the pixels of an image to the pixels that the model was trained at; 1 where one is unknown."""
    if um_per_px is None or model.um_per_px is None:
        return 1.0
    factor = um_per_px / model.um_per_px
    return 1.0 if abs(factor - 1) <= SAME_SIZE else factor


def map_of(model: TissueModel, image: NDArray[Any], um_per_px: float | None, batch_size: int) -> Tensor:
    """Tissue map of an image at its own size, seen by the model at the model's pixel size.

    Args:
        model: any.
        image: (H,W,3) uint8.
        um_per_px: pixel size of the image, None where unknown: it is taken to be the model's.
        batch_size: windows at a time.

    Returns:
        (K,H,W) float32; probabilities are resampled bilinearly, so they still sum to 1.

    Raises:
        InputError: an image that is empty, or vanishes at the model's pixel size.
    """
    import torch.nn.functional as F

    from tissuehint.data.training_sets import to_tensor

    factor = zoom_to_model(model, um_per_px)
    if factor == 1.0:
        return model.predict(image, batch_size=batch_size)
    height, width = image.shape[:2]
    size = (round(height * factor), round(width * factor))
    if min(size) < 1:
        rule = f"is smaller than one pixel at the model's {model.um_per_px:g} um per pixel"
        raise InputError(f"image of {height} x {width} pixels", rule, "check --um-per-px")
    pixels = to_tensor(image)[None]
    scaled = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
    tissue_map = model.predict(scaled[0], batch_size=batch_size)
    return F.interpolate(tissue_map[None], (height, width), mode="bilinear", align_corners=False)[0]
