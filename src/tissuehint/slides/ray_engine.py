"""Cohorts on a Ray cluster: the same job per slide, the same state files, in actors that hold the model.

Slides, model and results lie where every node sees them (a shared file system). An actor that dies is started again
and given its slide again, which goes on with the blocks that were not done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tissuehint.errors import InputError
from tissuehint.slides.cohort import LocalEngine, Outcome
from tissuehint.slides.predict import SlideConfig, SlideJob

#: How often a slide is given to an actor anew after one died with it.
RETRIES = 2


class RayEngine:
    """Actors of an existing Ray cluster.

    Args:
        model: its folder, on the shared file system.
        model_facts: which one.
        config: of all slides.
        address: of the cluster, such as ``auto`` or ``ray://head:10001``; None takes the one of ``ray start``.
        actors: how many at a time; None takes one a GPU of the cluster, or one a node without GPUs.
        gpus: of an actor; None takes 1 where the cluster has any.
        cpus: of an actor.
        batch_size: windows at a time; None takes what fits their size.
        readers: threads that read ahead, for each actor.
    """

    def __init__(
        self,
        model: Path,
        model_facts: dict[str, Any],
        config: SlideConfig,
        *,
        address: str | None = None,
        actors: int | None = None,
        gpus: float | None = None,
        cpus: float = 1,
        batch_size: int | None = None,
        readers: int | None = None,
    ) -> None:
        self.ray = _ray()
        self._connect(address)
        has_gpus = self.ray.cluster_resources().get("GPU", 0)
        self.gpus = (1.0 if has_gpus else 0.0) if gpus is None else gpus
        nodes = sum(node["Alive"] for node in self.ray.nodes())
        self.actors = actors or max(1, int(has_gpus / self.gpus) if self.gpus else nodes)
        self.cpus = cpus
        self.arguments = (str(model.resolve()), model_facts, config, batch_size, readers, self.gpus > 0)

    def __call__(self, jobs: Sequence[SlideJob]) -> Iterator[Outcome]:
        """Outcomes as they come; a slide whose actor died ``RETRIES`` times over is one without result.

        An actor that cannot start (a node without the model's folder, say) gives its slide back and is not used again;
        where none is left, the slides that remain are without result.
        """
        ray = self.ray
        kind = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=-1, max_task_retries=RETRIES)(SlideActor)
        free = [kind.remote(*self.arguments) for _ in range(min(self.actors, max(len(jobs), 1)))]
        todo, running = [_absolute(job) for job in jobs], dict[Any, tuple[Any, SlideJob]]()
        while todo or running:
            while todo and free:
                actor, job = free.pop(0), todo.pop(0)
                running[actor.one.remote(job)] = (actor, job)
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, job = running.pop(ready)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:
                reason = _reason(error)
                if getattr(error, "actor_init_failed", False):
                    todo.insert(0, job)
                    if not free and not running:
                        yield from (Outcome(job, None, f"{job.path}: no worker can start ({reason})") for job in todo)
                        return
                    continue
                yield Outcome(job, None, f"{job.path}: its worker died again and again ({reason})")
            free.append(actor)

    def _connect(self, address: str | None) -> None:
        ray = self.ray
        if ray.is_initialized():
            return
        try:
            ray.init(address=address or "auto", log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"--address {address or 'auto'}", f"is no Ray cluster ({reason})", "start one with: ray start --head"
            ) from None


class SlideActor:
    """Holds the model on a worker and predicts slides, one at a time."""

    def __init__(
        self,
        model: str,
        model_facts: dict[str, Any],
        config: SlideConfig,
        batch_size: int | None,
        readers: int | None,
        on_gpu: bool,
    ) -> None:
        from tissuehint.model import TissueModel

        loaded = TissueModel.load(model, device="cuda" if on_gpu else "cpu")
        self.engine = LocalEngine(loaded, model_facts, config, batch_size=batch_size, readers=readers)

    def one(self, job: SlideJob) -> Outcome:
        """A slide."""
        return self.engine.one(job)


def _reason(error: Exception) -> str:
    """The last line of a remote traceback, where the cause stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def _absolute(job: SlideJob) -> SlideJob:
    """Workers stand in other folders."""
    outline = None if job.outline is None else job.outline.absolute()
    return replace(job, path=job.path.absolute(), folder=job.folder.absolute(), outline=outline)


def _ray() -> Any:
    # started by `uv run`, Ray would send this folder to the workers and start them with the same command line
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--engine ray", "needs Ray", "install it with: pip install 'tissuehint[ray]'") from None
    return ray
