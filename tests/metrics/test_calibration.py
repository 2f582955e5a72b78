"""Expected calibration error against torchmetrics, and over parts."""

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from tissuehint.errors import InputError
from tissuehint.metrics import CalibrationBins


def pixels(seed=0, count=5000, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(classes, count, generator=generator)
    target = torch.where(
        torch.rand(count, generator=generator) < 0.6,
        logits.argmax(0),
        torch.randint(classes, (count,), generator=generator),
    )
    return logits.softmax(0), target


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_error_is_that_of_torchmetrics(classes):
    probabilities, target = pixels(classes, classes=classes)
    bins = CalibrationBins()
    bins.update(probabilities, target)
    expected = MulticlassCalibrationError(classes, n_bins=15, norm="l1")(probabilities.T, target)
    assert bins.error() == pytest.approx(float(expected), abs=1e-5)


def test_parts_add_up():
    probabilities, target = pixels()
    whole, first, second = CalibrationBins(), CalibrationBins(), CalibrationBins()
    whole.update(probabilities, target)
    first.update(probabilities[:, :1000], target[:1000])
    second.update(probabilities[:, 1000:], target[1000:])
    first.merge(second)
    np.testing.assert_array_equal(first.counts, whole.counts)
    assert first.error() == pytest.approx(whole.error(), abs=1e-12)


def test_certain_and_right_is_0_certain_and_wrong_is_1():
    sure = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    for target, expected in ((0, 0.0), (1, 1.0)):
        bins = CalibrationBins()
        bins.update(sure, torch.full((2,), target))
        assert bins.error() == expected


def test_no_pixel_has_no_error():
    assert np.isnan(CalibrationBins().error())
    bins = CalibrationBins()
    bins.update(torch.zeros(3, 0), torch.zeros(0, dtype=torch.long))
    assert np.isnan(bins.error())


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="one column a pixel"):
        CalibrationBins().update(torch.zeros(2, 3), torch.zeros(4, dtype=torch.long))
