"""From the solutions of single points to u (Eq. 7), and how u is kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.methods.cvm import CVMConfig, contrast_maps
from tissuehint.methods.cvm.complement import Solutions, combine, complement, target_classes
from tissuehint.methods.cvm.store import Store
from tissuehint.ops.variational import segment_two_phase
from tissuehint.testing import fake_labels


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def solutions(u: Tensor, image: list[int], target: list[int]) -> Solutions:
    return Solutions(u, u, torch.tensor(image, dtype=torch.int64), torch.tensor(target, dtype=torch.int64))


def stretched(maps: list[Tensor]) -> np.ndarray:
    mean = np.mean([each.numpy() for each in maps], 0)
    return np.asarray((mean - mean.min()) / (mean.max() - mean.min()))


class TestCombine:
    @pytest.mark.parametrize("target", [0, 1])
    def test_two_classes_are_the_stretched_mean_and_the_rest(self, target: int) -> None:
        u = random_maps(5, 4, 6)
        found = combine(solutions(u, [1, 0, 1, 0, 1], [target] * 5), [target], (2, 2, 4, 6))
        for image, own in enumerate(([u[1], u[3]], [u[0], u[2], u[4]])):
            expected = stretched(own)
            np.testing.assert_allclose(found[image, target].numpy(), expected, atol=1e-12)
            np.testing.assert_allclose(found[image, 1 - target].numpy(), 1 - expected, atol=1e-12)

    @pytest.mark.parametrize("value", [0.0, 0.02, 1.0])
    def test_a_flat_consensus_stays_as_it_is(self, value: float) -> None:
        u = value + 4e-4 * random_maps(2, 4, 6)
        found = combine(solutions(u, [0, 0], [1, 1]), [1], (1, 2, 4, 6))
        torch.testing.assert_close(found[0, 1], u.mean(0), rtol=0, atol=1e-12)

    def test_an_image_without_solution_is_zero(self) -> None:
        found = combine(solutions(random_maps(1, 4, 6), [1], [1]), [1], (3, 2, 4, 6))
        assert found.flatten(1).any(1).tolist() == [False, True, False]
        none = combine(solutions(random_maps(0, 4, 6), [], []), [1], (2, 2, 4, 6))
        assert torch.equal(none, torch.zeros(2, 2, 4, 6, dtype=torch.float64))

    def test_more_classes_are_scaled_to_sum_one(self) -> None:
        u = random_maps(4, 4, 6)
        found = combine(solutions(u, [0, 0, 0, 0], [0, 0, 1, 2]), [0, 1, 2], (1, 3, 4, 6))[0]
        each = np.stack([stretched([u[0], u[1]]), stretched([u[2]]), stretched([u[3]])])
        np.testing.assert_allclose(found.numpy(), each / each.sum(0), atol=1e-12)

    def test_pixels_that_no_class_claims_are_shared_evenly(self) -> None:
        u = torch.zeros(2, 3, 4, dtype=torch.float64)
        u[0, :, 0], u[1, :, 3] = 1, 1
        found = combine(solutions(u, [0, 0], [0, 2]), [0, 1, 2], (1, 3, 3, 4))[0]
        np.testing.assert_allclose(found[:, 0, 0].numpy(), [1, 0, 0])
        np.testing.assert_allclose(found[:, 0, 3].numpy(), [0, 0, 1])
        np.testing.assert_allclose(found[:, :, 1:3].numpy(), 1 / 3)

    def test_two_classes_that_are_both_targets(self) -> None:
        u = random_maps(2, 4, 6)
        found = combine(solutions(u, [0, 0], [0, 1]), [0, 1], (1, 2, 4, 6))[0]
        each = np.stack([stretched([u[0]]), stretched([u[1]])])
        np.testing.assert_allclose(found.numpy(), each / each.sum(0), atol=1e-12)


def two_sided() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Features with a square, logits, and points: both sides, one side each, none."""
    features = 0.3 * torch.randn(4, 5, 12, 14, generator=torch.Generator().manual_seed(0))
    features[:, 0, 3:9, 4:10] += 3
    features[:, 1] += 1
    logits = torch.randn(4, 2, 12, 14, generator=torch.Generator().manual_seed(1))
    logits[:, 1, 2:9, 5:11] += 4
    both = torch.tensor([[5, 6, 1], [7, 8, 1], [0, 0, 0], [11, 13, 0]])
    return features, logits, [both, both[:2], both[2:], both[:0]]


class TestComplement:
    def test_equals_its_parts(self) -> None:
        features, logits, points = two_sided()
        config = CVMConfig(data_weight=2.5, eta=0.4, edge_factor=8, edge_sigma=0.7)
        z = contrast_maps(features[0], points[0][:2, :2], points[0][2:, :2], eta=0.4)
        u = segment_two_phase(z, data_weight=2.5, edge_factor=8, edge_sigma=0.7).u
        found = complement(config, [1], features, logits, points)
        np.testing.assert_allclose(found[0, 1].numpy(), stretched([*u]), atol=1e-6)
        square = torch.zeros(12, 14, dtype=torch.bool)
        square[3:9, 4:10] = True
        assert torch.equal(found[0, 1] > 0.5, square)

    def test_either_class_may_be_the_target(self) -> None:
        features, logits, points = two_sided()
        swapped = [torch.cat([rows[:, :2], 1 - rows[:, 2:]], 1) for rows in points]
        one = complement(CVMConfig(), [1], features, logits, points)
        other = complement(CVMConfig(), [0], features, logits, swapped)
        assert one[0].any()
        assert torch.equal(other, one.flip(1))

    @pytest.mark.parametrize("name", ["variational", "contrast_map", "similarity"])
    def test_images_with_points_on_one_side_have_none(self, name: str) -> None:
        found = complement(CVMConfig(complement=name), [1], *two_sided())  # type: ignore[arg-type]
        assert found.flatten(1).any(1).tolist() == [True, False, False, False]

    @pytest.mark.parametrize("name", ["variational", "contrast_map", "direct_variational", "similarity"])
    @pytest.mark.parametrize("targets", [[1], [0, 1]])
    def test_is_probabilities_without_gradient(self, name: str, targets: list[int]) -> None:
        features, logits, points = two_sided()
        features.requires_grad_()
        logits.requires_grad_()
        config = CVMConfig(complement=name)  # type: ignore[arg-type]
        found = complement(config, targets, features, logits, points)
        assert not found.requires_grad
        assert bool(((found >= 0) & (found <= 1)).all())
        said = found.flatten(1).any(1)
        torch.testing.assert_close(found[said].sum(1), torch.ones_like(found[said][:, 0]))

    def test_contrast_map_leaves_the_solver_out(self) -> None:
        features, logits, points = two_sided()
        found = complement(CVMConfig(complement="contrast_map"), [1], features, logits, points)
        z = contrast_maps(features[0], points[0][:2, :2], points[0][2:, :2])
        np.testing.assert_allclose(found[0, 1].numpy(), stretched([*z]), atol=1e-6)

    def test_direct_variational_segments_the_output(self) -> None:
        features, logits, points = two_sided()
        found = complement(CVMConfig(complement="direct_variational"), [1], features, logits, points)
        u = segment_two_phase(logits.softmax(1)[:, 1]).u
        for image in range(4):
            np.testing.assert_allclose(found[image, 1].numpy(), stretched([u[image]]), atol=1e-6)

    def test_constant_features_are_no_nan(self) -> None:
        _, logits, points = two_sided()
        found = complement(CVMConfig(), [1], torch.ones(4, 5, 12, 14), logits, points)
        assert bool(found.isfinite().all())
        assert not found[0, 1].any()


class TestTargetClasses:
    def test_the_last_of_two_unless_named(self) -> None:
        labels = LabelSpace(("stroma", "gland", "white"), white=2)
        assert target_classes(CVMConfig(), labels) == [1]
        assert target_classes(CVMConfig(target="stroma"), labels) == [0]

    def test_all_of_three(self) -> None:
        assert target_classes(CVMConfig(), fake_labels()) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("target", "labels", "words"),
        [
            ("tumour", fake_labels(tissue=2), "target 'tumour': is no tissue class; use one of tissue_0, tissue_1"),
            ("white", fake_labels(tissue=2), "target 'white': is no tissue class"),
            ("tissue_1", fake_labels(tissue=3), "target 'tissue_1': is one of 3 tissue classes"),
        ],
    )
    def test_errors(self, target: str, labels: LabelSpace, words: str) -> None:
        with pytest.raises(InputError, match="^" + words.replace("(", r"\(")) as caught:
            target_classes(CVMConfig(target=target), labels)
        assert "\n" not in str(caught.value)


class TestStore:
    def test_comes_back_within_half_a_level(self, tmp_path: Path) -> None:
        store, u = Store(tmp_path / "complement"), random_maps(3, 5, 7).float()
        store.write(2, "image", u, (5, 7))
        store.publish(2)
        found = store("image")
        assert found is not None
        assert found.dtype == torch.float32
        assert float((found - u).abs().max()) <= 0.5 / 255 + 1e-6

    def test_reads_what_is_published_alone(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        assert store("image") is None  # nothing was ever published
        store.write(0, "image", torch.zeros(2, 4, 4), (4, 4))
        assert store("image") is None
        store.publish(0)
        assert store("image") is not None
        assert store("another") is None
        store.publish(None)
        assert store("image") is None

    def test_the_refresh_of_the_checkpoint_outlives_the_next_one(self, tmp_path: Path) -> None:
        """A kill after refresh 7 and before its checkpoint: the run goes on with what refresh 4 said."""
        store = Store(tmp_path)
        for number, value in ((4, 0.0), (7, 1.0)):
            store.write(number, "image", torch.full((1, 2, 2), value), (2, 2))
            store.publish(number)
        again = Store(tmp_path)
        again.publish(4)
        assert torch.equal(again("image"), torch.zeros(1, 2, 2))
        again.drop_all_but(4)
        assert sorted(path.name for path in tmp_path.glob("refresh_*")) == ["refresh_00004"]
        again.drop_all_but(None)
        assert not list(tmp_path.glob("refresh_*"))

    def test_cells_cover_squares_of_pixels(self, tmp_path: Path) -> None:
        store, u = Store(tmp_path), torch.tensor([[[0.0, 1.0, 0.2], [0.4, 0.6, 0.8]]])
        store.write(1, "image", u, (8, 12))
        store.publish(1)
        expected = u.repeat_interleave(4, 1).repeat_interleave(4, 2)
        torch.testing.assert_close(store("image"), expected, rtol=0, atol=1e-6)

    def test_leaves_no_part_behind_and_replaces(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        for value in (0.0, 1.0):
            store.write(1, "image", torch.full((1, 2, 2), value), (2, 2))
        store.publish(1)
        assert torch.equal(store("image"), torch.ones(1, 2, 2))
        files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
        assert files == ["current.txt", "refresh_00001/image.npz"]
