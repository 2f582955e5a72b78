"""``tissuehint doctor``: is everything here that is needed, and what to do where it is not."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

State = Literal["ok", "warning", "problem"]

PACKAGES = ("torch", "torchvision", "lightning", "timm", "segmentation-models-pytorch", "transformers", "numpy")
HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
GIGABYTE = 1e9
LITTLE_MEMORY, LITTLE_DISK, NO_DISK, LITTLE_SHARED = 4.0, 5.0, 0.5, 0.5
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: what.
        state: ``ok``; ``warning``: something will not work or be slow; ``problem``: nothing will work.
        found: what was found.
        fix: what to do; empty where all is well.
    """

    name: str
    state: State
    found: str
    fix: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Check what is installed and reachable.

    Versions, devices, memory, disk, slide libraries, weights, data sets; each with its fix. Exit code 2 if there is a
    problem, 0 where there are only warnings.
    """
    from tissuehint.cli.output import say

    findings = examine()
    if as_json:
        import json

        say(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(2)


def examine() -> list[Finding]:
    """All findings; a check that breaks is a finding too."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions, _devices, _memory, _disk, _shared_memory, _slides, _hub, _data,
    )  # fmt: skip
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # the doctor must speak whatever is broken
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(Finding(name, "warning", f"could not be checked ({_first_line(error)})", "report this"))
    return findings


def _print(findings: list[Finding]) -> None:
    from tissuehint.cli.output import say, table

    table(
        "", ["state", "what", "found", "fix"], [[one.state, one.name, one.found, one.fix] for one in findings], wrap=2
    )
    counts = {state: sum(one.state == state for one in findings) for state in ("problem", "warning")}
    say(f"problems: {counts['problem']}, warnings: {counts['warning']}")


def _versions() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from tissuehint import __version__

    yield Finding("tissuehint", "ok", __version__)
    python = platform.python_version()
    old = tuple(int(part) for part in python.split(".")[:2]) < (3, 11)
    fix = "use Python 3.11 or newer" if old else ""
    yield Finding("python", "problem" if old else "ok", f"{python} on {platform.system()} {platform.machine()}", fix)
    for name in PACKAGES:
        try:
            found = version(name)
            importlib.import_module(name.replace("-", "_"))
        except PackageNotFoundError:
            yield Finding(name, "problem", "not installed", f"install it: pip install {name}")
        except Exception as error:
            yield Finding(name, "problem", f"cannot be imported ({_first_line(error)})", f"reinstall {name}")
        else:
            yield Finding(name, "ok", found)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("processor", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            found = f"{facts.name}, {facts.total_memory / GIGABYTE:.0f} GB, CUDA {torch.version.cuda}"
            try:
                torch.zeros(8, device=f"cuda:{index}").sum().item()
            except Exception as error:
                fix = "install a torch build for this GPU and driver, or use trainer.accelerator=cpu"
                yield Finding(f"cuda:{index}", "problem", f"{found}, does not compute ({_first_line(error)})", fix)
            else:
                yield Finding(f"cuda:{index}", "ok", found)
    elif shutil.which("nvidia-smi"):
        fix = "install the CUDA build of torch that fits the driver (nvidia-smi)"
        yield Finding("cuda", "warning", f"a GPU driver, but torch {torch.__version__} sees no GPU", fix)
    else:
        yield Finding("cuda", "ok", "no GPU; everything runs on the processor")
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple GPU")


def _memory() -> Iterator[Finding]:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIGABYTE
    except (AttributeError, ValueError, OSError):  # Windows
        yield Finding("memory", "ok", "unknown on this system")
        return
    limit = _container_limit()
    total = total if limit is None else min(total, limit)
    little = total < LITTLE_MEMORY
    fix = "use -o data.cache_mb=0, -o data.workers=0 and small batches" if little else ""
    yield Finding("memory", "warning" if little else "ok", f"{total:.1f} GB", fix)


def _container_limit() -> float | None:
    """Gigabytes that a container may use; None without a limit."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text()) / GIGABYTE
    except (OSError, ValueError):
        return None


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / GIGABYTE
    state: State = "problem" if free < NO_DISK else "warning" if free < LITTLE_DISK else "ok"
    fix = "" if state == "ok" else "free space, or write runs elsewhere: --out FOLDER"
    yield Finding("disk", state, f"{free:.1f} GB free in {Path.cwd()}", fix)


def _shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if folder.is_dir():
        size = shutil.disk_usage(folder).total / GIGABYTE
        little = size < LITTLE_SHARED
        fix = "give the container more (--shm-size=2g), or use -o data.workers=0" if little else ""
        yield Finding("shared memory", "warning" if little else "ok", f"{size:.2f} GB for data-loading processes", fix)


def _slides() -> Iterator[Finding]:
    broken = []
    for name, package in (("openslide", "openslide-python openslide-bin"), ("tiffslide", "tiffslide")):
        try:
            module = importlib.import_module(name)
        except Exception as error:
            broken.append((name, package, _first_line(error)))
            continue
        library = vars(module).get("__library_version__")
        found = str(getattr(module, "__version__", "version unknown"))
        yield Finding(name, "ok", f"{found}, library {library}" if library else found)
    state: State = "problem" if len(broken) == 2 else "warning"
    for name, package, reason in broken:
        yield Finding(name, state, f"cannot be imported ({reason})", f"pip install {package}")


def _hub() -> Iterator[Finding]:
    fix = "give weights as a path to a file, or weights: none"
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_true(os.environ.get(name, ""))]
    if offline:
        yield Finding("weights hub", "ok", f"offline, {offline[0]} is set", f"{fix}; unset it to download")
        return
    address = os.environ.get("HF_ENDPOINT", HUB)
    reason = _unreachable(address)
    if reason is None:
        yield Finding("weights hub", "ok", f"{address} answers")
    else:
        yield Finding("weights hub", "warning", f"{address} does not answer ({reason})", f"{fix}; check the network")


def _unreachable(address: str) -> str | None:
    """Why an address does not answer in time, None where it does; looking up the name counts into the time."""
    import threading
    import urllib.error
    import urllib.request

    answers: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "tissuehint"})
            with urllib.request.urlopen(request, timeout=HUB_SECONDS):
                answers.append(None)
        except urllib.error.HTTPError as error:
            answers.append(None if error.code < 500 else f"HTTP {error.code}")
        except Exception as error:
            answers.append(_first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers[0] if answers else f"no answer within {HUB_SECONDS:g} s"


def _data() -> Iterator[Finding]:
    from tissuehint.data import catalog

    variable = "TISSUEHINT_DATA"
    value = os.environ.get(variable, "")
    if not value:
        fix = f"set {variable} to the folder that holds them, or give data.root in every recipe"
        yield Finding("data sets", "warning", f"{variable} is not set", fix)
        return
    base = Path(value).expanduser()
    if not base.is_dir():
        yield Finding("data sets", "problem", f"{variable}={value} is no folder", f"correct or unset {variable}")
        return
    names = [name for name in catalog.names() if any((base / form).is_dir() for form in (name, name.replace("_", "-")))]
    fix = "" if names else "put data sets there, each in a folder of its name (tissuehint data list)"
    yield Finding("data sets", "ok" if names else "warning", f"{', '.join(names) or 'none'} in {base}", fix)
    weights = sorted(path.name for path in (base / "weights").glob("*") if path.suffix in WEIGHT_SUFFIXES)
    if weights:
        yield Finding("weights", "ok", f"{', '.join(weights)} in {base / 'weights'}")


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
