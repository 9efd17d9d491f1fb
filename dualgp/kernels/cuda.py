"""A folder in which KeOps finds CUDA: pip's CUDA has libnvrtc.so.13 and no libnvrtc.so, and headers in two places."""

from __future__ import annotations

import glob
import os
import re
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

_LIBRARIES = ("libcuda.so", "libnvrtc.so", "libcudart.so")
_HEADERS = ("cuda.h", "nvrtc.h")
_PLACES = (
    "/usr/local/cuda/lib64",
    "/usr/local/cuda*/lib64",
    "/usr/local/cuda*/targets/*/lib",
    "/usr/local/nvidia/lib*",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
)


class Shim(NamedTuple):
    """A folder of links, the environment that points to it, and what was not found."""

    folder: Path
    environment: dict[str, str]
    missing: list[str]

    @property
    def command(self) -> str:
        """The environment, as it is written before a command."""
        return " ".join(f"{name}={value}" for name, value in self.environment.items())


def cuda_shim(folder: str | os.PathLike[str] | None = None, roots: list[str] | None = None) -> Shim:
    """Return a folder of links to CUDA's libraries under their plain names and to its headers, made if need be.

    KeOps looks for libcuda, libnvrtc and libcudart by `ctypes.util.find_library`, links with -lcuda and -lnvrtc, takes
    cuda.h and nvrtc.h from one folder and libnvrtc-builtins from the loader's path. The environment has to be set
    before Python starts.

    Args:
        folder: where; a folder of this user in the temporary one if None.
        roots: where packages and CUDA are looked for; this Python's packages and the usual places if None.
    """
    home = Path(folder) if folder is not None else Path(tempfile.gettempdir()) / f"dualgp-cuda-{os.getuid()}"
    libraries, headers, missing = home / "lib", home / "include", []
    for made in (libraries, headers):
        made.mkdir(parents=True, exist_ok=True)
    for name in _LIBRARIES:
        found = _library(name, roots)
        if found is None:
            missing.append(name)
            continue
        _link(found, libraries / name)
        _link(found, libraries / found.name)
        for beside in found.resolve().parent.glob("libnvrtc*") if name == "libnvrtc.so" else []:
            _link(beside, libraries / beside.name)  # builtins, under their own names
    for name in _HEADERS:
        places = _headers(name, roots)
        if not places:
            missing.append(name)
            continue
        for beside in places[0].parent.iterdir():
            _link(beside, headers / beside.name)
    environment = {"CUDA_PATH": str(home)}
    for variable in ("LD_LIBRARY_PATH", "LIBRARY_PATH"):
        before = os.environ.get(variable)
        environment[variable] = str(libraries) + (f":{before}" if before else "")
    return Shim(home, environment, missing)


def _library(name: str, roots: list[str] | None) -> Path | None:
    """The best of the files of this name: of torch's CUDA version, not a stub."""
    found = [] if roots is not None else _mapped(name) + _known_to_loader(name)
    for root in _packages() if roots is None else roots:
        found += glob.glob(f"{root}/**/{name}*", recursive=True)
    for place in _PLACES if roots is None else ():
        found += glob.glob(f"{place}/{name}*")
    usable = [p for p in dict.fromkeys(found) if os.path.exists(p) and "/stubs/" not in p and ".alt." not in p]
    version = (torch.version.cuda or "").split(".")[0]
    wanted = r"\.so\.1$" if name == "libcuda.so" else rf"\.so\.{version}(\.|$)"
    usable.sort(key=lambda path: not re.search(wanted, path))
    return Path(usable[0]) if usable else None


def _headers(name: str, roots: list[str] | None) -> list[Path]:
    found = [f"{os.environ[v]}/include/{name}" for v in ("CUDA_PATH", "CUDA_HOME") if roots is None and v in os.environ]
    for root in _packages() if roots is None else roots:
        found += glob.glob(f"{root}/**/include/{name}", recursive=True)
    if roots is None:
        found += [*glob.glob(f"/usr/local/cuda*/include/{name}"), f"/usr/include/{name}"]
    return [Path(p) for p in dict.fromkeys(found) if os.path.exists(p)]


def _packages() -> list[str]:
    places = [*site.getsitepackages(), *(p for p in sys.path if p.endswith("site-packages"))]
    return [f"{p}/{part}" for p in dict.fromkeys(places) for part in ("nvidia", "torch/lib")]


def _mapped(name: str) -> list[str]:
    """Those that this process has loaded already: torch's own."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return sorted({line.split()[-1] for line in lines if f"/{name}" in line})


def _known_to_loader(name: str) -> list[str]:
    try:
        told = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    return re.findall(rf"=> (\S+/{re.escape(name)}\S*)", told)


def _link(source: Path, target: Path) -> None:
    """Link to a file; one that is there already stays if it leads somewhere."""
    if target.is_symlink() and not target.exists():
        target.unlink()
    if not target.exists():
        target.symlink_to(source.resolve())
