"""Images whose sides no stride divides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.methods.cam import CAM, CAMConfig
from tissuehint.nn.config import EncoderConfig

SPACE = LabelSpace(names=("gland", "stroma"))


def a_method(levels: int) -> CAM:
    torch.manual_seed(0)
    config = CAMConfig(encoder=EncoderConfig(name="resnet10t"), levels=levels)
    return CAM(config, SPACE).eval()


@pytest.mark.parametrize("levels", [1, 2])
@torch.no_grad()
def test_maps_lie_where_those_of_the_continued_image_lie(levels: int) -> None:
    method, image = a_method(levels), torch.rand(1, 3, 70, 100)
    continued = F.pad(image, (0, 28, 0, 26), mode="replicate")  # 96 x 128, what the largest stride divides
    whole = F.interpolate(method.class_maps(continued).maps, (96, 128), mode="bilinear", align_corners=False)
    seen = F.interpolate(method.class_maps(image).maps, (70, 100), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen, whole[..., :70, :100])


def test_images_below_the_smallest_side_are_refused() -> None:
    with pytest.raises(InputError, match="32 pixels"):
        a_method(1).class_maps(torch.rand(1, 3, 20, 64))
