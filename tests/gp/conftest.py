"""What the tests of the Gaussian process share: the banana problem, and gates that leave their measurement."""

from collections.abc import Callable

import pytest
from torch import Tensor


@pytest.fixture
def gate(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """`gate(name, error, tolerance)`: assert, and leave what was measured in the report (`pytest --junitxml=FILE`)."""

    def check(name: str, error: float, tolerance: float) -> None:
        request.node.user_properties.append((name, f"{error:.2e} of {tolerance:.0e}"))
        assert error <= tolerance, f"{name}: {error:.3e} is over {tolerance:.0e}"

    return check


@pytest.fixture(scope="session")
def banana(load_shared) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [400, 2], y, test x [4900, 2], test y, with labels 0 and 1."""
    (x, y), (x_test, y_test) = load_shared("banana_train"), load_shared("banana_test")
    return x, (y + 1) / 2, x_test, (y_test + 1) / 2
