"""The gland method: what is trained and how, which map is read, and what a recipe may say."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tissuehint.data.samples import Batch
from tissuehint.methods.cam import CAM, CAMConfig
from tissuehint.methods.gland import Gland, GlandConfig
from tissuehint.nn.encoders import pad_to_multiple
from tissuehint.pipeline.recipe import load_recipe
from tissuehint.segmentation import SegmentationConfig
from tissuehint.testing import fake_batch, fake_labels

ENCODER = {"name": "test_resnet"}
RATES = {"name": "adamw", "learning_rate": 1e-3, "head_multiplier": 5, "weight_decay": 0.01, "power": 0}


def gland(*, white=False, seed=0, **settings):
    torch.manual_seed(seed)
    return Gland(GlandConfig(encoder=ENCODER, optimization=RATES, **settings), fake_labels(white=white)).eval()


def batch_of(height=96, width=64, count=3):
    return fake_batch(fake_labels(white=False), count=count, height=height, width=width)


def optimizer_of(method, monkeypatch):
    monkeypatch.setattr(method, "_trainer", SimpleNamespace(estimated_stepping_batches=30))
    monkeypatch.setattr(method, "log", lambda *_, **__: None)
    return method.configure_optimizers()["optimizer"]


def new_parts(method):
    """By name: gammas, fusion convolutions, and all else that is not of the encoder."""
    network = method.network
    gammas = {key: value for key, value in network.attention.named_parameters() if key.endswith("gamma")}
    return gammas, dict(network.pooling.named_parameters())


class TestTraining:
    def test_gammas_and_convolutions_learn_at_the_head_rate(self, monkeypatch):
        method = gland()
        optimizer = optimizer_of(method, monkeypatch)
        place = {id(each): group for group in optimizer.param_groups for each in group["params"]}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(method.parameters()))
        gammas, convolutions = new_parts(method)
        assert len(gammas) == 9
        assert len(convolutions) == 6
        for gamma in gammas.values():
            assert place[id(gamma)]["lr"] == pytest.approx(5e-3)
            assert place[id(gamma)]["weight_decay"] == 0
        for part in (*convolutions.values(), method.network.classifier.weight):
            assert place[id(part)]["lr"] == pytest.approx(5e-3)
            assert place[id(part)]["weight_decay"] == pytest.approx(0.01)
        for part in method.network.encoder.parameters():
            assert place[id(part)]["lr"] == pytest.approx(1e-3)

    def test_one_step_gives_all_new_parts_a_gradient(self, monkeypatch):
        method = gland().train()
        optimizer_of(method, monkeypatch)
        method.training_step(batch_of(), 0).backward()
        for part in new_parts(method):
            for key, value in part.items():
                assert value.grad is not None, key
                assert float(value.grad.abs().sum()) > 0, key

    def test_all_new_parts_change_in_a_few_steps(self, monkeypatch):
        method, batch = gland().train(), batch_of()
        optimizer = optimizer_of(method, monkeypatch)
        before = {key: value.detach().clone() for key, value in method.named_parameters()}
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = method.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        same = [key for key, value in method.named_parameters() if torch.equal(before[key], value)]
        assert not same
        assert all(abs(gamma.item()) > 1e-4 for gamma in new_parts(method)[0].values())

    def test_the_loss_is_binary_cross_entropy_of_the_tags(self):
        method, batch = gland(), batch_of()
        presence = method.network.pooled(batch.images).logits.double().sigmoid()
        by_hand = -(batch.tags * presence.log() + (1 - batch.tags) * (1 - presence).log()).mean()
        assert method.losses(batch)["classification"].item() == pytest.approx(by_hand.item(), rel=1e-5)


class TestLogits:
    @pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97), (33, 50)])
    @pytest.mark.parametrize("levels", [1, 3])
    def test_they_are_eq_9_on_the_cells_that_reach_into_the_image(self, height, width, levels):
        method, images = gland(levels=levels), batch_of(height, width).images
        network = method.network
        stride = network.encoder.strides[-levels]
        with torch.no_grad():
            features = network.encoder(pad_to_multiple(images, network.encoder.multiple))[-levels:]
            size = features[0].shape[-2:]
            joined = [F.interpolate(each, size, mode="bilinear", align_corners=False) for each in features]
            maps = F.conv2d(torch.cat(joined, 1), network.classifier.weight)
            maps = maps[..., : -(-height // stride), : -(-width // stride)]
            logits, fused = network.pooling(maps)
            pooled, seen = network.pooled(images), method.class_maps(images)
        torch.testing.assert_close(pooled.class_maps, maps)
        torch.testing.assert_close(pooled.fused, fused)
        torch.testing.assert_close(pooled.logits, logits)
        torch.testing.assert_close(seen.logits, logits)
        summand = fused.relu() * maps.relu() - (-fused).relu() * (-maps).relu()
        torch.testing.assert_close(pooled.weighted, summand)
        torch.testing.assert_close(summand.mean((2, 3)), logits)

    @pytest.mark.parametrize(("height", "width"), [(65, 97), (33, 50), (95, 32)])
    def test_maps_of_odd_sizes_cover_the_image(self, height, width):
        method, images = gland(), batch_of(height, width).images
        with torch.no_grad():
            assert method.class_maps(images).maps.shape == (3, 3, height, width)
            assert method.predict(images).shape == (3, 3, height, width)
            assert all(each.shape[0] == 3 for each in method.explain(batch_of(height, width)).values())

    def test_an_image_in_the_middle_of_the_padding_is_what_it_was(self):
        """Maps of a padded image are those of the whole one that the padding makes, cut."""
        method, images = gland(), batch_of(64, 64).images
        with torch.no_grad():
            whole = method.class_maps(pad_to_multiple(images[..., :63, :63], 32)).maps
            cut = method.class_maps(images[..., :63, :63]).maps
            enlarged = F.interpolate(whole, (64, 64), mode="bilinear", align_corners=False)[..., :63, :63]
        torch.testing.assert_close(cut, enlarged)


class TestLabelGuided:
    def by_hand(self, method, batch):
        """M_c = ReLU(P'_c) ReLU(F_c), the positive part of Eq. 9's summand: enlarged, over its peak, gated by tags."""
        pooled = method.network.pooled(batch.images)
        summand = pooled.fused.relu() * pooled.class_maps.relu()
        summand = summand - (-pooled.fused).relu() * (-pooled.class_maps).relu()
        enlarged = F.interpolate(summand, batch.images.shape[-2:], mode="bilinear", align_corners=False).relu()
        result = torch.zeros_like(enlarged)
        for image in range(len(batch)):
            present = [index for index, tag in enumerate(batch.tags[image]) if tag]
            for index in present:
                peak = max(enlarged[image, index].max().item(), 1e-8)
                result[image, index] = enlarged[image, index] / peak + 1e-4
            result[image] /= result[image].sum(0).clamp_min(1e-8)
        return result

    def test_is_the_merged_map_gated_by_the_tags(self):
        method, batch = gland(), batch_of(96, 64, count=6)
        tags = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]).float()
        batch = Batch(batch.ids, batch.images, tags=tags)
        with torch.no_grad():
            guided, expected = method.label_guided(batch), self.by_hand(method, batch)
        torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)
        assert float(guided[5].abs().max()) == 0
        assert guided[:5].amax((2, 3)).gt(0).equal(tags[:5] > 0)

    def test_the_class_is_that_of_the_merged_map_where_it_speaks(self):
        """At the middle of the 32 x 32 pixels of a cell, where next to nothing is interpolated."""
        method, batch = gland(), batch_of(96, 96, count=4)
        batch = Batch(batch.ids, batch.images, tags=torch.ones(4, 3))
        with torch.no_grad():
            pooled = method.network.pooled(batch.images)
            guided = method.label_guided(batch)
        merged = pooled.fused.relu() * pooled.class_maps.relu()
        cells = guided.unflatten(2, (3, 32)).unflatten(4, (3, 32))[:, :, :, 15:17, :, 15:17].mean((3, 5))
        clear = (merged > 0.2 * merged.amax((2, 3), keepdim=True)).sum(1) == 1
        lone = clear & ((merged > 0).sum(1) == 1)
        assert bool(lone.any())
        assert torch.equal(cells.argmax(1)[lone], merged.argmax(1)[lone])


class TestOneKey:
    @pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97)])
    def test_cam_with_pyramid_fusion_is_gland_without_attention(self, height, width):
        torch.manual_seed(0)
        cam = CAM(CAMConfig(encoder=ENCODER, optimization=RATES, pooling="pyramid_fusion"), fake_labels(white=False))
        other, batch = gland(attention="none"), batch_of(height, width)
        assert cam.state_dict().keys() == other.state_dict().keys()
        for key, value in other.state_dict().items():
            assert torch.equal(cam.state_dict()[key], value), key
        cam.eval()
        with torch.no_grad():
            assert torch.equal(cam.class_maps(batch.images).maps, other.class_maps(batch.images).maps)
            assert torch.equal(cam.class_maps(batch.images).logits, other.class_maps(batch.images).logits)
            assert torch.equal(cam.label_guided(batch), other.label_guided(batch))

    def test_gland_without_both_is_cam(self):
        torch.manual_seed(0)
        cam = CAM(CAMConfig(encoder=ENCODER), fake_labels(white=False)).eval()
        other, images = gland(attention="none", pooling="average"), batch_of().images
        with torch.no_grad():
            assert torch.equal(cam.class_maps(images).logits, other.class_maps(images).logits)

    def test_cam_with_attention_is_gland_with_the_mean(self):
        torch.manual_seed(0)
        settings = {"encoder": ENCODER, "attention": "consistency_correlation"}
        cam = CAM(CAMConfig(**settings), fake_labels(white=False)).eval()
        other, batch = gland(pooling="average"), batch_of()
        for method in (cam, other):
            with torch.no_grad():
                for gamma in (value for key, value in method.named_parameters() if key.endswith("gamma")):
                    gamma.fill_(0.5)
        with torch.no_grad():
            assert torch.equal(cam.class_maps(batch.images).maps, other.class_maps(batch.images).maps)

    def test_defaults_of_the_paper(self):
        config = GlandConfig()
        assert (config.attention, config.pooling) == ("consistency_correlation", "pyramid_fusion")
        assert (config.attention_reduction, config.pyramid_scales) == (8, (2, 4, 8, 16))
        assert (config.pyramid_fusion, config.presence_threshold) == ("sign_preserving", 0.25)


class TestRecipe:
    def test_the_ceiling_is_trained_with_cross_entropy(self):
        for loss in ("purified", "reweighted", "cross_entropy"):
            recipe = load_recipe("cam/phantom", {"stage2.loss": loss, "ceiling": True})
            assert recipe.stage2.loss == loss
            assert recipe.full_supervision.loss == "cross_entropy"
            assert recipe.full_supervision == recipe.stage2.model_copy(update={"loss": "cross_entropy"})

    def test_so_is_a_recipe_that_learns_from_masks(self):
        recipe = load_recipe("cam/phantom", {"stage2.loss": "purified", "ceiling": False, "data.labels": "masks"})
        assert recipe.full_supervision.loss == "cross_entropy"

    def test_a_ceiling_with_settings_of_its_own_keeps_them(self):
        own = SegmentationConfig(loss="reweighted").model_dump(mode="json")
        assert load_recipe("cam/phantom", {"ceiling": own}).full_supervision.loss == "reweighted"

    def test_no_ceiling_is_none(self):
        assert load_recipe("cam/phantom", {"stage2.loss": "purified", "ceiling": False}).full_supervision is None

    def test_gland_comes_back_from_its_own_yaml(self, tmp_path):
        method = {"name": "gland", "encoder": ENCODER, "attention_levels": [-2, -1], "pyramid_scales": [1, 3]}
        recipe = load_recipe({**load_recipe("cam/phantom").model_dump(mode="json"), "method": method})
        path = tmp_path / "gland.yaml"
        path.write_text(recipe.to_yaml())
        assert load_recipe(path) == recipe
        assert load_recipe(path).method.attention_levels == (-2, -1)

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("method.attention_levels=[]", ["method.attention_levels"]),
            ("method.attention_levels=[-9]", ["attention level -9", "resnet10t", "-5", "-1"]),
            ("method.attention_levels=[-1,-1]", ["attention levels [-1, -1]", "twice"]),
            ("method.attention_reduction=0", ["method.attention_reduction"]),
            ("method.pyramid_scales=[4,2]", ["method.pyramid_scales", "[4, 2]", "increasing"]),
            ("method.pyramid_scales=[]", ["method.pyramid_scales"]),
            ("method.pooling=max", ["method.pooling", "pyramid_fusion"]),
            ("method.pyramid_fusion=sum", ["method.pyramid_fusion", "average"]),
            ("stage2.loss=purify", ["stage2.loss", "purified"]),
        ],
    )
    def test_wrong_values_are_one_line_before_anything_is_written(self, override, words, tmp_path, capfd, monkeypatch):
        from tissuehint.cli import main

        monkeypatch.delenv("TISSUEHINT_DEBUG", raising=False)
        monkeypatch.chdir(tmp_path)
        settings = ["method.attention=criss_cross", override, "trainer.progress=false"]
        settings += ["data.phantom.train=2", "data.phantom.val=1", "data.phantom.test=1"]
        overrides = [word for each in settings for word in ("-o", each)]
        capfd.readouterr()
        code = main(["run", "cam/phantom", *overrides, "--out", str(tmp_path / "runs")])
        out, err = capfd.readouterr()
        assert code == 2
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in out + err
        for word in words:
            assert word in lines[0], lines[0]
        assert not list(tmp_path.iterdir())
