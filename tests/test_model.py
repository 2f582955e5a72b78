import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tissuehint import TissueModel
from tissuehint.data.patches import PatchGrid
from tissuehint.errors import InputError
from tissuehint.methods.cam import CAM, CAMConfig
from tissuehint.nn.config import EncoderConfig, NetworkConfig, TrunkConfig
from tissuehint.nn.encoders import build_encoder
from tissuehint.nn.networks import build_network
from tissuehint.testing import fake_batch, fake_labels

ENCODER = EncoderConfig(name="test_resnet")
GRID = PatchGrid(side=64, stride=48)


def network_model(grid=GRID, encoder=ENCODER, **others):
    torch.manual_seed(0)
    config = NetworkConfig(architecture="fpn", encoder=encoder)
    labels = fake_labels()
    network = build_network(config, labels.num_classes).eval()
    return TissueModel.from_network(network, labels, config, grid=grid, um_per_px=0.5, notes={"run": "x"}, **others)


def method_model(grid=GRID):
    torch.manual_seed(0)
    return TissueModel.from_method(CAM(CAMConfig(encoder=ENCODER), fake_labels()).eval(), grid=grid)


MAKERS = {"network": network_model, "method": method_model}


@pytest.fixture(params=MAKERS)
def model(request):
    return MAKERS[request.param]()


@pytest.fixture
def saved(tmp_path):
    return network_model().save(tmp_path / "model")


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


class TestFiles:
    def test_a_loaded_model_is_the_saved_one(self, model, tmp_path):
        pixels = picture(100, 70)
        expected = model.predict(pixels)
        loaded = TissueModel.load(model.save(tmp_path / "model"))
        assert torch.equal(loaded.predict(pixels), expected)
        for name in ("labels", "architecture", "grid", "um_per_px", "notes"):
            assert getattr(loaded, name) == getattr(model, name), name
        assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "model.json"}

    def test_saving_again_writes_the_same_bytes(self, model, tmp_path):
        first = model.save(tmp_path / "a")
        second = TissueModel.load(first).save(tmp_path / "b")
        for name in ("model.safetensors", "model.json"):
            assert (first / name).read_bytes() == (second / name).read_bytes()

    def test_the_run_directory_will_do(self, saved):
        assert TissueModel.load(saved.parent).labels == fake_labels()
        assert TissueModel.load(str(saved)).um_per_px == 0.5

    def test_original_weights_are_not_needed(self, tmp_path):
        weights = tmp_path / "encoder.safetensors"
        save_file(build_encoder(ENCODER).backbone.state_dict(), weights)
        encoder = EncoderConfig(name="test_resnet", weights=str(weights))
        model = network_model(encoder=encoder)
        folder = model.save(tmp_path / "model")
        weights.unlink()
        pixels = picture(64, 64)
        assert torch.equal(TissueModel.load(folder).predict(pixels), model.predict(pixels))

    def test_no_pickle_is_involved(self, saved, monkeypatch):
        def refuse(*words, **names):
            raise AssertionError("pickle")

        monkeypatch.setattr(torch, "load", refuse)
        monkeypatch.setattr(pickle, "load", refuse)
        monkeypatch.setattr(pickle, "loads", refuse)
        monkeypatch.setattr(pickle, "Unpickler", refuse)
        TissueModel.load(saved).predict(picture(64, 64))

    def test_loading_leaves_the_network_ready_to_predict(self, saved):
        assert not TissueModel.load(saved).network.training


class TestDamage:
    def refused(self, folder, text):
        with pytest.raises(InputError, match=text) as caught:
            TissueModel.load(folder)
        assert "\n" not in str(caught.value)

    def test_no_card(self, tmp_path):
        self.refused(tmp_path, r"holds no model\.json")

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}'])
    def test_a_card_that_is_none(self, saved, text):
        (saved / "model.json").write_text(text)
        self.refused(saved, r"model\.json")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("format", "new"),
            ("labels", {"names": []}),
            ("labels", {}),
            ("labels", 3),
            ("labels", {"names": ["a", "b"], "colours": [[1, 2]]}),
            ("architecture", {"kind": "spell", "config": {}}),
            ("architecture", {"kind": "method", "config": {}}),
            ("architecture", {"kind": "network", "config": {"architektur": "unet"}}),
            ("architecture", {"kind": "network"}),
            ("architecture", []),
            ("architecture", {"kind": "method", "name": "nobody_has_this", "config": {}}),
            ("grid", {"side": -1}),
            ("grid", 3),
        ],
    )
    def test_a_damaged_entry_of_the_card(self, saved, key, value):
        card = json.loads((saved / "model.json").read_text())
        (saved / "model.json").write_text(json.dumps({**card, key: value}))
        self.refused(saved, ".")

    def test_a_newer_format(self, saved):
        card = json.loads((saved / "model.json").read_text())
        (saved / "model.json").write_text(json.dumps({**card, "format": 99}))
        self.refused(saved, "format 99.*update tissuehint")

    def test_missing_weights(self, saved):
        (saved / "model.safetensors").unlink()
        self.refused(saved, r"model\.safetensors: does not exist")

    @pytest.mark.parametrize("keep", [0, 5, 1000, -1])
    def test_truncated_weights(self, saved, keep):
        content = (saved / "model.safetensors").read_bytes()
        (saved / "model.safetensors").write_bytes(content[:keep])
        self.refused(saved, r"model\.safetensors: is damaged")

    def test_weights_of_another_architecture(self, saved):
        method_model().save(saved.parent / "other")
        (saved.parent / "other" / "model.safetensors").replace(saved / "model.safetensors")
        self.refused(saved, "does not fit the architecture")


class TestPredict:
    def test_every_form_of_an_image_gives_the_same_map(self, model, tmp_path):
        pixels = picture(65, 97)
        Image.fromarray(pixels).save(tmp_path / "image.png")
        expected = model.predict(pixels)
        assert expected.shape == (4, 65, 97)
        assert expected.dtype == torch.float32
        for form in (tmp_path / "image.png", str(tmp_path / "image.png"), as_tensor(pixels)):
            assert torch.equal(model.predict(form), expected)
        batch = torch.stack([as_tensor(pixels), as_tensor(picture(65, 97, 1))])
        maps = model.predict(batch)
        assert maps.shape == (2, 4, 65, 97)
        assert torch.equal(maps[0], expected)

    @pytest.mark.parametrize(("height", "width"), [(65, 97), (64, 64), (32, 32), (20, 200), (1, 1), (7, 64)])
    def test_any_size(self, model, height, width):
        maps = model.predict(picture(height, width))
        assert maps.shape == (4, height, width)
        assert float(maps.min()) >= 0
        torch.testing.assert_close(maps.sum(0), torch.ones(height, width), atol=1e-5, rtol=0)
        classes = model.classes(maps)
        assert classes.shape == (height, width)
        assert classes.dtype == np.uint8

    @pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
    def test_an_image_of_exactly_the_window_is_not_tiled(self, maker):
        pixels = picture(64, 64)
        torch.testing.assert_close(maker().predict(pixels), maker(grid=None).predict(pixels), atol=1e-6, rtol=0)

    def test_the_number_of_windows_at_a_time_does_not_matter(self, model):
        pixels = picture(130, 100)
        one, many = model.predict(pixels, batch_size=1), model.predict(pixels, batch_size=50)
        torch.testing.assert_close(one, many, atol=1e-4, rtol=0)

    def test_a_model_in_training_mode_predicts_like_one_that_is_not(self, model):
        pixels = picture(64, 64)
        expected = model.predict(pixels)
        model.network.train()
        assert torch.equal(model.predict(pixels), expected)

    def test_what_is_given_stays_as_it_was(self, model):
        images = fake_batch(fake_labels(), count=2).images
        before = images.clone()
        model.predict(images)
        assert torch.equal(images, before)

    @pytest.mark.parametrize(
        "image",
        [
            picture(64, 64).astype(np.float32),
            picture(64, 64)[..., :1],
            picture(64, 64)[..., 0],
            np.zeros((2, 64, 64, 3), np.uint8),
            torch.zeros(3, 64, 64, dtype=torch.uint8),
            torch.zeros(1, 64, 64),
            torch.zeros(64, 64, 3),
            torch.full((3, 64, 64), 2.0),
            torch.full((3, 64, 64), -0.1),
            torch.full((3, 64, 64), float("nan")),
            torch.zeros(3, 0, 64),
            torch.zeros(0, 3, 64, 64),
            np.zeros((0, 64, 3), np.uint8),
        ],
        ids=lambda image: f"{tuple(image.shape)}-{image.dtype}",
    )
    def test_what_is_no_image_is_one_line(self, model, image):
        with pytest.raises(InputError) as caught:
            model.predict(image)
        assert "\n" not in str(caught.value)

    def test_files_that_are_no_image(self, model, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
        for name in ("broken.png", "missing.png"):
            with pytest.raises(InputError, match=name):
                model.predict(tmp_path / name)


class TestWorkingGrid:
    def model(self, **network):
        torch.manual_seed(0)
        config = NetworkConfig(encoder=ENCODER, decoder={"encoder_depth": 3, "decoder_channels": [8, 8, 8]}, **network)
        labels = fake_labels()
        return TissueModel.from_network(build_network(config, labels.num_classes).eval(), labels, config)

    def test_a_network_behind_a_trunk_comes_back_without_the_weights_of_its_trunk(self, tmp_path):
        weights = tmp_path / "trunk.safetensors"
        save_file(build_encoder(ENCODER).backbone.state_dict(), weights)
        trunk = TrunkConfig(encoder=EncoderConfig(name="test_resnet", weights=str(weights)), stride=8)
        model = self.model(scale=0.5, trunk=trunk)
        folder = model.save(tmp_path / "model")
        weights.unlink()
        loaded = TissueModel.load(folder)
        assert loaded.network.config.scale == 0.5
        assert loaded.network.config.trunk.stride == 8
        assert loaded.network.config.trunk.encoder.weights == "none"
        pixels = picture(130, 101)
        maps = loaded.predict(pixels)
        assert maps.shape == (4, 130, 101)
        assert torch.equal(maps, model.predict(pixels))

    def test_models_from_before_these_options_still_load(self, saved):
        expected = TissueModel.load(saved).predict(picture(64, 64))
        card = json.loads((saved / "model.json").read_text())
        del card["architecture"]["config"]["scale"], card["architecture"]["config"]["trunk"]
        (saved / "model.json").write_text(json.dumps(card))
        assert torch.equal(TissueModel.load(saved).predict(picture(64, 64)), expected)
