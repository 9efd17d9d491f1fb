"""Merging a model of 100 million parameters from disk to disk: time, and memory beyond this process's own.

Claim: memory does not grow with the model; it stays far below the size of one.

A state_dict of float32 tensors in shards (8 layers of 3536 × 3536), a base, two models and their curvatures. In a
process of its own, peak resident memory is that of the kernel's count (VmHWM), less what it was after the imports.
"In memory" loads all state dicts and adds up their sites.

    OMP_NUM_THREADS=1 python benchmarks/merge_size.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peers import SMOKE, table
from safetensors.torch import load_file, save_file

from dualgp import WeightLayout, WeightPosterior
from dualgp.transfer import fine_tuned, merge, merge_shards

LAYERS, WIDTH = (2, 64) if SMOKE else (8, 3536)
NAMES = ["base", "a", "b", "curvature-a", "curvature-b"]


def write(folder: Path, seed: int, positive: bool) -> None:
    folder.mkdir()
    generator, index = torch.Generator().manual_seed(seed), {}
    for i in range(LAYERS):
        weight = torch.randn(WIDTH, WIDTH, generator=generator)
        name, file = f"layers.{i}.weight", f"model-{i:05d}.safetensors"
        save_file({name: weight.square() if positive else weight}, folder / file)
        index[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def resident(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def measure(how: str, folder: Path) -> None:
    before, start, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    paths = {name: folder / name for name in NAMES}
    if how == "shards":
        merge_shards(
            paths["base"], [paths["a"], paths["b"]], folder / "merged",
            curvatures=[paths["curvature-a"], paths["curvature-b"]],
        )  # fmt: skip
    else:
        held = {name: state(path) for name, path in paths.items()}
        layout = WeightLayout({name: t.shape for name, t in held["base"].items()})
        base = WeightPosterior(layout, prior_mean=layout.join(held["base"]), prior_precision=1.0)
        models = [fine_tuned(base, layout.join(held[n]), layout.join(held[f"curvature-{n}"])) for n in "ab"]
        merged = merge(models).mean
        if (folder / "merged").exists():
            print(f"# largest difference {float((merged - layout.join(state(folder / 'merged'))).abs().max()):.2g}")
    seconds = time.perf_counter() - start
    print(json.dumps([how, resident("VmHWM") - before, seconds, time.process_time() - cpu]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for i, kind in enumerate(NAMES):
            write(Path(name) / kind, i, kind.startswith("curvature"))
        size = LAYERS * WIDTH**2 * 4 / 2**20
        for how in ("shards", "in memory"):
            found = subprocess.run(
                [sys.executable, __file__, "--measure", how, name], capture_output=True, text=True, check=True
            ).stdout.splitlines()
            print("\n".join(found[:-1]))
            _, peak, wall, cpu = json.loads(found[-1])
            rows.append([how, f"{peak:.0f}", f"{peak / size:.2f}", f"{wall:.1f}", f"{cpu:.1f}"])
    title = f"two models of {LAYERS * WIDTH**2 / 1e6:.0f} M parameters ({size:.0f} MiB each); torch {torch.__version__}"
    table(title, ["way", "peak MiB", "of one model", "wall s", "CPU s"], rows)


if __name__ == "__main__":
    main()
