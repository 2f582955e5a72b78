from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tissuehint.nn.class_maps import ClassMapNetwork, ClassMapSettings
from tissuehint.nn.encoders import EncoderConfig, build_encoder
from tissuehint.nn.receptive_field import cell_centres, moved

# map, and its index, whose receptive field ends inside an image of 224 px
SEEN = [
    ("resnet10t", 1),
    ("resnet18", 1),
    ("mobilenetv2_100", 2),
    ("mobilenetv3_small_050", 0),
    ("tf_efficientnet_lite0", 1),
    ("convnext_atto", 0),
    ("densenet121", 0),
    ("resnet38d", 1),
]


@pytest.mark.parametrize(("name", "level"), SEEN)
def test_centre_is_the_middle_of_what_a_gradient_reaches(name, level):
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name=name)).eval()
    image = torch.rand(1, 3, 224, 224, requires_grad=True)
    cells = encoder(image)[level]
    middle = cells.shape[-1] // 2
    (gradient,) = torch.autograd.grad(cells[0, :, middle, middle].square().sum(), image)
    stride = encoder.strides[level]
    for axis in (0, 1):
        reached = gradient[0].abs().sum(0).sum(1 - axis).nonzero()[:, 0]
        first, last = int(reached[0]), int(reached[-1])
        assert first > 0, "the receptive field reaches the border: take a finer map"
        assert last < 223
        assert (first + last + 1) / 2 - middle * stride == pytest.approx(cell_centres(encoder)[level], abs=0.01)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "convnext_atto"])
def test_patches_that_do_not_overlap_are_centred(name):
    encoder = build_encoder(EncoderConfig(name=name))
    assert cell_centres(encoder) == tuple(stride / 2 for stride in encoder.strides)


def test_shortcuts_and_reduced_keys_do_not_count():
    assert cell_centres(build_encoder(EncoderConfig(name="resnet50d"))) == (0.5,) * 5
    assert cell_centres(build_encoder(EncoderConfig(name="hf:mit_b0"))) == (0.5,) * 4


def test_generators_and_mode_stay():
    encoder = build_encoder(EncoderConfig(name="resnet10t")).train()
    state = torch.get_rng_state()
    cell_centres(encoder)
    assert encoder.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in encoder.modules())


@given(st.integers(1, 7), st.integers(1, 7), st.floats(-3, 3))
def test_moved_reads_between_cells(height, width, cells):
    """A ramp is moved exactly, up to its ends."""
    rows, columns = torch.meshgrid(torch.arange(height * 1.0), torch.arange(width * 1.0), indexing="ij")
    found = moved((rows + 10 * columns)[None, None], cells)[0, 0]
    expected = (rows + cells).clamp(0, height - 1) + 10 * (columns + cells).clamp(0, width - 1)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "tf_efficientnet_lite0"])
def test_a_centred_map_follows_a_mirrored_image(name):
    """What a network says of a mirrored image is what it says of the image, mirrored: with kernels that are the same
    from both sides nothing else than where cells lie is left.
    """
    disagreements = {}
    for centred in (False, True):
        torch.manual_seed(0)
        network = ClassMapNetwork(
            ClassMapSettings(encoder=EncoderConfig(name=name), levels=2, centred=centred), 3
        ).eval()
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                with torch.no_grad():
                    module.weight.copy_((module.weight + module.weight.flip(-1)) / 2)
        coarse = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        images = F.interpolate(coarse, (256, 256), mode="bilinear")
        with torch.no_grad():
            plain, mirrored = network(images).maps, network(images.flip(-1)).maps.flip(-1)
        inner = (..., slice(3, -3))
        spread = plain[inner].std()
        disagreements[centred] = float((plain[inner] - mirrored[inner]).abs().mean() / spread)
    assert disagreements[True] < 0.6 * disagreements[False]
