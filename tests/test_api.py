"""What the library promises: its public names and their arguments, as they stand in `api.txt`.

A change here is a change for users. Where it is meant, write the file anew and say so in CHANGELOG.md:

    python tests/test_api.py
"""

import difflib
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).with_name("api.txt")
MODULES = [
    "dualgp",
    "dualgp.active",
    "dualgp.errors",
    "dualgp.influence",
    "dualgp.interop.botorch",
    "dualgp.interop.laplace",
    "dualgp.interop.peft",
    "dualgp.kernels",
    "dualgp.likelihoods",
    "dualgp.nets",
    "dualgp.optim",
    "dualgp.plotting",
    "dualgp.transfer",
]


def names_of(module: ModuleType) -> list[str]:
    """What it lists, or else what it defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return sorted(listed)
    return sorted(n for n, v in vars(module).items() if n[0] != "_" and ours(v) and v.__module__ == module.__name__)


def ours(value: object) -> bool:
    return callable(value) and (getattr(value, "__module__", None) or "").startswith("dualgp")


def arguments(value: object) -> str:
    """Names, kinds and defaults; annotations print differently from one Python to the next."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return "(…)"
    parameters = []
    for p in signature.parameters.values():
        default = p.default.__name__ if inspect.isroutine(p.default) or inspect.isclass(p.default) else p.default
        parameters.append(p.replace(annotation=p.empty, default=p.empty if default == "_empty" else default))
    return str(inspect.Signature(parameters))


def members(cls: type) -> list[str]:
    """Methods, properties and fields that this package defines, bases included."""
    found: dict[str, str] = {}
    for base in reversed([b for b in cls.__mro__ if b.__module__.startswith("dualgp")]):
        for name in getattr(base, "__annotations__", {}):
            found[name] = name
        for name, value in vars(base).items():
            value = getattr(value, "__func__", value)
            is_property = isinstance(value, property) or hasattr(value, "func")
            found[name] = name + ("" if is_property or not inspect.isroutine(value) else arguments(value))
    return [line for name, line in sorted(found.items()) if not name.startswith("_")]


def described(name: str, value: object) -> list[str]:
    if inspect.isclass(value):
        own = ours(value.__init__) or hasattr(value, "_fields")  # not what Exception and Module take
        return [name + (arguments(value) if own else ""), *(f"{name}.{member}" for member in members(value))]
    return [name + (arguments(value) if callable(value) and ours(value) else "")]


def public_api() -> list[str]:
    lines = []
    for path in MODULES:
        module = importlib.import_module(path)
        for name in names_of(module):
            value = getattr(module, name)
            if not isinstance(value, ModuleType):
                lines += described(f"{path}.{name}", value)
    return lines


def test_the_public_names_and_their_arguments_are_those_on_file():
    pytest.importorskip("botorch", reason="BoTorch is not installed")
    was, now = FILE.read_text(encoding="utf-8").splitlines(), public_api()
    change = [line for line in difflib.unified_diff(was, now, "api.txt", "now", lineterm="", n=0) if line[0] in "+-"]
    assert not change, "\n".join(["The public API has changed; if that is meant, see test_api.py:", *change])


def test_importing_it_loads_nothing_that_is_optional_or_only_draws():
    heavy = ["matplotlib", "botorch", "sklearn", "peft", "laplace", "transformers", "pandas", "IPython"]
    code = f"import sys, dualgp; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().splitlines()[-1] == "[]"


if __name__ == "__main__":
    FILE.write_text("\n".join(public_api()) + "\n", encoding="utf-8")
