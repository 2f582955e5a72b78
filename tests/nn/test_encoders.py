import os
import socket
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file

from tissuehint.errors import InputError
from tissuehint.nn.config import ChannelStatistics, EncoderConfig
from tissuehint.nn.encoders import build_encoder, pad_to_multiple

DATA = os.environ.get("TISSUEHINT_DATA")
REAL_WEIGHTS = Path(DATA or "") / "weights" / "mobilenetv2_100.imagenet1001.safetensors"

BACKBONES = [
    ("mobilenetv2_100", None, (2, 4, 8, 16, 32)),
    ("resnet18", 8, (2, 4, 8, 8, 8)),
    ("convnext_atto", 16, (4, 8, 16, 16)),
    ("swin_tiny_patch4_window7_224", None, (4, 8, 16, 32)),
    ("vit_tiny_patch16_224", None, (16, 16, 16)),
    ("hf:mit_b0", None, (4, 8, 16, 32)),
    ("hf:mit_b0", 16, (4, 8, 16, 16)),
    ("hf:mit_b0", 8, (4, 8, 8, 8)),
    ("hf:swin_tiny", None, (4, 8, 16, 32)),
    ("hf:dinov2_small", None, (14, 14, 14, 14)),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("no network in these tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def features(encoder, images):
    with torch.no_grad():
        return encoder.eval()(images)


def same(left, right):
    return len(left) == len(right) and all(
        torch.allclose(one, other, atol=1e-5) for one, other in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(("name", "output_stride", "strides"), BACKBONES)
def test_channels_and_strides_are_those_of_the_maps_at_any_size(name, output_stride, strides):
    encoder = build_encoder(EncoderConfig(name=name, output_stride=output_stride))
    assert encoder.strides == strides
    for height, width in [(64, 96), (75, 51), (33, 32)]:
        shapes = [tuple(each.shape) for each in features(encoder, torch.rand(2, 3, height, width))]
        expected = [
            (2, channels, -(-height // stride), -(-width // stride))
            for channels, stride in zip(encoder.channels, strides, strict=True)
        ]
        assert shapes == expected


def test_maps_are_those_of_timm_after_normalisation():
    encoder = build_encoder(EncoderConfig(name="resnet18", normalization="imagenet"))
    images = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    encoder.eval()
    with torch.no_grad():
        assert same(encoder(images), encoder.backbone(normalised))


@pytest.mark.parametrize(
    ("named", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5,) * 3, (0.5,) * 3),
        ("unit", (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_named_normalisation_is_the_explicit_one(named, mean, std):
    images = torch.rand(1, 3, 64, 64)
    by_name = build_encoder(EncoderConfig(name="resnet18", normalization=named))
    by_number = build_encoder(EncoderConfig(name="resnet18", normalization=ChannelStatistics(mean=mean, std=std)))
    by_number.load_state_dict(by_name.state_dict())
    assert same(features(by_name, images), features(by_number, images))


def test_configuration_round_trips_and_refuses_what_it_does_not_know():
    config = EncoderConfig(name="resnet18", normalization=ChannelStatistics(mean=(0.7, 0.5, 0.6), std=(0.2, 0.2, 0.2)))
    assert EncoderConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="extra"):
        EncoderConfig(nam="resnet18")
    with pytest.raises(ValidationError, match="std"):
        ChannelStatistics(mean=(0.5,) * 3, std=(0.5, 0.0, 0.5))
    with pytest.raises(ValidationError):
        config.name = "resnet34"


@given(height=st.integers(32, 70), width=st.integers(32, 70), multiple=st.integers(1, 33))
@settings(max_examples=30, deadline=None)
def test_padding_keeps_the_image_and_repeats_its_border(height, width, multiple):
    image = torch.rand(1, 1, height, width)
    padded = pad_to_multiple(image, multiple)
    assert padded.shape[-2] % multiple == 0
    assert padded.shape[-1] % multiple == 0
    assert padded.shape[-2] - height < multiple
    assert padded.shape[-1] - width < multiple
    assert torch.equal(padded[..., :height, :width], image)
    assert torch.equal(padded[..., height:, -1:], image[..., -1:, -1:].expand_as(padded[..., height:, -1:]))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "hf:mit_b0", "hf:swin_tiny", "hf:dinov2_small"])
def test_every_trained_parameter_has_a_gradient(name):
    encoder = build_encoder(EncoderConfig(name=name))
    sum(each.square().sum() for each in encoder(torch.rand(2, 3, 64, 64))).backward()
    assert not [key for key, value in encoder.named_parameters() if value.requires_grad and value.grad is None]


def test_random_weights_follow_the_seed():
    torch.manual_seed(3)
    one = build_encoder(EncoderConfig(name="resnet18")).state_dict()
    torch.manual_seed(3)
    two = build_encoder(EncoderConfig(name="resnet18")).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("resnet19", "did you mean resnet18"),
        ("mit_b0", "use hf:mit_b0"),
        ("hf:mit_b9", "mit_b0, mit_b1"),
        ("vit_tiny_patch16_224", "no dilated form"),
        ("hf:swin_tiny", "no dilated form"),
    ],
)
def test_names_that_cannot_be_built(name, rule):
    with pytest.raises(InputError, match=rule):
        build_encoder(EncoderConfig(name=name, output_stride=8))


def test_too_small_an_image():
    with pytest.raises(InputError, match="at least 32"):
        build_encoder(EncoderConfig(name="resnet18"))(torch.rand(1, 3, 31, 64))


def test_fixed_size_network_says_so():
    encoder = build_encoder(EncoderConfig(name="maxvit_pico_rw_256"))
    with pytest.raises(InputError, match="does not take images of 64 x 64"):
        features(encoder, torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("name", ["resnet18", "hf:mit_b0"])
def test_hub_out_of_reach_names_the_fix(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match="give the path of a weights file, or weights: none") as caught:
        build_encoder(EncoderConfig(name=name, weights="hub"))
    assert str(caught.value).startswith(f"encoder '{name}'")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not REAL_WEIGHTS.is_file(), reason="TISSUEHINT_DATA does not name a folder with the real weights")
def test_real_weights_load_all_but_the_classifier():
    config = EncoderConfig(name="mobilenetv2_100", weights=str(REAL_WEIGHTS), normalization="inception")
    encoder = build_encoder(config)
    assert {name.split(".")[0] for name in encoder.weights.ignored} == {"conv_head", "bn2", "classifier"}
    assert encoder.weights.loaded == len(encoder.backbone.state_dict())
    plain = timm.create_model("mobilenetv2_100", num_classes=1001, checkpoint_path=str(REAL_WEIGHTS)).eval()
    images = torch.randint(0, 256, (2, 3, 96, 96))
    with torch.no_grad():
        _, expected = plain.forward_intermediates(images / 127.5 - 1, indices=[0, 1, 2, 3, 4])
    assert same(features(encoder, images / 255), expected)


def test_weights_of_a_saved_file_reach_the_features(tmp_path):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=7).eval()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    encoder = build_encoder(EncoderConfig(name="resnet18", weights=str(tmp_path / "plain.safetensors")))
    images = torch.rand(1, 3, 64, 64)
    last = features(encoder, images)[-1]
    with torch.no_grad():
        assert torch.allclose(last, plain.forward_features(encoder.normalization(images)), atol=1e-5)
