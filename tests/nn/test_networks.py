import pytest
import timm
import torch
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
    ("unet", "smp:resnet18"),
    ("unet", "swin_tiny_patch4_window7_224"),
    ("segformer", "hf:mit_b0"),
    ("deeplabv3plus", "hf:mit_b0"),
]


def network(architecture="unet", name="mobilenetv2_100", num_classes=3, decoder=None, **encoder):
    config = NetworkConfig(
        architecture=architecture, encoder=EncoderConfig(name=name, **encoder), decoder=decoder or {}
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
