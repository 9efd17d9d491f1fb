"""The floors of the package: a module imports only from floors strictly below its own.

Imports are read with ast, so an import inside a function or under TYPE_CHECKING counts too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "dualgp"

# A name is a module or a subpackage directly under dualgp/. Modules of one subpackage may import
# each other; two names on one floor may not.
FLOORS: dict[int, set[str]] = {
    0: {"errors", "threads", "_quiet", "_version"},
    1: {"checks", "draws", "linalg", "files", "fingerprints"},
    2: {"sites", "kernels", "quadrature", "likelihoods", "solvers"},
    3: {"duals", "basis", "inducing", "distributed", "spans", "selection"},
    4: {"information", "jacobian", "laplace", "posterior", "predictive", "weights"},
    5: {"influence"},
    6: {"active", "gp", "nets", "optim", "transfer"},
    7: {"interop", "plotting"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
TOP = "__init__"  # the public names: imports anything


def unit_of(path: Path, root: Path) -> str:
    """The name directly under the package that a file belongs to: gp/memory.py is of gp."""
    return path.relative_to(root).with_suffix("").parts[0]


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of the package itself: ``dualgp.sites.Sites``."""
    package = [root.name, *path.relative_to(root).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == root.name)


def violations(root: Path) -> list[str]:
    """One sentence for each import that goes sideways or up, and for each unknown name."""
    found = []
    for path in sorted(root.rglob("*.py")):
        unit = unit_of(path, root)
        where = path.relative_to(root.parent)
        if unit == TOP:
            continue
        if unit not in FLOOR_OF:
            found.append(f"{where}: {unit!r} stands on no floor; add it to FLOORS in tests/test_layers.py")
            continue
        for line, name in imported_modules(path, root):
            target = name.split(".")[1] if "." in name else TOP
            if target == unit:
                continue
            if target not in FLOOR_OF:
                found.append(
                    f"{where}:{line}: imports {name}, which is no module on a floor; import from "
                    f"the module that defines it, or add a new one to FLOORS in "
                    f"tests/test_layers.py"
                )
            elif FLOOR_OF[target] >= FLOOR_OF[unit]:
                found.append(
                    f"{where}:{line}: {unit} (floor {FLOOR_OF[unit]}) imports {name} "
                    f"(floor {FLOOR_OF[target]}); only lower floors are allowed"
                )
    return found


def test_every_import_goes_down():
    assert ROOT.is_dir()
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("posterior.py", "from dualgp.sites import Sites", None),
        ("posterior.py", "from .duals import duals", None),
        (
            "gp/memory.py",
            "from . import bound\nfrom .bound import elbo\nfrom ..sites import S",
            None,
        ),
        ("kernels/ntk.py", "from dualgp.kernels.products import matvec\nimport torch", None),
        ("__init__.py", "from dualgp.gp import DualGP\nfrom dualgp.plotting import plot", None),
        ("sites.py", "from dualgp.posterior import Posterior", "only lower floors"),
        ("sites.py", "import dualgp.gp.memory as memory", "only lower floors"),
        ("sites.py", "def f():\n    from .kernels import products", "only lower floors"),
        ("gp/memory.py", "from ..optim import IVON", "only lower floors"),
        ("nets/ggn.py", "from dualgp import transfer", "only lower floors"),
        ("gp/memory.py", "from dualgp import DualGP", "import from the module that defines it"),
        ("gp/memory.py", "import dualgp", "import from the module that defines it"),
        ("gp/memory.py", "from .. import __version__", "import from the module that defines it"),
        ("novelty.py", "", "add it to FLOORS in tests/test_layers.py"),
        ("novelty/inside.py", "", "add it to FLOORS in tests/test_layers.py"),
    ],
)
def test_the_checker_catches(tmp_path, file, source, message):
    path = tmp_path / "dualgp" / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    found = violations(tmp_path / "dualgp")
    if message is None:
        assert found == []
    else:
        assert len(found) == 1
        assert message in found[0]
        assert file.split("/")[0] in found[0]
