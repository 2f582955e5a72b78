import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file

from tissuehint.errors import InputError
from tissuehint.nn.config import ChannelStatistics, EncoderConfig, NetworkConfig
from tissuehint.nn.networks import build_network

PAIRS = [
    *(
        (architecture, "mobilenetv2_100")
        for architecture in (
            *("unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan"),
            *("deeplabv3", "deeplabv3plus", "upernet", "segformer", "deeplab_v2"),
        )
    ),
    ("dpt", "vit_tiny_patch16_224"),
    ("pspnet", "resnest14d"),
    ("pspnet", "resnest200e"),  # of the gland paper
    ("unet", "smp:resnet18"),
    ("unet", "swin_tiny_patch4_window7_224"),
    ("segformer", "hf:mit_b0"),
    ("deeplabv3plus", "hf:mit_b0"),
]


def network(architecture="unet", name="mobilenetv2_100", num_classes=3, decoder=None, scale=1.0, **encoder):
    config = NetworkConfig(
        architecture=architecture, encoder=EncoderConfig(name=name, **encoder), decoder=decoder or {}, scale=scale
    )
    return build_network(config, num_classes)


@pytest.mark.parametrize(("architecture", "name"), PAIRS)
def test_logits_are_at_image_size_for_any_size(architecture, name):
    built = network(architecture, name).eval()
    for height, width in [(64, 64), (32, 33), (75, 51)]:
        with torch.no_grad():
            logits = built(torch.rand(1, 3, height, width))
        assert logits.shape == (1, 3, height, width)
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("architecture", ["unet", "deeplab_v2"])
def test_padding_is_the_repeated_border_and_does_not_move_the_image(architecture):
    built = network(architecture).eval()
    image = torch.rand(1, 3, 50, 41)
    padded = torch.cat([image, image[..., -1:].expand(-1, -1, -1, 64 - 41)], dim=3)
    padded = torch.cat([padded, padded[..., -1:, :].expand(-1, -1, 64 - 50, -1)], dim=2)
    with torch.no_grad():
        if built.multiple == 32:
            assert torch.equal(built(image), built(padded)[..., :50, :41])
        else:
            assert torch.equal(built(image), built(padded[..., :56, :48])[..., :50, :41])


@pytest.mark.parametrize(
    ("named", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5,) * 3, (0.5,) * 3),
        (ChannelStatistics(mean=(0.7, 0.5, 0.6), std=(0.1, 0.2, 0.3)), (0.7, 0.5, 0.6), (0.1, 0.2, 0.3)),
    ],
)
@pytest.mark.parametrize("architecture", ["unet", "deeplab_v2"])
def test_normalisation_is_inside(architecture, named, mean, std):
    built = network(architecture, "resnet18", normalization=named).eval()
    images = torch.rand(2, 3, 64, 64)
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        assert torch.allclose(built(images), built.network(normalised), atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("unet", "resnet18"), ("pspnet", "resnet18"), ("deeplab_v2", "resnet18"), ("unet", "smp:resnet18")],
)
def test_weights_of_a_path_go_into_the_encoder(tmp_path, architecture, name):
    plain = timm.create_model("resnet18", num_classes=9)
    path = tmp_path / "weights.safetensors"
    save_file(plain.state_dict(), path)
    built = network(architecture, name, weights=str(path))
    encoder = getattr(built.encoder, "model", built.encoder).state_dict()
    assert built.weights.loaded == len(encoder)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in encoder.items())


def test_weights_of_other_families(tmp_path):
    for architecture, name in (("dpt", "vit_tiny_patch16_224"), ("unet", "convnext_atto"), ("pspnet", "convnext_atto")):
        path = tmp_path / f"{name}.safetensors"
        plain = timm.create_model(name, num_classes=9)
        save_file(plain.state_dict(), path)
        built = network(architecture, name, weights=str(path))
        want = {key.replace(".", "_"): value for key, value in plain.state_dict().items()}
        state = built.encoder.model.state_dict()
        assert built.weights.loaded == len(state)
        assert all(torch.equal(value, want[key.replace(".", "_")]) for key, value in state.items())


def test_weights_of_a_transformers_encoder(tmp_path):
    torch.manual_seed(1)
    saved = network("segformer", "hf:mit_b0")
    torch.save(saved.encoder.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(2)
    read = network("segformer", "hf:mit_b0", weights=str(tmp_path / "weights.pt"))
    state = saved.encoder.state_dict()
    assert read.weights.loaded == len(state)
    assert all(torch.equal(value, state[key]) for key, value in read.encoder.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet34").state_dict(), path)
    for architecture, name in (("unet", "resnet18"), ("deeplab_v2", "resnet18"), ("unet", "smp:resnet18")):
        with pytest.raises(InputError, match="more than this architecture"):
            network(architecture, name, weights=str(path))


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("unet", "resnet18"), ("unet", "smp:resnet18"), ("unet", "hf:mit_b0"), ("deeplab_v2", "resnet18")],
)
def test_hub_out_of_reach_names_the_fix(architecture, name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="give the path of a weights file, or weights: none"):
        network(architecture, name, weights="hub")


def test_every_parameter_learns():
    built = network("unet", "resnet18")
    built(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert all(each.grad is not None for each in built.parameters())


def test_decoder_options_reach_the_network():
    small = network(decoder={"decoder_channels": [32, 16, 8, 8, 4]})
    assert sum(each.numel() for each in small.parameters()) < sum(each.numel() for each in network().parameters())
    assert len(network("deeplab_v2", decoder={"rates": [2, 4]}).network.aspp.branches) == 2
    deep = network("pspnet", decoder={"encoder_depth": 5}).eval()
    with torch.no_grad():
        assert deep(torch.rand(1, 3, 70, 64)).shape == (1, 3, 70, 64)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"architecture": "unnet"}, "is not one of .*unet"),
        ({"name": "mit_b0"}, "use hf:mit_b0"),
        ({"name": "smp:mit_b0"}, "use hf:mit_b0"),
        ({"name": "smp:resnet19"}, "try smp: resnet1"),
        ({"name": "resnet19"}, "did you mean resnet18"),
        ({"name": "vit_tiny_patch16_224"}, "cannot be built with encoder 'vit_tiny_patch16_224'"),
        ({"name": "hf:dinov2_small"}, "has one stride"),
        ({"architecture": "deeplabv3", "name": "swin_tiny_patch4_window7_224"}, "output_stride"),
        ({"decoder": {"decoder_chanels": [1]}}, "did you mean 'decoder_channels'"),
        ({"decoder": {"activation": "softmax"}}, "option 'activation'"),
        ({"architecture": "deeplab_v2", "decoder": {"rate": [1]}}, "did you mean 'rates'"),
        ({"num_classes": 0}, "not at least 1"),
    ],
)
def test_what_cannot_be_built(options, rule):
    with pytest.raises(InputError, match=rule) as caught:
        network(**options)
    assert "\n" not in str(caught.value)


def test_too_small_an_image():
    with pytest.raises(InputError, match="at least 32"):
        network()(torch.rand(1, 3, 64, 31))


def test_configuration_round_trips_and_leaves_the_stride_to_the_architecture():
    config = NetworkConfig(
        architecture="deeplab_v2", encoder=EncoderConfig(name="resnet18"), decoder={"rates": [6, 12]}
    )
    assert NetworkConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="decided by the architecture"):
        NetworkConfig(encoder=EncoderConfig(output_stride=8))


def padded_by_hand(images, multiple):
    rows = torch.arange(-(-images.shape[-2] // multiple) * multiple).clamp(max=images.shape[-2] - 1)
    columns = torch.arange(-(-images.shape[-1] // multiple) * multiple).clamp(max=images.shape[-1] - 1)
    return images[..., rows[:, None], columns]


@pytest.mark.parametrize(("architecture", "name"), PAIRS)
def test_logits_are_those_of_the_inner_network_bit_by_bit(architecture, name):
    built = network(architecture, name).eval()
    images = torch.rand(1, 3, 70, 45)
    with torch.no_grad():
        padded = padded_by_hand(images, built.multiple)
        expected = built.network(built.normalization(padded))
        if expected.shape[-2:] != padded.shape[-2:]:
            expected = F.interpolate(expected, padded.shape[-2:], mode="bilinear", align_corners=False)
        assert torch.equal(built(images), expected[..., :70, :45])


@pytest.mark.parametrize(("architecture", "name"), PAIRS)
def test_dense_gives_features_beside_the_logits_of_every_pixel(architecture, name):
    built = network(architecture, name).eval()
    for height, width in [(64, 96), (75, 51)]:
        images = torch.rand(2, 3, height, width)
        with torch.no_grad():
            features, logits = built.dense(images)
            assert torch.equal(logits, built(images))
        assert features.shape[0] == 2
        assert features.shape[2:] == (height, width) == built.grid(height, width)
        assert features.shape[1] > 1
        assert torch.isfinite(features).all()
    assert not built.network.segmentation_head._forward_pre_hooks


@pytest.mark.parametrize("architecture", ["unet", "manet", "unetplusplus", "linknet"])
def test_features_are_what_the_head_sees(architecture):
    built = network(architecture).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        features, logits = built.dense(images)
        assert torch.equal(built.network.segmentation_head(features), logits)


@pytest.mark.parametrize("architecture", ["fpn", "deeplabv3plus"])
def test_features_that_are_enlarged_lie_where_the_logits_lie(architecture):
    """A classifier of 1 x 1 commutes with bilinear enlargement, if both are enlarged in the same way."""
    built = network(architecture).eval()
    with torch.no_grad():
        features, logits = built.dense(torch.rand(1, 3, 96, 64))
        assert torch.allclose(built.network.segmentation_head[0](features), logits, atol=1e-5)


def test_features_of_deeplab_v2_are_the_map_that_its_classifier_sees():
    built = network("deeplab_v2", "resnet18").eval()
    images = torch.rand(1, 3, 61, 64)
    several = network("deeplab_v2", "resnet18", decoder={"scales": [0.5, 1.0, 0.75]}).eval()
    several.load_state_dict(built.state_dict())
    with torch.no_grad():
        maps = built.network.encoder(built.normalization(padded_by_hand(images, 8)))[-1]
        expected = F.interpolate(maps, (64, 64), mode="bilinear", align_corners=False)[..., :61, :]
        assert torch.equal(built.dense(images).features, expected)
        assert torch.equal(several.dense(images).features, expected)


def test_features_carry_the_gradient():
    built = network("fpn", "resnet18")
    features, logits = built.dense(torch.rand(2, 3, 64, 64))
    features.square().sum().backward()
    assert all(each.grad is not None for each in built.network.decoder.parameters())
    assert all(each.grad is None for each in built.network.segmentation_head.parameters())
    assert logits.requires_grad


@pytest.mark.parametrize("architecture", ["unet", "fpn", "pspnet", "deeplabv3plus", "segformer", "manet", "deeplab_v2"])
@pytest.mark.parametrize("scale", [0.5, 0.37])
def test_a_smaller_scale_is_the_network_on_the_shrunk_image(architecture, scale):
    built = network(architecture, scale=scale).eval()
    plain = network(architecture).eval()
    plain.load_state_dict(built.state_dict())
    images = torch.rand(1, 3, 131, 98)
    size = (round(131 * scale), round(98 * scale))
    small = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        dense, expected = built.dense(images), plain.dense(small)
        assert torch.equal(dense.logits, expected.logits)
        assert torch.equal(dense.features, expected.features)
        assert dense.logits.shape[-2:] == size == built.grid(131, 98)
        enlarged = F.interpolate(plain(small), (131, 98), mode="bilinear", align_corners=False)
        assert torch.equal(built(images), enlarged)


def test_scale_has_a_range_and_a_smallest_image():
    for scale in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValidationError, match="scale"):
            NetworkConfig(scale=scale)
    built = network(scale=0.25).eval()
    with pytest.raises(InputError, match="a larger scale") as caught:
        built(torch.rand(1, 3, 120, 300))
    assert str(caught.value).startswith("image of 120 x 300 pixels at scale 0.25 (30 x 75)")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a larger scale"):
        built.dense(torch.rand(1, 3, 1, 300))
