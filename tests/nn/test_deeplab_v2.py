import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tissuehint.errors import InputError
from tissuehint.nn.config import EncoderConfig
from tissuehint.nn.deeplab_v2 import PAPER_SCALES, AtrousPyramid, DeepLabV2

TRUNK = EncoderConfig(name="resnet18")


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def atrous_by_hand(image, weight, bias, rate):
    """Equation 1 of the paper, tap by tap: y[i] = b + sum over k of x[i + r k] w[k]."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (rate,) * 4)
    total = bias.view(1, -1, 1, 1).expand(image.shape[0], -1, height, width).clone()
    for row in range(3):
        for column in range(3):
            window = padded[..., row * rate : row * rate + height, column * rate : column * rate + width]
            total += torch.einsum("bchw,kc->bkhw", window, weight[:, :, row, column])
    return total


def test_pyramid_is_the_sum_of_its_atrous_branches():
    pyramid = AtrousPyramid(8, 3).double()
    for branch in pyramid.branches:
        torch.nn.init.normal_(branch.bias)
    features = torch.rand(2, 8, 20, 13, dtype=torch.float64)
    rates = (6, 12, 18, 24)
    expected = sum(
        atrous_by_hand(features, branch.weight, branch.bias, rate)
        for branch, rate in zip(pyramid.branches, rates, strict=True)
    )
    assert torch.allclose(pyramid(features), expected, atol=1e-12)


def test_a_branch_sees_its_rate_and_nothing_between():
    pyramid = AtrousPyramid(1, 1, rates=(6,))
    torch.nn.init.ones_(pyramid.branches[0].weight)
    image = torch.zeros(1, 1, 31, 31)
    image[..., 15, 15] = 1
    lit = pyramid(image)[0, 0].nonzero().tolist()
    assert lit == [[row, column] for row in (9, 15, 21) for column in (9, 15, 21)]


def test_output_stride_is_8_and_logits_are_at_image_size():
    network = DeepLabV2(TRUNK, num_classes=5).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        coarse = network.coarse(images)
        assert coarse.shape == (1, 5, 8, 12)
        expected = F.interpolate(coarse, (64, 96), mode="bilinear", align_corners=False)
        assert torch.equal(network(images), expected)


def test_dilation_keeps_the_weights_of_the_undilated_trunk(tmp_path):
    plain = timm.create_model("resnet18")
    save_file(plain.state_dict(), tmp_path / "trunk.safetensors")
    network = DeepLabV2(EncoderConfig(name="resnet18", weights=str(tmp_path / "trunk.safetensors")), 2)
    assert network.weights.loaded == 120
    assert torch.equal(network.encoder.layer4[1].conv2.weight, plain.layer4[1].conv2.weight)
    assert network.encoder.layer3[1].conv2.dilation == (2, 2)
    assert network.encoder.layer4[1].conv2.dilation == (4, 4)


def test_scales_are_fused_by_their_maximum():
    torch.manual_seed(0)
    fused = DeepLabV2(TRUNK, 3, scales=PAPER_SCALES).eval()
    single = DeepLabV2(TRUNK, 3).eval()
    single.load_state_dict(fused.state_dict())
    images = torch.rand(1, 3, 64, 64)

    def at(side):
        small = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
        return F.interpolate(single.coarse(small), (64, 64), mode="bilinear", align_corners=False)

    with torch.no_grad():
        expected = torch.maximum(torch.maximum(at(64), at(48)), at(32))
        assert torch.allclose(fused(images), expected, atol=1e-6)


def test_size_of_the_papers_network():
    with torch.device("meta"):
        trunk = count(DeepLabV2(EncoderConfig(name="resnet101"), 21).encoder)
        whole = count(DeepLabV2(EncoderConfig(name="resnet101"), 21))
    classifier = 2048 * 1000 + 1000
    assert trunk == 44_549_160 - classifier  # the published ResNet-101 without its classifier
    assert whole == trunk + 4 * (2048 * 9 * 21 + 21) == 44_048_532


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"rates": (6, 0)}, "rates"), ({"rates": ()}, "rates"), ({"scales": ()}, "scales"), ({"scales": (-1,)}, "scales")],
)
def test_bad_options(options, rule):
    with pytest.raises(InputError, match=rule):
        DeepLabV2(TRUNK, 2, **options)


def test_a_trunk_that_cannot_dilate():
    with pytest.raises(InputError, match="no dilated form of output stride 8"):
        DeepLabV2(EncoderConfig(name="swin_tiny_patch4_window7_224"), 2)
