import pytest
import torch
import torch.nn.functional as F

from tissuehint.errors import InputError
from tissuehint.methods.base import ClassMaps, TestTimeAugmentation
from tissuehint.methods.cam import CAM, CAMConfig
from tissuehint.nn.config import EncoderConfig
from tissuehint.testing import fake_batch, fake_labels

ENCODER = EncoderConfig(name="test_resnet")


def cam(*, white=True, **settings):
    torch.manual_seed(0)
    return CAM(CAMConfig(encoder=ENCODER, **settings), fake_labels(white=white)).eval()


@pytest.fixture
def images():
    return fake_batch(fake_labels(), count=3).images


class TestNetwork:
    def test_logits_are_a_linear_classifier_on_pooled_features(self, images):
        """Zhou et al. 2016, Eq. 2: pooling first and classifying then gives the same logits."""
        method = cam()
        with torch.no_grad():
            seen = method.class_maps(images)
            pooled = method.network.encoder(images)[-1].mean((2, 3))
            expected = F.linear(pooled, method.network.classifier.weight[:, :, 0, 0])
        torch.testing.assert_close(seen.logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen.maps.mean((2, 3)), seen.logits)

    def test_levels_are_joined_at_the_finest_of_them(self, images):
        method = cam(levels=3)
        features = method.network.encoder(images)
        seen = method.class_maps(images)
        assert seen.maps.shape[-2:] == features[-3].shape[-2:]
        assert method.network.classifier.in_channels == sum(each.shape[1] for each in features[-3:])

    def test_loss_is_binary_cross_entropy_of_the_tags(self):
        method, batch = cam(), fake_batch(fake_labels(), count=3)
        loss = method.losses(batch)["classification"]
        probability = method.class_maps(batch.images).logits.sigmoid()
        by_hand = -(batch.tags * probability.log() + (1 - batch.tags) * (1 - probability).log()).mean()
        torch.testing.assert_close(loss, by_hand)

    def test_without_tags_it_says_so(self, images):
        from tissuehint.data.samples import Batch

        with pytest.raises(InputError, match="tags"):
            cam().losses(Batch(["a", "b", "c"], images))


class TestTissueMap:
    def by_hand(self, maps, gate):
        """p_c = (M_c + 1e-4) g_c / sum, M_c = ReLU(F_c) / max ReLU(F_c), pixel by pixel."""
        classes, height, width = maps.shape
        result = torch.zeros(classes, height, width)
        peaks = [max(float(maps[index].max()), 0) for index in range(classes)]
        for row in range(height):
            for column in range(width):
                weights = [
                    (max(float(maps[c, row, column]), 0) / max(peaks[c], 1e-8) + 1e-4) * float(gate[c])
                    for c in range(classes)
                ]
                for c in range(classes):
                    result[c, row, column] = weights[c] / sum(weights)
        return result

    def test_is_the_equation(self):
        method = cam(white=False)
        maps = torch.randn(2, 3, 4, 5)
        gate = torch.tensor([[True, False, True], [True, True, True]])
        found = method.tissue_map(maps, gate, torch.zeros(2, 3, 4, 5))
        for index in range(2):
            torch.testing.assert_close(found[index], self.by_hand(maps[index], gate[index]), atol=1e-5, rtol=1e-5)

    def test_a_map_that_is_nowhere_above_zero_is_shared_evenly(self):
        method = cam(white=False)
        found = method.tissue_map(-torch.ones(1, 3, 4, 4), torch.tensor([[True, True, False]]), torch.zeros(1, 3, 4, 4))
        torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([0.5, 0.5, 0.0]))

    @pytest.mark.parametrize(("threshold", "area", "white"), [(200, 50, True), (250, 50, False), (200, 70, False)])
    def test_white_by_threshold_and_area(self, threshold, area, white):
        method = cam(white_threshold=threshold, white_min_area=area)
        images = torch.full((1, 3, 32, 32), 0.4)
        images[:, :, :8, :8] = 240 / 255
        maps = torch.rand(1, 3, 4, 4)
        found = method.tissue_map(maps, torch.ones(1, 3, dtype=torch.bool), images)
        assert bool(((found[0, 3, :8, :8] > 0.99) == white).all())
        assert float(found[0, 3, 8:].max()) == 0
        # protocols A and B ask for the likeliest tissue at white pixels too
        plain = method.tissue_map(maps, torch.ones(1, 3, dtype=torch.bool), images * 0)
        assert torch.equal(found[0, :3].argmax(0), plain[0, :3].argmax(0))


class TestPresence:
    def test_gate_is_the_threshold_and_the_likeliest(self, images, monkeypatch):
        method = cam(white=False, presence_threshold=0.4)
        logits = torch.tensor([[0.3, 0.5, 0.1], [0.1, 0.2, 0.15], [0.9, 0.39, 0.41]]).logit()
        monkeypatch.setattr(method, "class_maps", lambda images: ClassMaps(torch.ones(3, 3, 4, 4), logits))
        present = method.predict(images).amax((2, 3)) > 0
        assert present.tolist() == [[False, True, False], [False, True, False], [True, False, True]]

    def test_threshold_zero_lets_every_class_in(self, images):
        with torch.no_grad():
            found = cam(white=False, presence_threshold=0).predict(images)
        assert float(found.amax((2, 3)).min()) > 0


class TestViews:
    def test_flips_make_the_map_of_a_mirrored_image_the_mirrored_map(self, images):
        method = cam(test_time=TestTimeAugmentation(flip=True))
        with torch.no_grad():
            maps = method.predict(images)
            for axes in ((-1,), (-2,), (-2, -1)):
                torch.testing.assert_close(method.predict(images.flip(axes)).flip(axes), maps, atol=1e-4, rtol=1e-4)

    def test_every_view_is_looked_at_once_and_averaged(self, images, monkeypatch):
        views = []
        method = cam(test_time=TestTimeAugmentation(flip=True, scales=(0.5, 1.0), intensities=(1.0, 1.2)))

        def look(view):
            views.append(view)
            side = view.shape[-1] // 8
            return ClassMaps(torch.full((3, 3, side, side), float(len(views))), torch.full((3, 3), float(len(views))))

        monkeypatch.setattr(method, "class_maps", look)
        seen = method.augmented(images)
        assert len(views) == 4 * 2 * 2
        assert sorted({view.shape[-1] for view in views}) == [32, 64]
        assert float(max(view.max() for view in views)) <= 1
        torch.testing.assert_close(seen.maps, torch.full_like(seen.maps, sum(range(1, 17)) / 16))
        torch.testing.assert_close(seen.logits, torch.full_like(seen.logits, 8.5))

    def test_the_plain_view_alone_is_the_plain_maps(self, images):
        method = cam()
        with torch.no_grad():
            assert torch.equal(method.augmented(images).maps, method.class_maps(images).maps)

    @pytest.mark.parametrize("wrong", [{"scales": []}, {"scales": [0]}, {"intensities": [-1]}])
    def test_factors_are_above_zero(self, wrong):
        with pytest.raises(ValueError, match="at least one factor"):
            TestTimeAugmentation(**wrong)
