"""PBIP as a method: the frozen encoder stays outside, losses against the equations in loops, levels against numpy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file

from tissuehint.data.samples import Batch
from tissuehint.errors import InputError
from tissuehint.methods import prototypes as shared
from tissuehint.methods.pbip import PBIP, PBIPConfig
from tissuehint.model import TissueModel
from tissuehint.nn.encoders import pad_to_multiple
from tissuehint.nn.image_encoders import ImageEncoderConfig, RandomEncoderWarning, build_image_encoder
from tissuehint.testing import fake_batch, fake_dataset, fake_labels
from tissuehint.testing.fakes import fake_data

pytestmark = pytest.mark.filterwarnings(f"ignore::{RandomEncoderWarning.__module__}.{RandomEncoderWarning.__name__}")

ENCODER = {"name": "test_resnet"}
FROZEN = {"name": "test_resnet", "side": 32}
COUNTS = (2, 1, 3)
LEVELS = (0.2, 0.5, 1.5)
LARGE = 2000.0  # a scale for logits far from 0: the maps of ``tell_apart`` are of both signs, their means small
RATES = {"name": "adamw", "learning_rate": 1e-3, "head_multiplier": 1, "power": 0}
TAGS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]]).float()


def pbip(*, white=False, seed=0, **settings):
    """With prototypes drawn at random, without a bank, and with maps that say something (``tell_apart``)."""
    torch.manual_seed(seed)
    given = {
        "encoder": ENCODER,
        "image_encoder": FROZEN,
        "bank": {"prototypes_per_class": COUNTS},
        "level_weights": LEVELS,
        "scale": 5.0,
        "optimization": RATES,
    }
    method = PBIP(PBIPConfig(**{**given, **settings}), fake_labels(white=white)).eval()
    method.bank_prototypes.copy_(F.normalize(torch.randn(len(method.prototypes()), method.dim), dim=1))
    tell_apart(method)
    return method


@torch.no_grad()
def tell_apart(method):
    """Point prototypes (or convolutions) along what differs between the cells of an image.

    All cells of a random network look alike: maps would be flat, all foreground, and equations would go untested.
    """
    network, images = method.network, batch_of(96, 96).images
    for level, features in enumerate(network.encoder(images)[-network.levels :]):
        means = features.mean((2, 3))
        cells = (features - means[..., None, None]).movedim(1, 3).flatten(0, 2)
        weights = torch.randn(sum(network.counts), len(cells), generator=torch.Generator().manual_seed(level))
        wanted = F.normalize(weights @ cells, dim=1)
        # across the mean cell of every image, so that each image has cells of both signs
        wanted = F.normalize(wanted - wanted @ torch.linalg.pinv(means) @ means, dim=1)
        if network.convolutions:
            network.convolutions[level].weight.copy_(wanted[..., None, None])
            continue
        first, _, last = network.projections[level]
        torch.nn.init.normal_(first.weight, std=0.3)
        last.weight.copy_((torch.linalg.pinv(first(method.prototypes()).relu()) @ wanted).T)


def batch_of(height=64, width=64, tags=TAGS):
    batch = fake_batch(fake_labels(white=False), count=len(tags), height=height, width=width)
    return Batch(batch.ids, batch.images, tags=tags)


def matching_of(method, batch):
    terms = method.losses(batch)
    terms.pop("classification")
    return terms


def gradients(method, loss):
    method.zero_grad(set_to_none=True)
    loss.backward()
    return {key: value.grad.clone() for key, value in method.named_parameters() if value.grad is not None}


def normals(values):
    return sum(value.detach().abs().sum().item() for value in values)


def optimizer_of(method, monkeypatch):
    monkeypatch.setattr(method, "_trainer", SimpleNamespace(estimated_stepping_batches=30))
    monkeypatch.setattr(method, "log", lambda *_, **__: None)
    monkeypatch.setattr(method, "log_dict", lambda *_, **__: None)
    return method.configure_optimizers()["optimizer"]


def refuse_encoder(monkeypatch):
    monkeypatch.setattr(shared, "build_image_encoder", lambda *_: pytest.fail("the frozen encoder is built"))


# ---- the equations, slowly -----------------------------------------------------------------------------------------


def of_class(values, classes, counts=COUNTS):
    """(.., L, ..) -> the prototypes of one class, along the first axis."""
    first = sum(counts[:classes])
    return values[first : first + counts[classes]]


def picture(image):
    """What the frozen encoder would see of an image: resized and normalised with its own statistics."""
    encoder = build_image_encoder(ImageEncoderConfig(**FROZEN))
    small = F.interpolate(image[None], (32, 32), mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.statistics.mean, encoder.statistics.std))
    return encoder, (small - mean) / std


def cosine(one, other):
    return F.normalize(one, dim=0) @ F.normalize(other, dim=0)


def parts(maps, image, threshold):
    """X_FG and X_BG of Eq. 5 for one map (32,32), scaled to 1; what is nowhere above 0 is background."""
    highest = maps.max()
    if highest.item() <= 0:
        return 0 * image, image
    scaled = maps.clamp_min(0) / highest
    chosen = torch.ones_like(maps)
    if threshold is not None:
        chosen = (maps >= threshold * highest).float()  # Eq. 4
        return chosen * scaled * image, (1 - chosen) * (1 - scaled) * image
    return scaled * image, (1 - scaled) * image


def class_form_slowly(method, batch, *, threshold, temperature, levels=(0, 1, 2), counts=COUNTS):
    """Eq. 2, 3, 4, 5, 9-12, an image, a class and a prototype at a time."""
    seen, prototypes = method.see(batch.images), method.prototypes()
    fronts, backs = [], []
    for image in range(len(batch)):
        encoder, normalised = picture(batch.images[image])
        for number in range(3):
            if not batch.tags[image, number]:
                continue
            total = 0
            for level in levels:
                maps = of_class(seen.similarities[level][image], number, counts).mean(0)  # Eq. 2
                total = total + F.interpolate(maps[None, None], (32, 32), mode="bilinear", align_corners=False)[0, 0]
            front, back = (encoder.encode(each[None])[0] for each in parts(total, normalised, threshold))
            own = list(of_class(prototypes, number))
            others = [p for each in range(3) if each != number for p in of_class(prototypes, each)]
            a, b = sum(cosine(front, p) for p in own), sum(cosine(front, p) for p in others)  # Eq. 10
            first, second = (a / temperature).exp(), (b / temperature).exp()
            fronts.append(-(first / (first + second)).log())  # Eq. 9
            a = sum(cosine(back, p) for p in own) / len(own)
            b = sum(cosine(back, p) for p in others) / len(others)  # Eq. 12
            first, second = (a / temperature).exp(), (b / temperature).exp()
            backs.append(-(second / (first + second)).log())  # Eq. 11
    return torch.stack(fronts).mean(), torch.stack(backs).mean()


def prototype_form_slowly(method, batch, *, threshold, temperature):
    """One prototype against all others, for the prototypes of a tagged class that score above its mean."""
    seen, prototypes = method.see(batch.images), method.prototypes()
    fronts, backs = [], []
    for image in range(len(batch)):
        encoder, normalised = picture(batch.images[image])
        for number in range(3):
            if not batch.tags[image, number]:
                continue
            scores = of_class(seen.logits[-1][image], number).tolist()
            above = [k for k, value in enumerate(scores) if value > np.mean(scores)] or [int(np.argmax(scores))]
            for own in above:
                place = sum(COUNTS[:number]) + own
                maps = seen.similarities[-1][image, place]
                maps = F.interpolate(maps[None, None], (32, 32), mode="bilinear", align_corners=False)[0, 0]
                front, back = (encoder.encode(each[None])[0] for each in parts(maps, normalised, threshold))
                powers = torch.stack([(cosine(front, p) / temperature).exp() for p in prototypes])
                fronts.append(-(powers[place] / powers.sum()).log())
                powers = torch.stack([(cosine(back, p) / temperature).exp() for p in prototypes])
                backs.append(-((powers.sum() - powers[place]) / powers.sum()).log())
    return torch.stack(fronts).mean(), torch.stack(backs).mean(), len(fronts)


class TestMatchingAgainstTheEquations:
    SETTINGS = [  # noqa: RUF012
        {"threshold": 0.15, "temperature": 1.0},
        {"threshold": 0.5, "temperature": 0.07},
        {"threshold": None, "temperature": 1.0},
        {"threshold": 1.0, "temperature": 0.5},
    ]

    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_class_form(self, setting):
        weights = {"weight": 0.7, "foreground": 1.3, "background": 0.4}
        method, batch = pbip(matching={**setting, **weights, "chunk": 1000}), batch_of()
        found = matching_of(method, batch)
        front, back = class_form_slowly(method, batch, **setting)
        assert found.keys() == {"foreground", "background"}
        assert found["foreground"].item() == pytest.approx(0.7 * 1.3 * front.item(), rel=1e-4)
        assert found["background"].item() == pytest.approx(0.7 * 0.4 * back.item(), rel=1e-4)
        fast = gradients(method, sum(matching_of(method, batch).values()))
        slow = gradients(method, 0.7 * (1.3 * front + 0.4 * back))
        assert fast.keys() == slow.keys()
        for key, value in slow.items():
            torch.testing.assert_close(fast[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-7)

    @pytest.mark.parametrize("setting", SETTINGS[:2], ids=str)
    def test_prototype_form(self, setting):
        matching = {**setting, "form": "prototype", "maps": "coarsest", "weight": 0.1, "background": 1, "chunk": 1000}
        method, batch = pbip(matching=matching), batch_of()
        front, back, pairs = prototype_form_slowly(method, batch, **setting)
        assert pairs > int(TAGS.sum())  # some class has two prototypes above its mean, or the loop proves little
        found = matching_of(method, batch)
        assert found["foreground"].item() == pytest.approx(0.1 * front.item(), rel=1e-4)
        assert found["background"].item() == pytest.approx(0.1 * back.item(), rel=1e-4)
        fast = gradients(method, sum(matching_of(method, batch).values()))
        slow = gradients(method, 0.1 * (front + back))
        for key, value in slow.items():
            torch.testing.assert_close(fast[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-7)

    def test_the_coarsest_maps_alone(self):
        method, batch = pbip(matching={"maps": "coarsest", "weight": 1, "background": 1}), batch_of()
        front, back = class_form_slowly(method, batch, threshold=0.15, temperature=1.0, levels=(2,))
        found = matching_of(method, batch)
        assert found["foreground"].item() == pytest.approx(front.item(), rel=1e-4)
        assert found["background"].item() == pytest.approx(back.item(), rel=1e-4)
        grown = gradients(method, sum(matching_of(method, batch).values()))
        assert normals(method.network.projections[2].parameters()) > 0
        assert not [key for key in grown if key.startswith(("network.projections.0", "network.projections.1"))]

    def test_with_a_convolution_a_class_has_one_map(self):
        method, batch = pbip(similarity="convolution", matching={"weight": 1, "background": 1}), batch_of()
        front, back = class_form_slowly(method, batch, threshold=0.15, temperature=1.0, counts=(1, 1, 1))
        found = matching_of(method, batch)
        assert found["foreground"].item() == pytest.approx(front.item(), rel=1e-4)
        assert found["background"].item() == pytest.approx(back.item(), rel=1e-4)

    def test_sparsity_is_the_mean_of_the_coarsest_maps_with_their_factor(self):
        method, batch = pbip(matching={"weight": 0.1, "sparsity": 5e-4}), batch_of()
        seen = method.see(batch.images)
        by_hand = 0.1 * 5e-4 * 5.0 * seen.similarities[-1].detach().double().mean().item()
        assert matching_of(method, batch)["sparsity"].item() == pytest.approx(by_hand, rel=1e-4)


class TestMatching:
    @pytest.mark.parametrize("form", ["class", "prototype"])
    @pytest.mark.parametrize(("kept", "lost"), [("foreground", "background"), ("background", "foreground")])
    def test_one_loss_alone_is_what_it_is_with_the_other(self, form, kept, lost):
        batch = batch_of()
        both = matching_of(pbip(matching={"form": form}), batch)
        alone = matching_of(pbip(matching={"form": form, lost: 0}), batch)
        assert both.keys() == {kept, lost}
        assert alone.keys() == {kept}
        assert alone[kept].item() == pytest.approx(both[kept].item(), rel=1e-5)

    @pytest.mark.parametrize("matching", [{"weight": 0}, {"foreground": 0, "background": 0}], ids=str)
    def test_without_weight_no_frozen_encoder_is_built(self, matching, monkeypatch):
        refuse_encoder(monkeypatch)
        method = pbip(matching=matching).train()
        optimizer = optimizer_of(method, monkeypatch)
        terms = method.losses(batch_of())
        assert terms.keys() == {"classification"}
        method.training_step(batch_of(), 0).backward()
        optimizer.step()
        with torch.no_grad():
            method.eval().predict(batch_of().images)

    def test_inference_builds_no_frozen_encoder(self, monkeypatch):
        refuse_encoder(monkeypatch)
        method, batch = pbip(), batch_of()
        with torch.no_grad():
            method.predict(batch.images)
            method.label_guided(batch)
        method.explain(batch)

    @pytest.mark.parametrize("maps", ["sum", "coarsest"])
    @pytest.mark.parametrize("form", ["class", "prototype"])
    @pytest.mark.parametrize("lost", ["background", "foreground"])
    def test_each_loss_reaches_the_encoder_through_the_maps(self, form, lost, maps):
        method = pbip(matching={"form": form, "maps": maps, lost: 0})
        gradients(method, sum(matching_of(method, batch_of()).values()))
        network = method.network
        assert normals(value.grad for value in network.encoder.parameters() if value.grad is not None) > 0
        levels = range(3) if maps == "sum" else [2]
        for level in levels:
            assert normals(value.grad for value in network.projections[level].parameters()) > 0
        assert method.bank_prototypes.grad is None

    @pytest.mark.parametrize("form", ["class", "prototype"])
    def test_chunks_change_nothing(self, form):
        found = []
        for chunk in (1, 3, 1000):
            method = pbip(matching={"form": form, "chunk": chunk, "temperature": 0.2})
            terms = matching_of(method, batch_of())
            found.append((terms, gradients(method, sum(terms.values()))))
        for terms, grown in found[:-1]:
            for key, value in found[-1][0].items():
                torch.testing.assert_close(terms[key], value, rtol=1e-4, atol=1e-6)
            for key, value in found[-1][1].items():
                torch.testing.assert_close(grown[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-7)

    @pytest.mark.parametrize("form", ["class", "prototype"])
    def test_a_batch_without_tags_matches_nothing(self, form):
        method, batch = pbip(matching={"form": form}), batch_of(tags=torch.zeros(4, 3))
        terms = method.losses(batch)
        assert terms["foreground"].item() == terms["background"].item() == 0
        assert terms["classification"].item() > 0
        grown = gradients(method, terms["foreground"] + terms["background"])
        assert normals(grown.values()) == 0
        grown = gradients(method, sum(method.losses(batch).values()))
        assert all(bool(value.isfinite().all()) for value in grown.values())

    def test_an_image_without_tags_is_as_good_as_none(self):
        tags = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]]).float()
        method, batch = pbip(), batch_of(tags=tags)
        fewer = Batch(batch.ids[:2], batch.images[:2], tags=tags[:2])
        for key, value in matching_of(method, fewer).items():
            assert matching_of(method, batch)[key].item() == pytest.approx(value.item(), rel=1e-4)

    def test_a_map_without_anything_above_0_is_background(self):
        """The foreground is grey then, and the background the image itself; nothing is NaN."""
        method, batch = pbip(similarity="convolution"), batch_of()
        for convolution in method.network.convolutions:
            torch.nn.init.zeros_(convolution.weight)
            torch.nn.init.constant_(convolution.bias, -1.0)
        terms = method.losses(batch)
        assert all(bool(value.isfinite()) for value in terms.values())
        grown = gradients(method, sum(terms.values()))
        assert all(bool(value.isfinite().all()) for value in grown.values())

    @pytest.mark.parametrize(("height", "width"), [(65, 97), (33, 50)])
    def test_the_map_lies_on_the_image_also_where_cells_reach_over_it(self, height, width):
        """The loss is that of maps cut at the border of the image, before they are shrunk to the encoder's side."""
        method, batch = pbip(matching={"weight": 1, "background": 0, "threshold": None}), batch_of(height, width)
        seen, losses = method.see(batch.images), []
        for image in range(len(batch)):
            encoder, normalised = picture(batch.images[image])
            for number in np.flatnonzero(TAGS[image]):
                total = 0
                for level, stride in enumerate((8, 16, 32)):
                    maps = of_class(seen.similarities[level][image], number).mean(0)[None, None]
                    size = (maps.shape[2] * stride, maps.shape[3] * stride)
                    if size != (height, width):
                        maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)[..., :height, :width]
                    total = total + F.interpolate(maps, (32, 32), mode="bilinear", align_corners=False)[0, 0]
                front = encoder.encode(parts(total, normalised, None)[0][None])[0]
                cosines = torch.stack([cosine(front, each) for each in method.prototypes()])
                own = torch.tensor([c for c, count in enumerate(COUNTS) for _ in range(count)]) == number
                losses.append(F.softplus(cosines[~own].sum() - cosines[own].sum()))
        found = matching_of(method, batch)["foreground"]
        assert found.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


class TestFrozenEncoder:
    def test_it_is_no_part_of_the_module(self):
        method = pbip()
        before = set(method.state_dict())
        method.losses(batch_of())
        inside = {id(value) for value in method.parameters()} | {id(value) for value in method.buffers()}
        assert set(method.state_dict()) == before
        assert not [key for key in before if "tower" in key or "image_encoder" in key]
        assert not inside & {id(value) for value in method.image_encoder.parameters()}
        assert method.image_encoder not in list(method.modules())
        assert method.image_encoder is method.image_encoder

    def test_training_leaves_it_as_it_is(self, monkeypatch):
        method = pbip().train()
        optimizer, encoder = optimizer_of(method, monkeypatch), method.image_encoder
        before = {key: value.clone() for key, value in encoder.state_dict().items()}
        prototypes = method.prototypes().clone()
        trained = {key: value.detach().clone() for key, value in method.named_parameters()}
        for _ in range(3):
            optimizer.zero_grad()
            method.training_step(batch_of(), 0).backward()
            optimizer.step()
        assert not any(module.training for module in encoder.modules())
        assert all(value.grad is None and not value.requires_grad for value in encoder.parameters())
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert torch.equal(method.prototypes(), prototypes)
        same = [key for key, value in method.named_parameters() if torch.equal(value, trained[key])]
        assert not same

    def test_the_optimiser_has_what_is_trained_and_no_more(self, monkeypatch):
        method = pbip()
        _ = method.image_encoder
        optimizer = optimizer_of(method, monkeypatch)
        given = [id(value) for group in optimizer.param_groups for value in group["params"]]
        assert sorted(given) == sorted(id(value) for value in method.parameters() if value.requires_grad)

    def test_a_model_is_loaded_without_it(self, tmp_path, monkeypatch):
        weights = tmp_path / "frozen.pt"
        torch.manual_seed(5)
        source = build_image_encoder(ImageEncoderConfig(name="test_resnet", seed=9))
        torch.save({key.removeprefix("network."): value for key, value in source.tower.state_dict().items()}, weights)
        frozen = {**FROZEN, "weights": str(weights)}
        labels = fake_labels()
        config = PBIPConfig(encoder=ENCODER, image_encoder=frozen, bank={"prototypes_per_class": 1})
        method = PBIP(config, labels).eval()
        method.prepare(fake_data(fake_dataset(labels, count=(8, 0, 0))), tmp_path / "prepared")
        images = fake_batch(labels, count=2, height=65, width=97).images
        TissueModel.from_method(method).save(tmp_path / "model")
        expected = TissueModel.from_method(method).predict(images)
        weights.unlink()
        refuse_encoder(monkeypatch)
        loaded = TissueModel.load(tmp_path / "model")
        assert torch.equal(loaded.predict(images), expected)
        assert torch.equal(loaded.network.prototypes(), method.prototypes())
        assert float(method.prototypes().abs().sum()) > 0
        state = load_file(str(tmp_path / "model" / "model.safetensors"))
        assert torch.equal(state["bank_prototypes"], method.prototypes())
        assert not [key for key in state if "tower" in key]
        assert json.loads((tmp_path / "model" / "model.json").read_text())["architecture"]["name"] == "pbip"


class TestClassification:
    def by_hand(self, method, batch, levels=LEVELS):
        """Binary cross-entropy of the mean over cells and prototypes, in double precision, level by level."""
        seen, total = method.see(batch.images), 0.0
        for maps, scale, weight in zip(seen.similarities, method.network.scales, levels, strict=True):
            for image in range(len(batch)):
                for number in range(3):
                    values = of_class(maps[image].detach().double(), number, method.network.counts)
                    presence = (float(scale.detach()) * values.mean((1, 2)).mean()).sigmoid().item()
                    tag = batch.tags[image, number].item()
                    total -= weight * np.log(presence if tag else 1 - presence) / batch.tags.numel()
        return total

    @pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97)])
    @pytest.mark.parametrize("similarity", ["cosine", "convolution"])
    def test_by_hand(self, similarity, height, width):
        method, batch = pbip(similarity=similarity, scale=LARGE, matching={"weight": 0}), batch_of(height, width)
        expected = self.by_hand(method, batch)
        assert method.losses(batch)["classification"].item() == pytest.approx(expected, rel=1e-4)
        assert not torch.equal(method.see(batch.images).logits[0], method.see(batch.images).logits[1])

    def test_training_takes_the_mean_whatever_inference_does(self):
        batch = batch_of()
        losses = [pbip(merge=each, scale=LARGE, matching={"weight": 0}).losses(batch) for each in ("mean", "softmax")]
        assert losses[0]["classification"].item() == losses[1]["classification"].item()

    def test_a_level_of_weight_0_is_not_trained(self):
        method = pbip(level_weights=(0, 1, 1), scale=LARGE, matching={"weight": 0})
        grown = gradients(method, method.losses(batch_of())["classification"])
        assert not [key for key in grown if key.startswith("network.projections.0")]
        expected = self.by_hand(method, batch_of(), (0, 1, 1))
        assert method.losses(batch_of())["classification"].item() == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97), (33, 50)])
    def test_similarities_are_eq_2(self, normalize, height, width):
        method, images = pbip(normalize_prototypes=normalize), batch_of(height, width).images
        network = method.network
        given, projected = [], []
        for projection in network.projections:
            projection.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
            projection.register_forward_hook(lambda _, __, output: projected.append(output.double().numpy()))
        with torch.no_grad():
            features = network.encoder(pad_to_multiple(images, network.encoder.multiple))[-3:]
            seen = method.see(images)
        bank = method.prototypes() - method.prototypes().mean(0)
        for each in given:  # the prototypes of the bank, up to a common shift and factor
            torch.testing.assert_close(F.normalize(each - each.mean(0), dim=1), F.normalize(bank, dim=1))
        for level, stride in enumerate((8, 16, 32)):
            cells = features[level][..., : -(-height // stride), : -(-width // stride)].double().numpy()
            length = np.linalg.norm(cells, axis=1)[:, None]
            unit = projected[level] / (np.linalg.norm(projected[level], axis=1, keepdims=True) if normalize else 1)
            expected = np.einsum("bdhw,ld->blhw", cells, unit) / np.maximum(length, 1e-8)
            np.testing.assert_allclose(seen.similarities[level].numpy(), expected, atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(seen.logits[level].numpy(), 5 * expected.mean((2, 3)), atol=1e-3, rtol=1e-4)
        if normalize:
            assert all(float(each.abs().max()) <= 1 + 1e-5 for each in seen.similarities)

    def test_the_factor_is_trained_where_it_is_asked_for(self):
        for learned in (True, False):
            method = pbip(learned_scale=learned)
            grown = gradients(method, method.losses(batch_of())["classification"])
            assert ("network.scales" in grown) == learned


class TestFusion:
    def fused(self, method, images, weights, merge):
        """Min-max of the positive part per level, image and class; then the weighted mean on the finest cells."""
        seen, total, finest = method.see(images), 0, None
        height, width = images.shape[-2:]
        for level, (maps, stride) in enumerate(zip(seen.similarities, (8, 16, 32), strict=True)):
            values = maps.double().numpy() * float(method.network.scales[level].detach())
            merged = []
            for number in range(3):
                own = values[:, sum(COUNTS[:number]) : sum(COUNTS[: number + 1])]
                power = np.exp(own) if merge == "softmax" else np.ones_like(own)
                merged.append((power * own).sum(1) / power.sum(1))
            classes = torch.from_numpy(np.stack(merged, 1))
            if (classes.shape[2] * stride, classes.shape[3] * stride) != (height, width):
                size = (classes.shape[2] * stride, classes.shape[3] * stride)
                classes = F.interpolate(classes, size, mode="bilinear", align_corners=False)[..., :height, :width]
            active = np.maximum(classes.numpy(), 0)
            low, high = active.min((2, 3), keepdims=True), active.max((2, 3), keepdims=True)
            scaled = torch.from_numpy((active - low) / np.maximum(high - low, 1e-6))
            finest = finest or scaled.shape[-2:]
            total = total + weights[level] * F.interpolate(scaled, finest, mode="bilinear", align_corners=False)
        return total.numpy()

    @pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (65, 97), (33, 50)])
    @pytest.mark.parametrize("merge", ["mean", "softmax"])
    @pytest.mark.parametrize("weights", [(0.3, 0.3, 0.4), (0.1, 0.2, 0.7)], ids=str)
    def test_against_numpy(self, height, width, merge, weights):
        method, images = pbip(merge=merge, fusion_weights=weights), batch_of(height, width).images
        with torch.no_grad():
            found = method.class_maps(images)
            expected = self.fused(method, images, weights, merge)
        assert found.maps.shape == expected.shape
        np.testing.assert_allclose(found.maps.numpy(), expected, atol=1e-4)
        assert float(found.maps.min()) >= 0
        assert float(found.maps.max()) <= 1 + 1e-6

    def test_released_weights_are_the_default(self):
        assert PBIPConfig().fusion_weights == (0.3, 0.3, 0.4)

    def test_only_the_ratio_of_the_weights_counts(self):
        images = batch_of().images
        with torch.no_grad():
            one, two = (
                pbip(fusion_weights=weights).class_maps(images).maps for weights in [(3, 3, 4), (0.3, 0.3, 0.4)]
            )
        torch.testing.assert_close(one, two)

    @pytest.mark.parametrize("merge", ["mean", "softmax"])
    def test_logits_are_the_means_of_the_coarsest_level_as_trained(self, merge):
        method, images = pbip(merge=merge, scale=LARGE), batch_of().images
        with torch.no_grad():
            scores = method.see(images).logits[-1].double().numpy()
            found = method.class_maps(images).logits
        for number in range(3):
            own = scores[:, sum(COUNTS[:number]) : sum(COUNTS[: number + 1])]
            np.testing.assert_allclose(found[:, number], own.mean(1), atol=1e-4)

    def test_softmax_and_mean_differ(self):
        images = batch_of().images
        with torch.no_grad():
            one, two = (pbip(merge=merge, scale=LARGE).class_maps(images) for merge in ("mean", "softmax"))
        assert not torch.allclose(one.maps[:, 0], two.maps[:, 0], atol=1e-3)
        torch.testing.assert_close(one.maps[:, 1], two.maps[:, 1])  # a single prototype
        torch.testing.assert_close(one.logits, two.logits)

    def test_views_are_scaled_before_they_are_averaged(self):
        views = {"flip": False, "intensities": [0.9, 1.0, 1.1]}
        method, images = pbip(test_time=views), batch_of().images
        with torch.no_grad():
            found = method.augmented(images)
            single = [method.class_maps((images * factor).clamp(0, 1)) for factor in (0.9, 1.0, 1.1)]
        torch.testing.assert_close(found.maps, sum(each.maps for each in single) / 3)
        torch.testing.assert_close(found.logits, sum(each.logits for each in single) / 3)

    @pytest.mark.parametrize("white", [False, True])
    @pytest.mark.parametrize("similarity", ["cosine", "convolution"])
    def test_odd_sizes(self, similarity, white):
        method, batch = pbip(similarity=similarity, white=white), batch_of(65, 97)
        with torch.no_grad():
            for maps in (method.predict(batch.images), method.label_guided(batch)):
                assert maps.shape == (4, 3 + white, 65, 97)
                torch.testing.assert_close(maps.sum(1), torch.ones(4, 65, 97))
        assert all(bool(value.isfinite()) for value in method.losses(batch).values())


class TestGates:
    def test_no_class_outside_the_tags(self):
        method, batch = pbip(), batch_of()
        with torch.no_grad():
            peaks = method.label_guided(batch).amax((2, 3))
        assert torch.equal(peaks > 0, TAGS > 0)

    def test_no_tags_no_map(self):
        tags = torch.stack([TAGS[0], torch.zeros(3)])
        for white in (False, True):
            with torch.no_grad():
                maps = pbip(white=white).label_guided(batch_of(tags=tags))
            assert float(maps[1].abs().max()) == 0
            assert float(maps[0].sum(0).min()) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("threshold", [0.3, 0.5, 0.999])
    def test_prediction_is_gated_by_the_coarsest_level(self, threshold):
        method, images = pbip(presence_threshold=threshold, scale=LARGE), batch_of().images
        with torch.no_grad():
            presence = method.class_maps(images).logits.sigmoid()
            peaks = method.predict(images).amax((2, 3))
        gate = (presence >= threshold) | (presence == presence.amax(1, keepdim=True))
        assert not bool(gate.all())
        assert not torch.equal(gate, presence == presence.amax(1, keepdim=True))
        assert torch.equal(peaks > 0, gate)


class TestExplain:
    @pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97)])
    @pytest.mark.parametrize(("similarity", "channels"), [("cosine", 6), ("convolution", 3)])
    def test_names_and_shapes(self, similarity, channels, height, width):
        method, batch = pbip(similarity=similarity), batch_of(height, width)
        maps = method.explain(batch)
        assert list(maps) == ["class_maps", "level_1", "level_2", "level_3", "prototypes", "presence"]
        sides = {name: tuple(value.shape[1:]) for name, value in maps.items()}
        assert sides["presence"] == (3, 1, 1)
        assert sides["prototypes"][0] == channels
        assert all(value.shape[1] == 3 for name, value in maps.items() if name != "prototypes")
        assert all(not value.requires_grad for value in maps.values())
        if (height, width) == (65, 97):
            assert all(side[1:] == (65, 97) for name, side in sides.items() if name != "presence")
        else:
            assert [sides[f"level_{n}"][1] for n in (1, 2, 3)] == [8, 4, 2]
            assert sides["class_maps"][1] == 8

    def test_what_they_show(self):
        method, batch = pbip(), batch_of()
        maps = method.explain(batch)
        with torch.no_grad():
            seen, read = method.see(batch.images), method.class_maps(batch.images)
        torch.testing.assert_close(maps["class_maps"], read.maps)
        torch.testing.assert_close(maps["presence"][..., 0, 0], read.logits.sigmoid())
        torch.testing.assert_close(maps["prototypes"], seen.similarities[-1])
        assert float(maps["prototypes"].abs().max()) <= 1 + 1e-5
        weights = method.config.fusion_weights
        sides = [F.interpolate(maps[f"level_{n}"], (8, 8), mode="bilinear", align_corners=False) for n in (1, 2, 3)]
        torch.testing.assert_close(sum(w * side for w, side in zip(weights, sides, strict=True)), read.maps)


class TestBankImages:
    def prepared(self, folder):
        torch.manual_seed(0)
        settings = {"encoder": ENCODER, "image_encoder": FROZEN, "bank": {"prototypes_per_class": (1, 2, 1)}}
        settings["bank"]["multi_tag_fallback"] = True
        method = PBIP(PBIPConfig(**settings), fake_labels()).eval()
        method.prepare(fake_data(fake_dataset(fake_labels())), folder)
        return method

    def test_explain_shows_the_images_of_every_sub_class(self, tmp_path):
        method, batch = self.prepared(tmp_path), batch_of()
        strips = method.explain(batch)["bank_images"]
        bank = method.read_bank(tmp_path)
        items = fake_data(fake_dataset(fake_labels())).hints("train", "tags")
        assert strips.shape[:3] == (len(batch.images), 3 * 4, 72)
        for number, part in enumerate(bank.sub_classes):
            image = items.sample(part.items[0]).image  # the nearest stands first
            side = min(image.shape[1:])
            top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
            small = F.interpolate(
                image[None, :, top : top + side, left : left + side],
                (72, 72),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )[0]
            for each in strips:
                shown = each[3 * number : 3 * number + 3, :, :72]
                assert float((shown - small).abs().mean()) < 0.02

    def test_they_stay_out_of_the_model(self, tmp_path):
        method, batch = self.prepared(tmp_path / "bank"), batch_of()
        TissueModel.from_method(method).save(tmp_path / "model")
        assert not any("images" in name for name in load_file(str(tmp_path / "model" / "model.safetensors")))
        assert "bank_images" not in pbip().explain(batch)

    def test_a_lost_picture_is_no_error(self, tmp_path):
        self.prepared(tmp_path)
        (tmp_path / "bank_1.png").unlink()
        assert "bank_images" not in self.prepared(tmp_path).explain(batch_of())


class TestConvolution:
    def test_it_trains_and_predicts(self, monkeypatch):
        method, batch = pbip(similarity="convolution", white=True).train(), batch_of()
        assert len(method.network.projections) == 0
        optimizer = optimizer_of(method, monkeypatch)
        before = {key: value.detach().clone() for key, value in method.network.convolutions.named_parameters()}
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = method.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for key, value in method.network.convolutions.named_parameters():
            assert not torch.equal(value, before[key]), key
        with torch.no_grad():
            assert method.eval().predict(batch.images).shape == (4, 4, 64, 64)

    def test_it_has_no_prototype_to_match(self):
        settings = {"similarity": "convolution", "matching": {"form": "prototype"}}
        with pytest.raises(ValidationError, match=r"convolution has no map of each prototype.*matching.form: class"):
            PBIPConfig(**settings)
        for unused in ({"weight": 0}, {"foreground": 0, "background": 0}):
            PBIPConfig(**{**settings, "matching": {"form": "prototype", **unused}})
        PBIPConfig(similarity="convolution", matching={"form": "class"})


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"level_weights": (1, 1)}, r"level_weights \[1.0, 1.0\] and fusion_weights .*differ in number"),
            ({"fusion_weights": (1, 1, 1, 1)}, "level_weights .* and fusion_weights .*differ in number"),
            ({"level_weights": (), "fusion_weights": ()}, "needs weights of at least 0"),
            ({"level_weights": (1, -1, 1)}, "needs weights of at least 0"),
            ({"fusion_weights": (0, 0, 0)}, "needs weights of at least 0"),
            ({"similarity": "dot"}, "similarity"),
            ({"merge": "max"}, "merge"),
            ({"scale": 0}, "scale"),
            ({"matching": {"form": "pixel"}}, "matching.form"),
            ({"matching": {"threshold": 1.5}}, "matching.threshold"),
            ({"matching": {"temperature": 0}}, "matching.temperature"),
            ({"matching": {"chunk": 0}}, "matching.chunk"),
            ({"matching": {"weight": -1}}, "matching.weight"),
        ],
        ids=str,
    )
    def test_wrong_values(self, settings, words):
        with pytest.raises(ValidationError, match=words):
            PBIPConfig(**settings)

    @pytest.mark.parametrize("weights", [(2.0,), (1.0, 3.0), (0.5, 0.5, 1.0, 2.0), (1.0, 2.0, 3.0, 4.0, 5.0)], ids=str)
    def test_any_number_of_levels(self, weights):
        method, batch = (
            pbip(level_weights=weights, fusion_weights=weights, scale=LARGE, matching={"weight": 0}),
            batch_of(),
        )
        assert method.network.levels == len(weights)
        expected = TestClassification().by_hand(method, batch, weights)
        assert method.losses(batch)["classification"].item() == pytest.approx(expected, rel=1e-4)

    def test_more_levels_than_the_encoder_has(self):
        """The coarsest weights go to the coarsest levels, the rest to none."""
        many = (9.0, 8.0, 0.1, 0.2, 0.3, 0.4, 0.5)
        batch = batch_of()
        for settings in ({}, {"similarity": "convolution"}):
            given = {**settings, "matching": {"weight": 0}}
            method = pbip(level_weights=many, fusion_weights=many, **given)
            fitting = pbip(level_weights=many[2:], fusion_weights=many[2:], **given)
            assert method.network.levels == 5
            assert method.losses(batch)["classification"].item() == fitting.losses(batch)["classification"].item()
            with torch.no_grad():
                assert torch.equal(method.class_maps(batch.images).maps, fitting.class_maps(batch.images).maps)
            assert "level_5" in method.explain(batch)

    @pytest.mark.parametrize("key", ["level_weights", "fusion_weights"])
    def test_weights_that_all_go_to_levels_that_are_not_there(self, key):
        ones = (1.0,) * 7
        weights = {"level_weights": ones, "fusion_weights": ones, key: (1.0, 1.0, 0, 0, 0, 0, 0)}
        with pytest.raises(InputError, match=rf"{key} \[1.0, 1.0, 0.0.*test_resnet.* has 5;"):
            pbip(matching={"weight": 0}, **weights)

    def test_a_pyramid_of_a_transformer(self):
        method = pbip(encoder={"name": "hf:mit_b0", "output_stride": 16})
        assert method.network.encoder.strides[-3:] == (8, 16, 16)
        terms = method.losses(batch_of())
        assert terms.keys() == {"classification", "foreground", "background"}
        with torch.no_grad():
            assert method.predict(batch_of(65, 97).images).shape == (4, 3, 65, 97)

    def test_papers_network(self):
        config = PBIPConfig()
        assert (config.encoder.name, config.encoder.output_stride) == ("hf:mit_b1", 16)
        assert config.bank.prototypes_per_class == 3
        assert config.bank.images_per_prototype == 100
        matching = config.matching
        assert (matching.weight, matching.foreground, matching.background) == (0.5, 1.0, 0.5)
        assert (matching.threshold, matching.temperature, matching.form) == (0.15, 1.0, "class")
