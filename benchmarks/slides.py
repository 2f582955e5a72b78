"""Whole slides: throughput against the bare network on the same tiles in memory, and peak memory at two sizes.

    uv run tissuehint run cam/phantom --out runs/unet-phantom -o stage2.network.architecture=unet -o stage2.crop=null \
        -o stage2.network.encoder.name=mobilenetv2_100 \
        -o "stage2.network.decoder.decoder_channels=[256,128,64,32,16]" -o stage2.steps=200
    OMP_NUM_THREADS=2 uv run python benchmarks/slides.py --side 20000 40000 --model runs/unet-phantom
    OMP_NUM_THREADS=2 uv run python benchmarks/slides.py --side 20000 --mpp 1.0 --model runs/cam-phantom

Without ``--model`` weights are random, and so is the class map: noise, whose polygons take far longer than those of
tissue.
Each size runs in a process of its own. The network alone is measured in turn with the slide, and its time is taken off.
Peak memory is that of the process while a slide is predicted, less what it had with the model loaded and one batch
computed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TILES, TURNS = 16, 12  # the network alone: so many tiles, so many times while a slide is mapped

NETWORKS = {
    "unet": {"architecture": "unet", "encoder": {"name": "mobilenetv2_100"}},
    "tiny": {"architecture": "unet", "scale": 0.25, "encoder": {"name": "mobilenetv3_small_050"}},
}


def resident() -> float:
    """Memory of this process now, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """Largest memory since ``reset_peak``, MB."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1e3


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(
    slide: Path, side: int, mpp: float, kind: str, trained: Path | None, batch_size: int | None, soft: bool
) -> dict[str, float]:
    import numpy as np
    import torch

    from tissuehint.data.phantom import PHANTOM_LABELS
    from tissuehint.model import TissueModel
    from tissuehint.nn.networks import NetworkConfig, build_network
    from tissuehint.slides.mapping import MappingConfig, plan_map
    from tissuehint.slides.predict import SlideConfig, SlideJob, predict_slide
    from tissuehint.slides.reader import open_slide
    from tissuehint.slides.tissue import find_tissue

    torch.manual_seed(0)
    config = NetworkConfig(**NETWORKS[kind])
    labels = PHANTOM_LABELS
    model = TissueModel.from_network(build_network(config, labels.num_classes).eval(), labels, config)
    if trained is not None:
        model = TissueModel.load(trained)
    settings = SlideConfig(mapping=MappingConfig(probabilities=soft, um_per_px=mpp))
    with open_slide(slide) as opened:
        plan = plan_map(model, opened, find_tissue(opened, settings.tissue), settings.mapping)
        window = plan.tiling.side
        batch_size = batch_size or plan.seen.batch_size(model.device)
        wanted = np.argwhere(plan.wanted)
        wanted = wanted[np.linspace(0, len(wanted) - 1, max(TILES, batch_size)).astype(int)]
        tiles = []
        for row, column in wanted:
            box = plan.placement.box(row * plan.tiling.stride, column * plan.tiling.stride, window, window)
            tiles.append(opened.read(box, plan.placement.um_per_px))
    images = torch.from_numpy(np.stack(tiles)).movedim(-1, 1).float() / 255

    def bare() -> float:
        """Seconds of the network alone over the tiles in memory."""
        started = time.perf_counter()
        with torch.no_grad():
            for start in range(0, len(images), batch_size):
                model.mapper(images[start : start + batch_size])
        return time.perf_counter() - started

    # in turn with the slide, so that both see the same of what else the machine does; readers wait meanwhile
    alone: list[float] = []

    def in_turn(done: int, total: int) -> None:
        if len(alone) < TURNS and done * (TURNS + 1) >= total * (len(alone) + 1):
            alone.append(bare())

    bare()
    reset_peak()
    loaded = resident()
    with tempfile.TemporaryDirectory(dir=slide.parent) as folder:
        started = time.perf_counter()
        facts = {"sha256": "benchmark"}
        job = SlideJob(slide, Path(folder) / "map")
        state = predict_slide(model, facts, job, settings, batch_size=batch_size, progress=in_turn)
        seconds = time.perf_counter() - started - sum(alone)
        written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6
    most = peak()
    network = plan.windows * sum(alone) / (len(alone) * len(images))
    return {
        "side": side,
        "windows": plan.windows,
        "mpx": plan.windows * plan.tiling.stride**2 / 1e6,
        "seconds": round(seconds, 1),
        "bare network, seconds": round(network, 1),
        "throughput by bare network": round(network / seconds, 3),
        "peak above the loaded model, MB": round(most - loaded),
        "tissue, mm2": round(state.tissue_mm2 or 0, 1),
        "results, MB": round(written, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs="+", default=[20000])
    parser.add_argument("--mpp", type=float, default=0.5, help="um per px at which the model sees the slide")
    parser.add_argument("--slide-mpp", type=float, default=0.5, help="um per px of the slide")
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument("--model", type=Path, help="a run on the phantom, such as that of tissuehint demo")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--soft", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_slides"), help="where the slides are kept")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.measure:
        (side,) = words.side
        path = words.folder / f"phantom_{side}_{words.slide_mpp}um.svs"
        print(json.dumps(measure(path, side, words.mpp, words.network, words.model, words.batch_size, words.soft)))
        return
    from tissuehint.data.phantom_slide import write_phantom_slide

    words.folder.mkdir(parents=True, exist_ok=True)
    for side in words.side:
        path = words.folder / f"phantom_{side}_{words.slide_mpp}um.svs"
        if not path.is_file():
            started = time.perf_counter()
            write_phantom_slide(path, side, side, seed=0, um_per_px=words.slide_mpp)
            print(f"{path}: written in {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1e6:.0f} MB")
        line = [
            sys.executable,
            __file__,
            "--measure",
            "--side",
            str(side),
            "--mpp",
            str(words.mpp),
            "--slide-mpp",
            str(words.slide_mpp),
        ]
        line += ["--network", words.network, "--folder", str(words.folder)]
        line += ["--soft"] if words.soft else []
        line += ["--batch-size", str(words.batch_size)] if words.batch_size else []
        line += ["--model", str(words.model)] if words.model else []
        found = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        for name, value in found.items():
            print(f"{name:34} {value}")
        print(flush=True)


if __name__ == "__main__":
    main()
