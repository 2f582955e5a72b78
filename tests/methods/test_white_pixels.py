"""What tag methods say at white pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tissuehint.labels import LabelSpace
from tissuehint.methods.cam import CAM, CAMConfig
from tissuehint.metrics import decide
from tissuehint.nn.config import EncoderConfig


@pytest.fixture(scope="module")
def method() -> CAM:
    labels = LabelSpace(names=("gland", "stroma", "white"), white=2)
    return CAM(CAMConfig(encoder=EncoderConfig(name="resnet10t")), labels).eval()


def map_of_white(method: CAM, gate: tuple[bool, bool]) -> Tensor:
    class_maps = torch.ones(1, 2, 8, 8) * torch.tensor([0.3, 1.0]).view(1, 2, 1, 1)
    class_maps[:, 0, 0, 0] = 1.0  # the maximum of gland, so that stroma leads everywhere else
    return method.tissue_map(class_maps, torch.tensor([gate]), torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("protocol", ["ignore_white", "fp_on_white"])
def test_white_pixels_keep_their_likeliest_tissue(method: CAM, protocol: str) -> None:
    decided = decide(map_of_white(method, (True, True)), 2, protocol)  # type: ignore[arg-type]
    assert (decided[0, 8:, 8:] == 1).all()


def test_white_pixels_are_white_where_it_may_be_said(method: CAM) -> None:
    tissue_map = map_of_white(method, (True, True))
    assert (decide(tissue_map, 2, "five_class") == 2).all()
    torch.testing.assert_close(tissue_map.sum(1), torch.ones(1, 32, 32))


def test_closed_classes_stay_closed_under_white(method: CAM) -> None:
    assert (map_of_white(method, (True, False))[:, 1] == 0).all()


def test_image_without_hint_has_no_white(method: CAM) -> None:
    assert (map_of_white(method, (False, False)) == 0).all()
