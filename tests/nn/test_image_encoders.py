import os
import re
import socket
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file

from tissuehint.errors import InputError
from tissuehint.nn import image_towers
from tissuehint.nn.config import ChannelStatistics
from tissuehint.nn.image_encoders import (
    CATALOG,
    ImageEncoderConfig,
    RandomEncoderWarning,
    build_image_encoder,
    feature_dim,
)

DATA = os.environ.get("TISSUEHINT_DATA")
REAL_WEIGHTS = Path(DATA or "") / "weights" / "mobilenetv2_100.imagenet1001.safetensors"

# names that transformers gave the parts of an attention block before version 5
OLD_PARTS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("no network in these tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def build(**words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomEncoderWarning)
        return build_image_encoder(ImageEncoderConfig(**words))


def refused(*words, **config):
    """The configuration is refused in one line that says all words."""
    with pytest.raises(InputError) as caught:
        build(**config)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in words:
        assert str(word) in message, (word, message)


def cloned(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def old_swin(name):
    """The name in MedCLIP's file, which transformers 4 wrote."""
    name = re.sub(r"attention\.([qkv]_proj)", lambda found: f"attention.self.{OLD_PARTS[found[1]]}", name)
    for new, old in (
        ("attention.o_proj", "attention.output.dense"),
        ("attention.relative_position_bias.", "attention.self."),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(new, old)
    return name


def medclip_file(encoder, **changes):
    """What the authors' file has: both towers, the scale, and the tensors that are computed at construction."""
    state = {old_swin(f"vision_model.{name}"): tensor for name, tensor in encoder.tower.state_dict().items()}
    state["vision_model.model.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(49, 49)
    state["text_model.model.embeddings.word_embeddings.weight"] = torch.zeros(7, 8)
    state["text_model.projection_head.weight"] = torch.zeros(512, 8)
    state["logit_scale"] = torch.tensor(2.66)
    return {**cloned(state), **changes}


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def medclip():
    return build(name="medclip", seed=1)


@pytest.fixture(scope="module")
def clip():
    return build(name="clip", seed=1)


@pytest.fixture(scope="module")
def small():
    return build(name="mobilenetv3_small_050")


# --- what an encoder is


def test_vectors_are_those_of_the_network_behind_resize_and_normalisation(small):
    images = torch.rand(2, 3, 300, 260)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    resized = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
    normalised = (resized - mean[:, None, None]) / std[:, None, None]
    vectors = small(images)
    assert vectors.shape == (2, small.dim) == (2, 1024)
    assert torch.allclose(vectors, small.encode(normalised), atol=1e-5)
    assert torch.allclose(vectors, small.tower.network(normalised), atol=1e-5)


def test_small_images_are_enlarged_and_images_of_the_side_are_left_alone(small, images):
    assert small.resize(images) is images
    tiny = torch.rand(1, 3, 50, 64)
    assert torch.equal(small.resize(tiny), F.interpolate(tiny, (224, 224), mode="bilinear"))


def test_pooled_features_of_a_convolutional_network_include_its_head_convolution():
    encoder = build(name="mobilenetv2_100", side=64)
    maps = encoder.tower.network.forward_features(torch.ones(1, 3, 64, 64))
    assert encoder.dim == maps.shape[1] == 1280
    assert torch.allclose(encoder.encode(torch.ones(1, 3, 64, 64)), maps.mean((2, 3)), atol=1e-5)


def test_nothing_is_trained_but_gradients_reach_the_images(small, medclip, clip, images):
    for encoder in (small, medclip, clip):
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        assert encoder.train() is encoder
        assert not any(module.training for module in encoder.modules())
        leaf = images[:1].clone().requires_grad_()
        encoder(leaf).square().sum().backward()
        assert leaf.grad.abs().sum() > 0
        assert all(parameter.grad is None for parameter in encoder.parameters())


def test_a_batch_norm_keeps_its_statistics_under_train(small, images):
    before = cloned(small.state_dict())
    alone = small.train()(images[:1])
    assert torch.allclose(alone, small(images)[:1], atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_images_of_another_shape_are_refused(small):
    for wrong in (torch.rand(3, 224, 224), torch.rand(1, 4, 224, 224)):
        with pytest.raises(InputError, match=r"\(B,3,H,W\)"):
            small(wrong)
    with pytest.raises(InputError, match=r"\(B,3,224,224\)"):
        small.encode(torch.rand(1, 3, 112, 224))


def test_normalisation_belongs_to_the_encoder_or_to_the_configuration():
    assert build(name="mobilenetv3_small_050", side=64).statistics.mean == (0.485, 0.456, 0.406)
    assert build(name="mobilenetv3_small_050", side=64, normalization="unit").statistics.std == (1.0, 1.0, 1.0)
    explicit = ChannelStatistics(mean=(0.7, 0.5, 0.7), std=(0.2, 0.2, 0.2))
    assert build(name="mobilenetv3_small_050", side=64, normalization=explicit).statistics == explicit
    # timm's own default of this network is mean and std 0.5
    assert build(name="vit_tiny_patch16_224").statistics.mean == (0.5, 0.5, 0.5)


# --- seeds


def test_random_weights_come_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one = build(name="mobilenetv3_small_050", side=32, seed=5, projection=16)
    assert torch.equal(torch.rand(3), expected)
    again = build(name="mobilenetv3_small_050", side=32, seed=5, projection=16)
    other = build(name="mobilenetv3_small_050", side=32, seed=6, projection=16)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()


def test_random_weights_are_told_once_with_the_fix():
    with pytest.warns(RandomEncoderWarning, match=r"mobilenetv3_small_050.*weights: PATH or weights: hub") as caught:
        build_image_encoder(ImageEncoderConfig(name="mobilenetv3_small_050", side=32))
    assert len([one for one in caught if one.category is RandomEncoderWarning]) == 1
    assert caught[0].filename == __file__


def test_random_projection_is_linear_and_bounded_as_a_new_layer(images):
    plain = build(name="mobilenetv3_small_050")
    projected = build(name="mobilenetv3_small_050", projection=24)
    weight = projected.projection.weight
    assert weight.shape == (24, 1024)
    assert projected.projection.bias is None
    assert 0.9 / 32 < weight.abs().max() <= 1 / 32
    assert projected.dim == 24
    assert torch.allclose(projected(images), plain(images) @ weight.T, atol=1e-5)


def test_a_trained_projection_takes_no_random_one_behind_it():
    for name in ("medclip", "clip", "plip"):
        with pytest.raises(ValidationError, match="trained projection"):
            ImageEncoderConfig(name=name, projection=512)
    assert feature_dim(ImageEncoderConfig(name="swin_imagenet", projection=512)) == 512


# --- fingerprints


def test_fingerprint_is_of_the_weights_and_not_of_their_file(small, tmp_path):
    state = cloned(small.tower.network.state_dict())
    save_file(state, tmp_path / "one.safetensors")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "two.pth")
    words = {"name": "mobilenetv3_small_050"}
    one, two = (build(**words, weights=str(tmp_path / name)) for name in ("one.safetensors", "two.pth"))
    assert one.fingerprint() == two.fingerprint() == small.fingerprint()
    assert build(**words, weights=str(tmp_path / "one.safetensors"), side=64).fingerprint() != one.fingerprint()
    grey = build(**words, weights=str(tmp_path / "one.safetensors"), normalization="inception")
    assert grey.fingerprint() != one.fingerprint()
    with torch.no_grad():
        next(iter(two.tower.parameters())).view(-1)[0] += 1
    assert two.fingerprint() != one.fingerprint()


# --- the catalog


@pytest.mark.parametrize("name", CATALOG)
def test_architectures_of_the_catalog_are_what_it_says(name):
    row = CATALOG[name]
    assert feature_dim(ImageEncoderConfig(name=name)) == row.dim
    with torch.device("meta"):
        tower = image_towers.TimmTower(name) if row.family == "timm" else image_towers.TransformersTower(row)
    tower.eval()
    assert sum(each.numel() for each in tower.parameters()) / 1e6 == pytest.approx(row.parameters, abs=0.06)
    if row.family == "timm":
        with torch.no_grad():
            assert tower(torch.empty(1, 3, row.side, row.side, device="meta")).shape == (1, row.dim)
    assert row.hub or row.origin
    assert row.access in ("open", "gated", "see hub page")


def test_virchow_is_the_class_token_and_the_mean_of_the_patches(monkeypatch):
    class Tokens(torch.nn.Module):
        num_prefix_tokens = 5

        def forward(self, images):
            return torch.arange(7.0).view(1, 7, 1).expand(1, 7, 4)

    monkeypatch.setattr(image_towers, "_timm_network", lambda *_: Tokens())
    vector = image_towers.TimmTower("virchow2")(torch.zeros(1))
    assert vector.tolist() == [[0.0] * 4 + [5.5] * 4]


def test_feature_dim_is_that_of_timm_without_weights():
    assert feature_dim(ImageEncoderConfig(name="resnet50")) == 2048
    assert feature_dim(ImageEncoderConfig(name="convnext_atto", side=64)) == 320
    assert feature_dim(ImageEncoderConfig(name="vit_tiny_patch16_224", side=256)) == 192


@pytest.mark.parametrize(
    ("name", "side"), [("medclip", 192), ("clip", 240), ("dinov2", 256), ("phikon", 100), ("uni2", 256)]
)
def test_sides_that_a_catalog_encoder_does_not_take_are_refused(name, side):
    refused(name, side, CATALOG[name].multiple, name=name, side=side)
    with pytest.raises(InputError):
        feature_dim(ImageEncoderConfig(name=name, side=side))


def test_other_sides_interpolate_the_positions(medclip, clip):
    assert medclip.tower(torch.rand(1, 3, 256, 256)).shape == (1, 512)
    assert clip.tower(torch.rand(1, 3, 64, 64)).shape == (1, 512)
    assert build(name="vit_tiny_patch16_224", side=64)(torch.rand(1, 3, 64, 64)).shape == (1, 192)


def test_errors_of_names_and_sides_are_one_line():
    refused("medclip", name="medclp")
    refused("methods --encoders", name="zzzzzzzzzz")
    refused("resnet50", name="resnet50.no_such_tag")
    refused("100 x 100", "vit_tiny_patch16_224", name="vit_tiny_patch16_224", side=100)
    with pytest.raises(ValidationError, match="side"):
        ImageEncoderConfig(side=0)
    with pytest.raises(ValidationError, match="extra"):
        ImageEncoderConfig(nam="clip")


def test_configuration_round_trips():
    statistics = ChannelStatistics(mean=(0.7, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    config = ImageEncoderConfig(name="swin_imagenet", projection=512, normalization=statistics)
    assert ImageEncoderConfig.model_validate_json(config.model_dump_json()) == config


# --- MedCLIP


def test_medclip_is_read_from_the_file_of_its_authors(medclip, images, tmp_path):
    torch.save(medclip_file(medclip), tmp_path / "pytorch_model.bin")
    for place in (tmp_path, tmp_path / "pytorch_model.bin"):
        read = build(name="medclip", weights=str(place), seed=2)
        assert torch.equal(read(images), medclip(images))
        assert read.fingerprint() == medclip.fingerprint()
    assert read.weights.loaded == len(medclip.tower.state_dict())
    assert {"logit_scale", "text_model.projection_head.weight"} <= set(read.weights.ignored)
    assert not any(name.endswith("query.weight") for name in read.weights.ignored)


def test_medclip_is_read_from_its_vision_tower_alone(medclip, tmp_path):
    save_file(cloned(medclip.tower.state_dict()), tmp_path / "tower.safetensors")
    read = build(name="medclip", weights=str(tmp_path / "tower.safetensors"), seed=2)
    assert read.fingerprint() == medclip.fingerprint()
    assert read.weights.ignored == ()


def test_medclip_files_that_do_not_fit_are_refused(medclip, tmp_path):
    path = tmp_path / "pytorch_model.bin"

    def written(state):
        torch.save(state, path)
        return {"name": "medclip", "weights": str(path)}

    whole = medclip_file(medclip)
    norm, head = "vision_model.model.layernorm.weight", "vision_model.projection_head.weight"
    refused(path, "layernorm.weight", **written({n: t for n, t in whole.items() if n != norm}))
    refused(path, "projection_head.weight", **written({n: t for n, t in whole.items() if n != head}))
    refused(path, "[256, 768]", "[512, 768]", **written({**whole, head: torch.zeros(256, 768)}))
    deeper = {"vision_model.model.encoder.layers.0.blocks.2.layernorm_before.weight": torch.zeros(96)}
    refused(path, "more than", "blocks.2", **written({**whole, **deeper}))
    wide = {"vision_model.model.layernorm.weight": torch.zeros(1024)}
    refused(path, "shapes", **written({**whole, **wide}))
    text = {n: t for n, t in whole.items() if n.startswith("text_model") or n == head}
    refused(path, "none of the", **written(text))
    refused(tmp_path / "gone.bin", "does not exist", name="medclip", weights=str(tmp_path / "gone.bin"))
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "pytorch_model.bin", name="medclip", weights=str(tmp_path / "empty"))


def test_medclip_names_where_its_weights_are(medclip):
    refused("medclip", "storage.googleapis.com", "pytorch_model.bin", name="medclip", weights="hub")
    assert medclip.statistics.mean == (0.5862785803043838,) * 3
    with pytest.warns(RandomEncoderWarning, match=r"storage\.googleapis\.com"):
        build_image_encoder(ImageEncoderConfig(name="medclip"))


# --- CLIP and the others of transformers


def test_clip_and_plip_are_read_from_a_file_of_the_whole_model(clip, images, tmp_path):
    state = cloned(clip.tower.model.state_dict())
    state["vision_model.embeddings.position_ids"] = torch.arange(50)[None]
    state["text_model.embeddings.token_embedding.weight"] = torch.zeros(9, 512)
    state["text_projection.weight"] = torch.zeros(512, 512)
    state["logit_scale"] = torch.tensor(4.6)
    save_file(state, tmp_path / "model.safetensors")
    read = build(name="plip", weights=str(tmp_path), seed=2)
    assert torch.equal(read(images), clip(images))
    assert "text_projection.weight" in read.weights.ignored
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors")
    refused("visual_projection.weight", name="plip", weights=str(tmp_path))


def test_swin_of_imagenet_is_the_tower_of_medclip_without_its_projection(medclip, images, tmp_path):
    names = medclip.tower.model.state_dict()
    state = {f"swin.{old_swin(name)}": tensor for name, tensor in names.items()}
    state |= {"classifier.weight": torch.zeros(1000, 768), "classifier.bias": torch.zeros(1000)}
    save_file(cloned(state), tmp_path / "model.safetensors")
    read = build(name="swin_imagenet", weights=str(tmp_path), normalization=medclip.statistics)
    assert read.dim == 768
    assert torch.allclose(medclip.tower.projection_head(read(images)), medclip(images), atol=1e-6)
    assert set(read.weights.ignored) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", ["phikon", "dinov2"])
def test_vision_transformers_are_read_in_the_old_layout(name, tmp_path, monkeypatch):
    row = CATALOG[name]
    monkeypatch.setitem(CATALOG, name, replace(row, options={**row.options, "num_hidden_layers": 2}))

    def old(own):
        own = re.sub(r"attention\.([qkv]_proj)", lambda found: f"attention.attention.{OLD_PARTS[found[1]]}", own)
        own = own.replace("attention.o_proj", "attention.output.dense")
        if not own.startswith("layers."):
            return own
        own = own.replace("layers.", "encoder.layer.", 1)
        return own.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")

    first = build(name=name, seed=1)
    state = {old(own): tensor for own, tensor in first.tower.model.state_dict().items()}
    state |= {"embeddings.mask_token": torch.zeros(1, 768), "pooler.dense.weight": torch.zeros(768, 768)}
    save_file(cloned(state), tmp_path / "model.safetensors")
    read = build(name=name, weights=str(tmp_path), seed=2)
    assert read.fingerprint() == first.fingerprint()
    image = torch.rand(1, 3, 56, 56)
    token = read.tower.model(read.normalization(read.resize(image))).last_hidden_state[:, 0]
    assert torch.equal(read(image), token)


# --- timm


def test_a_classifier_of_any_size_is_ignored(tmp_path):
    whole = timm.create_model("convnext_atto", num_classes=7)
    save_file(cloned(whole.state_dict()), tmp_path / "seven.safetensors")
    read = build(name="convnext_atto", weights=str(tmp_path / "seven.safetensors"), side=64)
    assert set(read.weights.ignored) == {"head.fc.weight", "head.fc.bias"}
    refused("seven.safetensors", "tensors", name="convnext_femto", weights=str(tmp_path / "seven.safetensors"))


@pytest.fixture
def refusing_hub(monkeypatch):
    """A hub that answers at once; the real client tries again for a minute."""
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("401 Client Error\nfor url")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)


@pytest.mark.parametrize("name", ["uni", "h_optimus_0"])
def test_gated_weights_say_where_to_ask_and_how_to_log_in(name, refusing_hub):
    row = CATALOG[name]
    refused(name, "401", f"https://huggingface.co/{row.hub}", "HF_TOKEN", name=name, weights="hub")


def test_open_weights_that_cannot_be_fetched_name_the_way_out(refusing_hub):
    refused("clip", "401", "path of a weights file", name="clip", weights="hub")
    small = "mobilenetv3_small_050"
    refused(small, "401", "path of a weights file", name=small, weights="hub", side=32)


def test_weights_of_the_hub_are_read_as_files_are(clip, images, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    torch.save(cloned(clip.tower.model.state_dict()), tmp_path / "pytorch_model.bin")

    def download(repository, name, revision):
        assert (repository, revision) == ("openai/clip-vit-base-patch32", "main")
        if not (tmp_path / name).is_file():
            raise LocalEntryNotFoundError("not here")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    read = build(name="clip", weights="hub", seed=2)
    assert read.weights.source == "hub"
    assert torch.equal(read(images), clip(images))


@pytest.mark.skipif(not REAL_WEIGHTS.is_file(), reason="TISSUEHINT_DATA has no weights folder")
def test_real_weights_of_1001_classes_make_an_image_encoder():
    encoder = build(name="mobilenetv2_100", weights=str(REAL_WEIGHTS), normalization="inception")
    assert encoder.dim == 1280
    assert encoder.weights.ignored
    image = torch.rand(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    whole = encoder(image)
    part = encoder(F.interpolate(image, (224, 224), mode="bilinear", antialias=True))
    assert whole.isfinite().all()
    assert whole.std() > 0
    assert torch.allclose(whole, part, atol=1e-4)
