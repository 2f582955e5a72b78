from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tissuehint.data.samples import Batch
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.segmentation import SegmentationConfig, SegmentationModule, cross_entropy

few = settings(max_examples=30)
SPACE = LabelSpace(("gland", "stroma", "white"), white=2)


def case(seed, classes, ignored):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, classes, 5, 7, generator=generator)
    target = torch.randint(classes, (2, 5, 7), generator=generator)
    target[torch.rand(2, 5, 7, generator=generator) < ignored] = 255
    return logits, target


class TestCrossEntropy:
    @few
    @given(st.integers(0, 9999), st.integers(1, 9), st.floats(0, 0.95))
    def test_against_torch_in_double_precision(self, seed, classes, ignored):
        logits, target = case(seed, classes, ignored)
        if not (target != 255).any():
            return
        reference = logits.double().requires_grad_()
        expected = F.cross_entropy(reference, target, ignore_index=255)
        expected.backward()
        for kind in (torch.float32, torch.float64, torch.bfloat16):
            given_logits = logits.clone().to(kind).requires_grad_()
            loss = cross_entropy(given_logits, target)
            loss.backward()
            room = {"rtol": 0.03, "atol": 0.03} if kind == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(loss.double(), expected.detach(), **room)
            torch.testing.assert_close(given_logits.grad.double(), reference.grad, **room)

    def test_nothing_labelled_gives_zero_and_no_gradient(self):
        logits, _ = case(0, 3, 0)
        logits.requires_grad_()
        loss = cross_entropy(logits, torch.full((2, 5, 7), 255))
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))

    def test_ignored_pixels_get_no_gradient(self):
        logits, target = case(1, 3, 0.5)
        logits.requires_grad_()
        cross_entropy(logits, target).backward()
        moved = logits.grad.abs().sum(1) > 0
        assert torch.equal(moved, target != 255)

    def test_another_ignore_index(self):
        logits, target = case(2, 3, 0.5)
        other = torch.where(target == 255, 7, target)
        torch.testing.assert_close(cross_entropy(logits, other, ignore_index=7), cross_entropy(logits, target))


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    config = SegmentationConfig(
        network={"architecture": "unet", "encoder": {"name": "mobilenetv3_small_050"}},
        optimization={"name": "adamw", "learning_rate": 1e-3, "head_multiplier": 3, "warmup": 0, "power": 0},
        crop=64,
    )
    return SegmentationModule(config, SPACE)


def a_batch():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (4, 4, 4), generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)
    colours = torch.tensor([[0.8, 0.3, 0.5], [0.4, 0.2, 0.6], [0.95, 0.95, 0.95]])
    images = colours[masks].permute(0, 3, 1, 2) + 0.02 * torch.randn(4, 3, 64, 64, generator=generator)
    masks[:, :5] = 255
    return Batch([f"crop_{index}" for index in range(4)], images.clamp(0, 1), masks=masks)


class TestSegmentationModule:
    def test_it_learns_one_batch(self, module, monkeypatch):
        logged = []
        monkeypatch.setattr(module, "log", lambda name, value, **_: logged.append((name, value.item())))
        module._trainer = SimpleNamespace(estimated_stepping_batches=30)
        optimizer = module.configure_optimizers()["optimizer"]
        module.train()
        batch = a_batch()
        for _ in range(30):
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
        module._trainer = None
        losses = [value for name, value in logged if name == "train_loss"]
        assert losses[-1] < 0.3 * losses[0]

    def test_a_prediction_is_a_tissue_map_of_image_size(self, module):
        module.eval()
        with torch.no_grad():
            maps = module.predict(torch.rand(2, 3, 50, 71))
        assert maps.shape == (2, SPACE.num_classes, 50, 71)
        torch.testing.assert_close(maps.sum(1), torch.ones(2, 50, 71))
        assert maps.min() >= 0

    def test_images_without_masks_are_refused_by_name(self, module):
        with pytest.raises(InputError, match=r"case_1.*no mask"):
            module.training_step(Batch(["case_1"], torch.rand(1, 3, 64, 64)), 0)

    def test_only_ignored_pixels_leave_the_weights_alone(self, module, monkeypatch):
        monkeypatch.setattr(module, "log", lambda *_, **__: None)
        module.train()
        module.zero_grad()
        batch = a_batch()
        empty = Batch(batch.ids, batch.images, masks=torch.full_like(batch.masks, 255))
        loss = module.training_step(empty, 0)
        loss.backward()
        assert loss.item() == 0
        for parameter in module.parameters():
            assert parameter.grad is None or not parameter.grad.any()

    def test_unknown_settings_are_refused(self):
        for wrong in (
            {"loss": "dice"},
            {"crop": 16},
            {"steps": 0},
            {"crop": 64, "stride": 65},
            {"batchsize": 3},
            {"keep": "first"},
        ):
            with pytest.raises(ValidationError):
                SegmentationConfig(**wrong)
