"""What every method must hold: one pytest class, run over the registry here and by plug-in authors on their methods."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from tissuehint.data.records import Record
from tissuehint.data.samples import Batch
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import MethodConfig, WeakMethod
from tissuehint.model import TissueModel
from tissuehint.pipeline.recipe import TrainerSettings
from tissuehint.pipeline.training import Fit, SeedEachStep
from tissuehint.plugins import load_method
from tissuehint.testing.fakes import fake_batch, fake_data, fake_dataset, fake_labels

IMAGES = 8
ROUND_STEPS = 2
ODD_SIZES = ((65, 97), (32, 32), (64, 40))
# float32 sums in another order for another batch size
BATCH_TOLERANCE = 1e-4


@dataclass(frozen=True)
class MethodCase:
    """A method with settings so small that a training step takes a fraction of a second on one core.

    Args:
        name: in the registry.
        settings: of its config, without the name. Take a tiny encoder (``test_resnet``) and a learning rate with which
            six steps on eight images learn something.
        steps: optimiser steps of a training, a multiple of 2, at least 4.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 6

    def config(self) -> MethodConfig:
        """The checked config."""
        config: MethodConfig = load_method(self.name).Config(name=self.name, **self.settings)
        return config

    def build(self, labels: LabelSpace, seed: int = 0) -> WeakMethod:
        """The method with weights drawn from ``seed``, not yet prepared."""
        torch.manual_seed(seed)
        method: WeakMethod = load_method(self.name)(self.config(), labels)
        return method

    def train(
        self, folder: Path, labels: LabelSpace, *, seed: int = 0, steps: int | None = None, masks: bool = True
    ) -> WeakMethod:
        """Prepare and train as a run does, on eight images without augmentation, one batch of all eight a step.

        Reading a mask raises throughout. A folder in which an earlier training was killed is gone on with.

        Args:
            folder: of stage 1.
            labels: the classes.
            seed: of weights, order and everything random inside the network.
            steps: None takes ``self.steps``.
            masks: whether the records have masks (which must not be read) or none.
        """
        method = self.build(labels, seed)
        data = fake_data(fake_dataset(labels, count=(IMAGES, 2, 0), masks=masks), seed)
        fit = Fit(
            folder,
            steps=steps or self.steps,
            batch_size=IMAGES,
            round_steps=ROUND_STEPS,
            settings=TrainerSettings(accelerator="cpu", progress=False),
            seed=seed,
        )
        with unreadable_masks():
            method.prepare(data, folder / "prepared")
            method.fit(fit, data)
        return method.eval()


class MethodContract:
    """Subclass it, say which method, and pytest runs the contract.

    Example:
        ::

            class TestMine(MethodContract):
                @pytest.fixture(scope="class")
                @classmethod
                def case(cls):
                    return MethodCase("mine", {"encoder": {"name": "test_resnet"}})
    """

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls) -> MethodCase:
        """Which method; a subclass overrides it."""
        raise NotImplementedError("override the fixture `case` and return a MethodCase")

    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, case: MethodCase, tmp_path_factory: pytest.TempPathFactory) -> WeakMethod:
        """Trained without interruption on a label space with white, seed 0; tests leave it as it is."""
        return case.train(tmp_path_factory.mktemp("trained"), fake_labels())

    # ---- config ---------------------------------------------------------------------------------------------------

    def test_config_is_frozen(self, case: MethodCase) -> None:
        with pytest.raises(ValidationError):
            setattr(case.config(), "name", "another")  # noqa: B010

    def test_config_comes_back_from_json_and_yaml(self, case: MethodCase) -> None:
        config = case.config()
        as_json = json.loads(config.model_dump_json())
        as_yaml = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
        assert type(config)(**as_json) == config
        assert type(config)(**as_yaml) == config

    def test_config_refuses_an_unknown_key(self, case: MethodCase) -> None:
        with pytest.raises(ValidationError, match="no_such_key"):
            MethodCase(case.name, {**case.settings, "no_such_key": 1}).config()

    def test_method_has_its_config_and_labels(self, trained: WeakMethod, case: MethodCase) -> None:
        assert trained.config == case.config()
        assert trained.config.name == case.name
        assert trained.labels == fake_labels()
        assert trained.supervision in ("tags", "points", "proportions")

    # ---- training -------------------------------------------------------------------------------------------------

    def test_training_lowers_the_loss_on_a_fixed_batch(
        self, case: MethodCase, trained: WeakMethod, tmp_path: Path
    ) -> None:
        batch = fake_batch(trained.labels, count=IMAGES)
        start = case.build(trained.labels)
        start.prepare(fake_data(fake_dataset(trained.labels, count=(IMAGES, 2, 0))), tmp_path)
        before, after = loss_of(start, batch), loss_of(trained, batch)
        assert after < before, f"loss {before:.5f} became {after:.5f} in {case.steps} steps"

    def test_losses_are_finite_scalars_that_train_something(self, case: MethodCase, trained: WeakMethod) -> None:
        with kept(trained):
            trained.train()
            terms = trained.losses(fake_batch(trained.labels))
            assert terms
            assert all(isinstance(name, str) for name in terms)
            assert all(term.ndim == 0 and bool(term.isfinite()) for term in terms.values())
            torch.autograd.backward(torch.stack(list(terms.values())).sum())
            assert any(
                parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
                for parameter in trained.parameters()
            )
            trained.zero_grad(set_to_none=True)

    def test_same_seed_gives_the_same_weights(self, case: MethodCase, trained: WeakMethod, tmp_path: Path) -> None:
        assert_same_state(case.train(tmp_path, trained.labels), trained)

    def test_another_seed_gives_other_weights(self, case: MethodCase, trained: WeakMethod, tmp_path: Path) -> None:
        other = case.train(tmp_path, trained.labels, seed=1).state_dict()
        same = [torch.equal(value, other[name]) for name, value in trained.state_dict().items()]
        assert not all(same)

    def test_a_killed_training_goes_on_to_the_same_weights(
        self, case: MethodCase, trained: WeakMethod, tmp_path: Path
    ) -> None:
        with pytest.raises(Killed), killed_at_step(ROUND_STEPS + 2):
            case.train(tmp_path, trained.labels)
        assert_same_state(case.train(tmp_path, trained.labels), trained)

    def test_masks_make_no_difference(self, case: MethodCase, trained: WeakMethod, tmp_path: Path) -> None:
        assert_same_state(case.train(tmp_path, trained.labels, masks=False), trained)

    def test_masks_of_a_batch_are_not_read(self, trained: WeakMethod) -> None:
        batch = fake_batch(trained.labels)
        lies = replace(batch, masks=torch.randint(trained.labels.num_classes, (len(batch), 64, 64)))
        assert loss_of(trained, lies) == loss_of(trained, batch)
        with torch.no_grad():
            assert torch.equal(trained.label_guided(lies), trained.label_guided(batch))

    # ---- tissue maps ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("white", [True, False], ids=["white", "no_white"])
    @pytest.mark.parametrize(("height", "width"), ODD_SIZES, ids=str)
    def test_maps_are_probabilities_at_image_size(
        self, case: MethodCase, tmp_path: Path, height: int, width: int, white: bool
    ) -> None:
        labels = fake_labels(white=white)
        method = case.build(labels)
        method.prepare(fake_data(fake_dataset(labels, count=(IMAGES, 2, 0))), tmp_path)
        batch = fake_batch(labels, count=3, height=height, width=width)
        with torch.no_grad():
            predicted, guided = method.eval().predict(batch.images), method.label_guided(batch)
        for maps in (predicted, guided):
            assert maps.shape == (3, labels.num_classes, height, width)
            assert_probabilities(maps)

    def test_trained_maps_are_probabilities(self, trained: WeakMethod) -> None:
        batch = fake_batch(trained.labels)
        with torch.no_grad():
            assert_probabilities(trained.predict(batch.images))
            assert_probabilities(trained.label_guided(batch))

    def test_an_image_does_not_depend_on_its_batch(self, trained: WeakMethod) -> None:
        batch = fake_batch(trained.labels, count=4)
        with torch.no_grad():
            together, guided = trained.predict(batch.images), trained.label_guided(batch)
            for index in range(4):
                one = some(batch, slice(index, index + 1))
                torch.testing.assert_close(
                    trained.predict(one.images)[0], together[index], atol=BATCH_TOLERANCE, rtol=0
                )
                torch.testing.assert_close(trained.label_guided(one)[0], guided[index], atol=BATCH_TOLERANCE, rtol=0)

    def test_prediction_is_repeatable(self, trained: WeakMethod) -> None:
        batch = fake_batch(trained.labels)
        with torch.no_grad():
            first, guided = trained.predict(batch.images), trained.label_guided(batch)
            torch.manual_seed(1234)
            assert torch.equal(trained.predict(batch.images), first)
            assert torch.equal(trained.label_guided(batch), guided)

    def test_prediction_changes_nothing(self, trained: WeakMethod) -> None:
        batch = fake_batch(trained.labels)
        images = batch.images.clone()
        before = {name: value.clone() for name, value in trained.state_dict().items()}
        trained.zero_grad(set_to_none=True)
        trained.predict(batch.images)
        trained.label_guided(batch)
        trained.explain(batch)
        assert torch.equal(batch.images, images)
        assert all(parameter.grad is None for parameter in trained.parameters())
        assert not trained.training
        assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())

    def test_prediction_reads_no_hint(self, trained: WeakMethod) -> None:
        bare = Batch(["bare"], fake_batch(trained.labels, count=1).images)
        with torch.no_grad(), unreadable_masks():
            assert_probabilities(trained.predict(bare.images))

    def test_white_pixels_are_in_the_white_channel(self, trained: WeakMethod) -> None:
        batch = fake_batch(trained.labels, count=1, first=2)  # a quarter of picture 2 is white
        with torch.no_grad():
            maps = trained.predict(batch.images)[0]
        white = trained.labels.white
        assert white is not None
        assert float(maps[white, 52:].mean()) > 0.5
        assert float(maps[white, :44].mean()) < 0.5

    # ---- hints ----------------------------------------------------------------------------------------------------

    def test_an_image_with_an_empty_hint_has_an_empty_map(self, trained: WeakMethod) -> None:
        batch = fake_batch(trained.labels, count=3)
        assert batch.tags is not None
        assert batch.points is not None
        assert batch.proportions is not None
        kept = torch.tensor([1.0, 0.0, 1.0])[:, None]
        points = [batch.points[0], batch.points[1][:0], batch.points[2]]
        emptied = replace(batch, tags=batch.tags * kept, points=points, proportions=batch.proportions * kept)
        for first in (0, 1):  # picture 2, which has white, is emptied in the second turn
            with torch.no_grad():
                maps = trained.label_guided(emptied)
            assert float(maps[1].abs().max()) == 0
            assert_probabilities(maps[[0, 2]])
            if first == 0:
                emptied = replace(emptied, images=batch.images[[0, 2, 1]])

    def test_no_class_outside_the_tags(self, trained: WeakMethod) -> None:
        if trained.supervision != "tags":
            pytest.skip("only tags say that a class is absent")
        batch = fake_batch(trained.labels)
        assert batch.tags is not None
        with torch.no_grad():
            tissue = trained.label_guided(batch)[:, : trained.labels.num_tissue]
        assert float(tissue.amax((2, 3))[batch.tags == 0].max()) == 0
        assert float(tissue.amax((2, 3))[batch.tags == 1].min()) > 0

    def test_explain_gives_named_finite_maps(self, trained: WeakMethod) -> None:
        batch = fake_batch(trained.labels, count=2, height=65, width=97)
        maps = trained.explain(batch)
        assert maps
        for name, value in maps.items():
            assert isinstance(name, str)
            assert value.ndim == 4, f"{name} has shape {tuple(value.shape)}, not (B, n, h, w)"
            assert len(value) == 2
            assert not value.requires_grad, f"{name} keeps a graph"
            assert bool(value.isfinite().all()), f"{name} is not finite"

    # ---- files ----------------------------------------------------------------------------------------------------

    def test_a_saved_model_predicts_the_same(self, trained: WeakMethod, tmp_path: Path) -> None:
        images = fake_batch(trained.labels, count=2, height=65, width=97).images
        TissueModel.from_method(trained).save(tmp_path)
        torch.manual_seed(99)
        loaded = TissueModel.load(tmp_path)
        assert torch.equal(loaded.predict(images), TissueModel.from_method(trained).predict(images))


class Killed(BaseException):
    """Stands for a kill: nothing but the contract itself catches it."""


@contextmanager
def killed_at_step(number: int) -> Iterator[None]:
    """Raise ``Killed`` when the ``number``-th optimiser step, counted from 1 over all fits, is about to begin."""
    begun = 0
    original = SeedEachStep.on_train_batch_start

    def begin(self: SeedEachStep, *words: Any, **names: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == number:
            raise Killed
        original(self, *words, **names)

    with patch.object(SeedEachStep, "on_train_batch_start", begin):
        yield


@contextmanager
def unreadable_masks() -> Iterator[None]:
    """Every attempt to read the mask of a record fails."""

    def refuse(self: Record, labels: LabelSpace) -> Any:
        raise AssertionError(f"the mask of {self.id} is read")

    with patch.object(Record, "read_mask", refuse):
        yield


@contextmanager
def kept(method: WeakMethod) -> Iterator[None]:
    """Put weights, buffers and mode of ``method`` back at the end."""
    state = {name: value.clone() for name, value in method.state_dict().items()}
    training = method.training
    try:
        yield
    finally:
        method.load_state_dict(state)
        method.train(training)


def loss_of(method: WeakMethod, batch: Batch) -> float:
    """Sum of the losses in training mode; ``method`` is left as it was."""
    with kept(method):
        method.train()
        torch.manual_seed(0)
        return float(torch.stack(list(method.losses(batch).values())).sum().detach())


def some(batch: Batch, which: slice) -> Batch:
    """A part of a batch."""
    return Batch(
        batch.ids[which],
        batch.images[which],
        None if batch.tags is None else batch.tags[which],
        None if batch.points is None else batch.points[which],
        None if batch.proportions is None else batch.proportions[which],
        None if batch.masks is None else batch.masks[which],
    )


def assert_probabilities(maps: Tensor) -> None:
    """(B,K,H,W) in [0,1], finite, sum 1 at every pixel."""
    assert maps.is_floating_point()
    assert bool(maps.isfinite().all())
    assert float(maps.min()) >= 0
    assert float(maps.max()) <= 1 + 1e-6
    torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]), atol=1e-5, rtol=0)


def assert_same_state(one: WeakMethod, other: WeakMethod) -> None:
    """Bit for bit the same tensors."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, f"{len(different)} of {len(mine)} tensors differ: {', '.join(different[:3])}"
