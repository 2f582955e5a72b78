"""Where weights start from when a recipe says ``start_from``: the stages of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.pipeline.directory import RunDirectory
from tissuehint.pipeline.training import WEIGHTS, load_weights

_LEFT_OUT = {
    "stage1": "give a run of the same method",
    "stage2": "set stage2: null, or run the source with stage2",
    "ceiling": "set ceiling: false, or run the source with ceiling",
}

Shapes = dict[str, tuple[int, ...]]


class SourceRun:
    """A finished run whose weights another one starts from.

    Args:
        name: its directory, as the recipe says it.
        labels: classes of the run that starts.

    Raises:
        InputError: no such directory, no finished run, a cross-validation, other classes.
    """

    def __init__(self, name: str, labels: LabelSpace) -> None:
        self.name = name
        self.run = RunDirectory(source_folder(name))
        if not self.run.path.is_dir():
            raise self._refused("is no directory", "give the directory of a finished run, such as runs/NAME")
        scores = self._scores()
        if "cross_validation" in scores:
            fix = f"give the run of one fold, such as {Path(name) / 'fold_0'}"
            raise self._refused("is a cross-validation, which has weights in each fold and none for all", fix)
        try:
            names = tuple(scores["labels"]["names"])
        except (KeyError, TypeError) as error:
            raise self._damaged(error) from None
        if names != labels.names:
            rule = f"is a run on the classes {', '.join(map(str, names))}; here they are {', '.join(labels.names)}"
            raise self._refused(rule, "give a run on the same classes in the same order")

    def into(self, module: L.LightningModule, stage: str) -> None:
        """Put the weights of a stage into a module of the same architecture; nothing random is drawn.

        Args:
            module: just built.
            stage: ``stage1``, ``stage2`` or ``ceiling``.

        Raises:
            InputError: the stage is not finished, or other names or shapes of tensors; ``module`` is as it was then.
        """
        path = self.run.path / stage / WEIGHTS
        if not self.run.is_done(path.parent) or not path.is_file():
            raise self._refused(f"has no finished {stage}", _LEFT_OUT[stage])
        difference = _difference(self._shapes(path), {name: tuple(v.shape) for name, v in module.state_dict().items()})
        if difference:
            rule = f"does not fit: {stage} there {difference}"
            raise self._refused(rule, "use the method and networks of that run, see its recipe.yaml")
        load_weights(module, path)

    def _scores(self) -> dict[str, Any]:
        try:
            scores = json.loads(self.run.scores.read_text(encoding="utf-8"))
        except FileNotFoundError:
            fix = "give the directory of a run, and finish that run first"
            raise self._refused("holds no finished run (no scores.json)", fix) from None
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        return scores if isinstance(scores, dict) else {}

    def _shapes(self, path: Path) -> Shapes:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            rule = f"has a damaged {path.relative_to(self.run.path)} ({reason})"
            raise self._refused(rule, "delete that folder and run its recipe again") from None

    def _damaged(self, error: Exception) -> InputError:
        rule = f"has a damaged scores.json ({type(error).__name__}: {error})"
        return self._refused(rule, "run its recipe again, the scores are made anew")

    def _refused(self, rule: str, fix: str) -> InputError:
        return InputError(f"recipe key start_from = {self.name}", rule, fix)


def source_folder(name: str) -> Path:
    """The directory that ``start_from`` names; its variables are expanded already."""
    return Path(name).expanduser()


def _difference(there: Shapes, here: Shapes) -> str:
    """In which tensors two states differ; empty where they don't."""
    lacking, more = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    if lacking or more:
        told = [
            f"{verb} {len(names)} tensors{extra}, such as {names[0]}"
            for verb, names, extra in (("lacks", lacking, ""), ("has", more, " more"))
            if names
        ]
        return " and ".join(told)
    other = next((name for name in sorted(here) if there[name] != here[name]), None)
    return "" if other is None else f"has {other} as {list(there[other])}, here it is {list(here[other])}"
