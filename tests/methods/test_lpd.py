"""LPD as a method: warm-up, regions, diversity, background channel, CRF, pictures of the prototypes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from tissuehint.errors import InputError
from tissuehint.methods.base import CRFConfig, TestTimeAugmentation, kept_shares
from tissuehint.methods.lpd import LPD, DiversityConfig, LPDConfig
from tissuehint.methods.pbip import PBIP
from tissuehint.model import TissueModel
from tissuehint.nn.diversity import correlation_diversity_loss, jeffreys_diversity_loss, prototype_coverage
from tissuehint.nn.image_encoders import RandomEncoderWarning
from tissuehint.ops.crf import dense_crf
from tissuehint.plugins import load_method
from tissuehint.testing import fake_batch, fake_dataset, fake_labels
from tissuehint.testing.fakes import fake_data

pytestmark = pytest.mark.filterwarnings(f"ignore::{RandomEncoderWarning.__module__}.{RandomEncoderWarning.__name__}")

K = 2
CLASSES = 3


def lpd(*, white=False, seed=0, **settings):
    torch.manual_seed(seed)
    given = {
        "encoder": {"name": "test_resnet"},
        "image_encoder": {"name": "test_resnet", "side": 32},
        "prototypes_per_class": K,
        "warm_up": 0,
        "diversity": {"min_pixels": 1, "background": -1e3},
        "test_time": TestTimeAugmentation(),
        "crf": None,
    }
    return LPD(LPDConfig(**{**given, **settings}), fake_labels(white=white)).eval()


def batch_of(count=3, side=96):
    return fake_batch(fake_labels(), count=count, height=side, width=side)


class TestLosses:
    def test_warm_up_is_classification_alone(self, monkeypatch):
        method, batch = lpd(warm_up=5), batch_of()
        for step in (0, 4, 5):
            monkeypatch.setattr(LPD, "global_step", step, raising=False)
            names = set(method.losses(batch))
            after = {"classification", "foreground", "background", "sparsity", "diversity"}
            assert names == (after if step >= 5 else {"classification"})

    @pytest.mark.parametrize("form", ["jeffreys", "correlation"])
    @pytest.mark.parametrize("prototypes", ["projected", "raw"])
    def test_diversity_of_the_coarsest_level(self, form, prototypes):
        settings = {"form": form, "prototypes": prototypes, "background": -1e3, "min_pixels": 1, "window": 3}
        method, batch = lpd(diversity={**settings, "weight": 0.7}), batch_of()
        seen = method.see(batch.images)
        compared = method.network.prototypes
        if prototypes == "projected":
            compared = method.network.projections[-1](compared)
        # the similarities that make the class maps are those that are compared
        if prototypes == "projected":
            cells = F.normalize(seen.features, dim=1)
            cosines = torch.einsum("bdhw,ld->blhw", cells, F.normalize(compared, dim=1))
            torch.testing.assert_close(cosines, seen.similarities[-1])
        grouped = compared.view(CLASSES, K, -1)
        regions = method.regions(seen, batch.tags)
        loss = jeffreys_diversity_loss if form == "jeffreys" else correlation_diversity_loss
        extra = {"min_pixels": 1, "temperature": 0.1} if form == "jeffreys" else {"window": 3, "min_mass": 0.05}
        expected = loss(seen.features, grouped, regions, **extra)
        assert float(expected) > 0
        torch.testing.assert_close(method.losses(batch)["diversity"], 0.7 * expected)

    def test_the_diversity_loss_moves_what_is_trained(self):
        method, batch = lpd(), batch_of()
        method.losses(batch)["diversity"].backward()
        for parameters in ([method.network.prototypes], method.network.projections[-1].parameters()):
            assert sum(float(each.grad.abs().sum()) for each in parameters) > 0
        assert any(
            float(each.grad.abs().sum()) > 0 for each in method.network.encoder.parameters() if each.grad is not None
        )

    @pytest.mark.parametrize("name", ["classification", "foreground", "background"])
    def test_every_loss_moves_the_prototypes(self, name):
        method, batch = lpd(), batch_of()
        method.losses(batch)[name].backward()
        assert float(method.network.prototypes.grad.abs().sum()) > 0

    @pytest.mark.parametrize("settings", [{"prototypes_per_class": 1}, {"diversity": {"weight": 0}}])
    def test_nothing_to_regularise(self, settings):
        assert "diversity" not in lpd(**settings).losses(batch_of())

    def test_the_optimiser_has_the_prototypes(self, monkeypatch):
        method = lpd()
        monkeypatch.setattr(LPD, "total_steps", lambda self: 10)
        groups = method.configure_optimizers()["optimizer"].param_groups
        given = [id(each) for group in groups for each in group["params"]]
        assert given.count(id(method.network.prototypes)) == 1
        assert len(given) == len(set(given)) == len(list(method.parameters()))

    def test_few_pairs_are_drawn(self, monkeypatch):
        sizes = []
        original = LPD.encode
        monkeypatch.setattr(LPD, "encode", lambda self, x: sizes.append(len(x)) or original(self, x))
        method, batch = lpd(matching={"max_pairs": 2}), batch_of(6)
        method.losses(batch)
        assert sum(sizes) == 2 * 2
        sizes.clear()
        lpd(matching={}).losses(batch)
        assert sum(sizes) > 2 * 2


class TestRegions:
    @pytest.mark.parametrize("gate", [True, False])
    @pytest.mark.parametrize("background", [-1e3, 0.0, 0.2])
    def test_by_hand(self, gate, background):
        method = lpd(diversity={"gate_by_tags": gate, "background": background})
        batch = batch_of()
        with torch.no_grad():
            seen = method.see(batch.images)
        logits = seen.similarities[-1] * seen.scales[-1]
        found = method.regions(seen, batch.tags)
        assert found.shape == (3, *logits.shape[2:])
        for image in range(3):
            for row in range(logits.shape[2]):
                for column in range(logits.shape[3]):
                    values = [
                        float(logits[image, K * number : K * (number + 1), row, column].mean())
                        if batch.tags[image, number] or not gate
                        else -math.inf
                        for number in range(CLASSES)
                    ]
                    best = int(np.argmax(values))
                    expected = best if values[best] > background else -1
                    assert found[image, row, column] == expected

    def test_an_image_without_tags_has_none(self):
        method, batch = lpd(), batch_of()
        with torch.no_grad():
            regions = method.regions(method.see(batch.images), torch.zeros_like(batch.tags))
        assert (regions == -1).all()


class TestTissueMap:
    MAPS = torch.tensor([[[[0.9, 0.1]], [[0.3, 0.0]], [[0.0, 0.0]]]])

    def test_background_takes_from_all_alike(self):
        method, images = lpd(), torch.rand(1, 3, 1, 2)
        gate = torch.tensor([[True, True, False]])
        found = method.tissue_map(self.MAPS, gate, images)
        for column in range(2):
            first, second = (math.exp(float(self.MAPS[0, number, 0, column])) for number in (0, 1))
            expected = [first / (first + second), second / (first + second), 0.0]
            assert found[0, :, 0, column].tolist() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("background", [10.0, 2.0, None])
    def test_with_the_crf(self, background):
        crf = CRFConfig(iterations=2, colour_std=30)
        method = lpd(crf=crf, background=background)
        generator = torch.Generator().manual_seed(3)
        maps, images = torch.rand(2, 3, 8, 9, generator=generator), torch.rand(2, 3, 8, 9, generator=generator)
        gate = torch.tensor([[True, True, False], [False, True, True]])
        channels = [maps.masked_fill(~gate[..., None, None], -1e4)]
        if background is not None:
            channels.append((1 - (maps * gate[..., None, None]).amax(1, keepdim=True)) ** background)
        before = torch.cat(channels, 1).softmax(1)
        refined = kept_shares(dense_crf(before, images, iterations=2, colour_std=30 / 255), before)
        expected = refined[:, :3] * gate[..., None, None]
        found = method.tissue_map(maps, gate, images)
        torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))

    def test_where_the_background_takes_all_the_maps_speak(self):
        """Its share is 1 there, and those of the classes are too small for a float."""
        method, gate = lpd(crf=CRFConfig()), torch.tensor([[True, True, False]])
        maps = 1e-3 * torch.tensor([3.0, 1.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 40, 40)
        found = method.tissue_map(maps, gate, torch.full((1, 3, 40, 40), 0.5))
        torch.testing.assert_close(found.sum(1), torch.ones(1, 40, 40))
        assert (found[:, 0] > found[:, 1]).all()
        assert float(found[:, 2].max()) == 0

    def test_no_class_gives_zeros(self):
        for crf in (None, CRFConfig()):
            gate = torch.tensor([[False, False, False], [True, False, False]])
            found = lpd(crf=crf).tissue_map(self.MAPS.expand(2, -1, -1, -1), gate, torch.rand(2, 3, 1, 2))
            assert float(found[0].abs().max()) == 0
            torch.testing.assert_close(found[1, 0], torch.ones(1, 2))

    def test_six_views(self, monkeypatch):
        """Plain and mirrored left-right, each at three intensities."""
        seen = []
        method = LPD(
            LPDConfig(encoder={"name": "test_resnet"}, image_encoder={"name": "test_resnet", "side": 32}), fake_labels()
        ).eval()
        original = LPD.class_maps
        monkeypatch.setattr(LPD, "class_maps", lambda self, x: seen.append(x) or original(self, x))
        images = 0.9 * batch_of(1).images
        with torch.no_grad():
            method.augmented(images)
        expected = [image * factor for image in (images, images.flip(-1)) for factor in (1.0, 0.9, 1.1)]
        assert len(seen) == 6
        for view, wanted in zip(seen, expected, strict=True):
            torch.testing.assert_close(view, wanted.clamp(0, 1))


class TestCRFForEveryMethod:
    @pytest.mark.parametrize("name", ["cam", "gland", "pbip", "cvm"])
    def test_predictions_are_refined(self, name):
        classifier = {"encoder": {"name": "test_resnet"}, "presence_threshold": 0.0}
        settings = {
            "cam": classifier,
            "gland": classifier,
            "pbip": {**classifier, "image_encoder": {"name": "test_resnet", "side": 32}},
            "cvm": {"network": {"architecture": "unet", "encoder": {"name": "test_resnet"}}},
        }[name]
        labels, batch = fake_labels(white=False), fake_batch(fake_labels(white=False), count=2)
        found = []
        own = {"iterations": 1, "gaussian_weight": 3, "bilateral_weight": 5}
        for crf in (None, own):
            torch.manual_seed(0)
            kind = load_method(name)
            method = kind(kind.Config(name=name, crf=crf, **settings), labels).eval()
            if name == "pbip":
                method.bank_prototypes.normal_()
            with torch.no_grad():
                found.append((method.predict(batch.images), method.label_guided(batch)))
        (plain, _), (refined, guided) = found
        absent = plain.flatten(2).amax(2) == 0
        expected = dense_crf(plain, batch.images, **own).masked_fill(absent[..., None, None], 0)
        torch.testing.assert_close(refined, expected / expected.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(refined, plain, atol=1e-3)
        torch.testing.assert_close(guided.sum(1), torch.ones_like(guided[:, 0]))


class TestErrors:
    def test_raw_prototypes_need_as_many_channels(self):
        settings = {
            "encoder": {"name": "resnet18", "output_stride": 16},
            "image_encoder": {"name": "test_resnet", "side": 32},
            "diversity": {"prototypes": "raw"},
        }
        with pytest.raises(InputError, match=r"diversity.prototypes raw: compares prototypes of \d+ features with 512"):
            LPD(LPDConfig(**settings), fake_labels())

    def test_convolution_has_no_prototypes(self):
        with pytest.raises(ValidationError, match="no prototypes that could be trained"):
            LPDConfig(similarity="convolution")

    @pytest.mark.parametrize("wrong", [{"window": 6}, {"temperature": 0}, {"min_pixels": 0}, {"weight": -1}])
    def test_diversity(self, wrong):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            DiversityConfig(**wrong)


class TestPictures:
    def test_sheets_and_numbers(self, tmp_path):
        method, data = lpd(), fake_data(fake_dataset(fake_labels()))
        method.illustrate(data, tmp_path)
        told = json.loads((tmp_path / "pictures.json").read_text())
        numbers = json.loads((tmp_path / "diversity.json").read_text())
        items = data.hints("val", "tags")
        assert numbers["split"] == "val"
        assert numbers["patches"] == len(items)
        tagged = items.tags.sum(0)
        assert len(told["pictures"]) == (tagged > 0).sum()
        for picture in told["pictures"]:
            sheet = np.asarray(Image.open(tmp_path / picture["file"]))
            assert (sheet.shape[1] + 3) // 87 == 2 + K  # the patch, its class map, a heatmap a prototype
            assert "coverage" in picture["caption"]
        seen = []
        for place in range(len(items)):
            sample = items.sample(place)
            with torch.no_grad():
                found = method.see(sample.image[None])
                regions = method.regions(found, sample.tags[None])
            seen.append(prototype_coverage(found.similarities[-1], regions, method.counts))
        for kind in ("coverage", "overlap"):
            means = torch.stack([getattr(each, kind) for each in seen]).nanmean(0).tolist()
            assert any(math.isfinite(value) for value in means)
            for name, value in zip(fake_labels().names, means, strict=False):
                assert numbers[kind][name] == (None if math.isnan(value) else pytest.approx(value, abs=1e-4))

    def test_explain_shows_regions(self):
        method, batch = lpd(), batch_of()
        maps = method.explain(batch)
        assert maps["prototypes"].shape[1] == CLASSES * K
        with torch.no_grad():
            regions = method.regions(method.see(batch.images), batch.tags)
        torch.testing.assert_close(maps["regions"].argmax(1), regions)


def test_a_model_is_loaded_with_its_prototypes(tmp_path):
    method = lpd(seed=5)
    TissueModel.from_method(method).save(tmp_path)
    images = batch_of(1).images
    assert torch.equal(TissueModel.load(tmp_path).predict(images), TissueModel.from_method(method).predict(images))


def test_pbip_and_lpd_share_what_they_share():
    assert LPD.class_maps is PBIP.class_maps
    assert LPD.terms is PBIP.terms
