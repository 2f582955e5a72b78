import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import SegformerConfig, SegformerForImageClassification, SwinConfig, SwinForImageClassification

from tissuehint.errors import InputError
from tissuehint.nn.encoders import EncoderConfig, build_encoder
from tissuehint.nn.weights import read_tensors


def equals(network, state, strip=""):
    return all(torch.equal(value, state[name.removeprefix(strip)]) for name, value in network.state_dict().items())


@pytest.fixture(scope="module")
def resnet():
    return timm.create_model("resnet18", num_classes=5)


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "model.", "backbone.", "module.encoder.model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_wrappers_are_seen_through(tmp_path, resnet, prefix, suffix):
    path = tmp_path / f"weights{suffix}"
    state = {prefix + name: value for name, value in resnet.state_dict().items()}
    state["decoder.head.weight"] = torch.zeros(3)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"epoch": 3, "state_dict": state}, path)
    encoder = build_encoder(EncoderConfig(name="resnet18", weights=str(path)))
    assert equals(encoder.backbone, resnet.state_dict())
    assert encoder.weights.source == str(path)
    assert encoder.weights.loaded == 120
    assert set(encoder.weights.ignored) == {prefix + "fc.weight", prefix + "fc.bias", "decoder.head.weight"}


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_layouts_that_timm_flattens_or_wraps(tmp_path, name):
    plain = timm.create_model(name)
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    encoder = build_encoder(EncoderConfig(name=name, weights=str(tmp_path / "weights.pt")))
    assert encoder.weights.loaded == len(encoder.backbone.state_dict())
    want = {key.replace(".", "_"): value for key, value in plain.state_dict().items()}
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, want[key.removeprefix("model.").replace(".", "_")])


def test_our_own_encoder_reads_its_own_state(tmp_path):
    for name in ("vit_tiny_patch16_224", "hf:mit_b0"):
        torch.manual_seed(1)
        saved = build_encoder(EncoderConfig(name=name))
        torch.save(saved.state_dict(), tmp_path / "own.pt")
        torch.manual_seed(2)
        read = build_encoder(EncoderConfig(name=name, weights=str(tmp_path / "own.pt")))
        assert equals(read, saved.state_dict())


def test_published_segformer_layout(tmp_path):
    published = SegformerForImageClassification(SegformerConfig())
    published.save_pretrained(tmp_path)  # writes the names of the files on the hub
    names = read_tensors(tmp_path / "model.safetensors")
    assert "segformer.encoder.block.0.0.attention.self.query.weight" in names
    config = EncoderConfig(name="hf:mit_b0", output_stride=16, weights=str(tmp_path / "model.safetensors"))
    encoder = build_encoder(config)
    assert equals(encoder.backbone.backbone, published.segformer.state_dict())
    assert set(encoder.weights.ignored) == {"classifier.weight", "classifier.bias"}
    assert encoder.training
    assert encoder.backbone.training


def test_published_swin_layout(tmp_path):
    published = SwinForImageClassification(SwinConfig())
    published.save_pretrained(tmp_path)
    path = str(tmp_path / "model.safetensors")
    encoder = build_encoder(EncoderConfig(name="hf:swin_tiny", weights=path))
    state = encoder.backbone.backbone.state_dict()
    for name, value in published.swin.state_dict().items():
        if not name.startswith("layernorm"):
            assert torch.equal(state[f"swin.{name}"], value)
    with pytest.raises(InputError, match="hf:swin_small"):
        build_encoder(EncoderConfig(name="hf:swin_small", weights=path))
    with pytest.raises(InputError, match="hf:mit_b0"):
        build_encoder(EncoderConfig(name="hf:mit_b0", weights=path))


@pytest.mark.parametrize(("channels", "depths"), [((64, 128, 320, 512), (2,) * 4), ((32, 64, 160, 256), (3,) * 4)])
def test_another_segformer_is_refused(tmp_path, channels, depths):
    SegformerForImageClassification(SegformerConfig(hidden_sizes=channels, depths=depths)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="change the encoder's name"):
        build_encoder(EncoderConfig(name="hf:mit_b0", weights=str(tmp_path / "model.safetensors")))


@pytest.mark.parametrize(
    ("file_of", "read_as", "rule"),
    [
        ("resnet18", "resnet34", "has 100 of the 180 tensors"),
        ("resnet34", "resnet18", "more than this architecture"),
        ("mobilenetv2_050", "mobilenetv2_100", "the encoder needs"),
        ("resnet18", "mobilenetv2_100", "missing: "),
    ],
)
def test_another_architecture_is_refused(tmp_path, file_of, read_as, rule):
    path = tmp_path / "other.safetensors"
    save_file(timm.create_model(file_of).state_dict(), path)
    with pytest.raises(InputError, match=rule) as caught:
        build_encoder(EncoderConfig(name=read_as, weights=str(path)))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def read_error(path):
    with pytest.raises(InputError) as caught:
        build_encoder(EncoderConfig(name="resnet18", weights=str(path)))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files(tmp_path, resnet, suffix):
    path = tmp_path / f"cut{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(resnet.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "get the file again" in read_error(path)


def test_unusable_files(tmp_path):
    assert "does not exist" in read_error(tmp_path / "absent.pth")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    assert "end in .safetensors" in read_error(tmp_path / "weights.onnx")
    (tmp_path / "text.pt").write_text(json.dumps({"a": 1}))
    assert "cannot be read" in read_error(tmp_path / "text.pt")
    torch.save({"epoch": 3, "loss": [0.5]}, tmp_path / "empty.pt")
    assert "no named tensors" in read_error(tmp_path / "empty.pt")
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensors" in read_error(tmp_path / "empty.safetensors")


class Trap:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": Trap()}, tmp_path / "trap.pth")
    assert "save its state_dict as .safetensors" in read_error(tmp_path / "trap.pth")
    assert "code ran" not in capsys.readouterr().out
