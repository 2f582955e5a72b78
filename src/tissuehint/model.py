"""TissueModel: what a user keeps and deploys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tissuehint.data.patches import PatchGrid, sliding_map
from tissuehint.data.records import read_image
from tissuehint.data.training_sets import to_tensor
from tissuehint.errors import InputError
from tissuehint.files import atomic_path, write_json
from tissuehint.labels import LabelSpace

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"
FORMAT = 1


class TissueModel:
    """A trained network with everything that is needed to use it: classes, pixel size, normalisation, windows.

    Args:
        network: a module whose state is saved.
        mapper: from images (B,3,H,W) in [0,1] to tissue maps (B,K,H,W); normalisation happens inside.
        labels: meaning of the K channels.
        architecture: how to build ``network`` again: ``{"kind": "network", "config": ...}`` or
            ``{"kind": "method", "name": ..., "config": ...}``.
        grid: windows at inference; None gives whole images to the network.
        um_per_px: pixel size in micrometres that the model was trained at; None where unknown.
        notes: where it comes from (data set, run, scores).

    Example:
        ``TissueModel.load("runs/demo/model").predict("image.png")`` gives the tissue map of a file.
    """

    def __init__(
        self,
        network: nn.Module,
        mapper: Callable[[Tensor], Tensor],
        labels: LabelSpace,
        architecture: dict[str, Any],
        *,
        grid: PatchGrid | None = None,
        um_per_px: float | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.mapper = mapper
        self.labels = labels
        self.architecture = architecture
        self.grid = grid
        self.um_per_px = um_per_px
        self.notes = notes or {}

    @classmethod
    def from_network(cls, network: nn.Module, labels: LabelSpace, config: Any, **others: Any) -> TissueModel:
        """A segmentation network (``nn.networks``): logits in, softmax out."""
        architecture = {"kind": "network", "config": config.model_dump(mode="json")}
        return cls(network, lambda images: network(images).float().softmax(1), labels, architecture, **others)

    @classmethod
    def from_method(cls, method: Any, **others: Any) -> TissueModel:
        """A weak method (``methods.base.WeakMethod``) with its own ``predict``."""
        config = method.config.model_dump(mode="json")
        architecture = {"kind": "method", "name": method.config.name, "config": config}
        return cls(method, method.predict, method.labels, architecture, **others)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> TissueModel:
        """Move the weights; returns itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def predict(self, image: Path | str | NDArray[np.uint8] | Tensor, *, batch_size: int = 8) -> Tensor:
        """Tissue map of an image of any size, at its size.

        Args:
            image: a file; or (H,W,3) uint8 RGB; or (3,H,W) or (B,3,H,W) float in [0,1]. At the model's ``um_per_px``.
            batch_size: windows that go through the network at a time.

        Returns:
            (K,H,W) float32 class probabilities on the CPU that sum to 1 at each pixel, (B,K,H,W) for a batch;
            K = ``labels.num_classes``.

        Raises:
            InputError: an unreadable file, another shape, dtype or range.
        """
        images = _as_images(image)
        self.network.eval()
        maps = [self._one(single, batch_size) for single in (images if images.ndim == 4 else images[None])]
        return torch.stack(maps) if images.ndim == 4 else maps[0]

    def classes(self, tissue_map: Tensor) -> NDArray[np.uint8]:
        """(K,H,W) probabilities to the (H,W) uint8 index of the likeliest class."""
        return np.asarray(tissue_map.argmax(0).to(torch.uint8).cpu().numpy())

    def _one(self, image: Tensor, batch_size: int) -> Tensor:
        device = self.device

        def mapper(windows: Tensor, corners: list[tuple[int, int]]) -> Tensor:
            return self.mapper(windows.to(device))

        return sliding_map(mapper, image, self.grid, batch_size=batch_size).cpu()

    def save(self, folder: Path | str) -> Path:
        """Write ``model.safetensors`` and ``model.json``; weights first, so that a card never stands without them."""
        from safetensors.torch import save_file

        folder = Path(folder)
        state = {key: value.detach().cpu().contiguous().clone() for key, value in self.network.state_dict().items()}
        with atomic_path(folder / WEIGHTS_FILE) as part:
            save_file(state, str(part))
        card = {
            "format": FORMAT,
            "labels": self.labels.to_dict(),
            "architecture": self.architecture,
            "grid": None if self.grid is None else self.grid.model_dump(mode="json"),
            "um_per_px": self.um_per_px,
            "notes": self.notes,
        }
        write_json(folder / CARD_FILE, card)
        return folder

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> TissueModel:
        """Read a model that ``save`` (or a run) wrote.

        Args:
            folder: the ``model`` folder of a run, or the run directory itself.
            device: where to put the weights.

        Raises:
            InputError: missing or damaged files, a card of a newer format, weights of another architecture.
        """
        folder = model_folder(Path(folder))
        card = _read_card(folder / CARD_FILE)
        try:
            labels = LabelSpace.from_dict(card["labels"])
            others = {
                "grid": None if card["grid"] is None else PatchGrid(**card["grid"]),
                "um_per_px": card["um_per_px"],
                "notes": card["notes"],
            }
            model = _build(cls, card["architecture"], labels, others)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise InputError(folder / CARD_FILE, f"is damaged ({reason})", "copy the model again") from error
        _load_weights(model.network, folder / WEIGHTS_FILE)
        model.network.eval()
        return model.to(device)


def _build(
    cls: type[TissueModel], architecture: dict[str, Any], labels: LabelSpace, others: dict[str, Any]
) -> TissueModel:
    """The network with random weights; weight paths of the recipe are not followed, the state comes from the file."""
    config = _without_weights(architecture["config"])
    if architecture["kind"] == "network":
        from tissuehint.nn.networks import NetworkConfig, build_network

        network_config = NetworkConfig(**config)
        return cls.from_network(build_network(network_config, labels.num_classes), labels, network_config, **others)
    if architecture["kind"] != "method":
        raise ValueError(f"architecture of kind {architecture['kind']!r}")
    from tissuehint.plugins import load_method

    method_class = load_method(architecture["name"])
    method = method_class(method_class.Config(**config), labels)
    return cls.from_method(method, **others)


def _without_weights(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_weights(value) if isinstance(value, dict) else ("none" if key == "weights" else value)
        for key, value in config.items()
    }


def model_folder(folder: Path) -> Path:
    """The folder that holds a model: ``folder`` itself, or ``folder/model`` of a run directory.

    Raises:
        InputError: neither.
    """
    for candidate in (folder, folder / "model"):
        if (candidate / CARD_FILE).is_file():
            return candidate
    raise InputError(folder, f"holds no {CARD_FILE}", "give the model folder of a finished run")


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"format", "labels", "architecture", "grid", "um_per_px", "notes"} - card.keys()
    except (ValueError, AttributeError) as error:
        raise InputError(path, f"is damaged ({error})", "copy the model again") from None
    if missing:
        raise InputError(path, f"lacks {', '.join(sorted(missing))}", "copy the model again")
    if not isinstance(card["format"], int):
        raise InputError(path, f"has format {card['format']!r}, which is no number", "copy the model again")
    if card["format"] > FORMAT:
        raise InputError(path, f"has format {card['format']}, this version reads {FORMAT}", "update tissuehint")
    return card


def _load_weights(network: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network.load_state_dict(load_file(str(path)))
    except FileNotFoundError:
        raise InputError(path, "does not exist", "copy the whole model folder") from None
    except (SafetensorError, OSError) as error:
        raise InputError(path, f"is damaged ({' '.join(str(error).split())[:100]})", "copy the model again") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            path, f"does not fit the architecture in {CARD_FILE} ({reason})", "copy the model again"
        ) from None


def _as_images(image: Path | str | NDArray[np.uint8] | Tensor) -> Tensor:
    if isinstance(image, Path | str):
        return to_tensor(read_image(Path(image)))
    if 0 in image.shape:
        raise InputError(f"image of shape {tuple(image.shape)}", "has no pixels", "give an image")
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            rule = "is no (H, W, 3) uint8 picture"
            raise InputError(f"array of shape {image.shape} and type {image.dtype}", rule, "give RGB in 0..255")
        return to_tensor(image)
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or not image.is_floating_point():
        rule = "is no (3, H, W) or (B, 3, H, W) float image"
        raise InputError(f"tensor of shape {tuple(image.shape)} and type {image.dtype}", rule, "give RGB in [0, 1]")
    if not (float(image.min()) >= 0 and float(image.max()) <= 1):  # refuses NaN too
        rule = f"has values {float(image.min()):.3g} to {float(image.max()):.3g}"
        raise InputError("image tensor", rule, "give RGB in [0, 1], not normalised")
    return image.float()
