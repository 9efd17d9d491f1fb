"""Errors and warnings, named after what is wrong.

Every message says what was expected, what came, and what to do. A call that raises has changed nothing.
"""

from numbers import Integral


class DualGPError(Exception):
    """Base of every error that dualgp raises on purpose."""


class InputError(DualGPError, ValueError):
    """Data or an argument has the wrong shape, dtype, device or value."""


class UnsupportedError(DualGPError, TypeError):
    """A kernel, mean, likelihood or network that dualgp cannot use, found when the model is built."""


class BasisMismatchError(DualGPError, ValueError):
    """Sites or posteriors that live on different bases were combined."""


class NotPositiveDefiniteError(DualGPError, ArithmeticError):
    """What is left is no Gaussian: its precision has an eigenvalue that is not positive."""


class NotFittedError(DualGPError, RuntimeError):
    """A prediction or a score was asked of a model that has no posterior yet."""


class SolverError(DualGPError, ArithmeticError):
    """An iterative solver has not reached its tolerance: the message has the residual, the iterations and a remedy."""


class CallOrderError(DualGPError, RuntimeError):
    """A call came at a time when it has no meaning, such as a step before any gradient."""


class DistributedError(DualGPError, RuntimeError):
    """Another process of a fit has failed or is gone, or the processes went different ways."""


class DivergenceError(DualGPError, ArithmeticError):
    """An iteration moves away from its fixed point: its step is too long."""


class ConvergenceWarning(UserWarning):
    """An iteration stopped at its limit before its stopping rule was met."""


class NumericalWarning(UserWarning):
    """A factorisation needed more jitter than was asked for; the message says how much."""


class BackendWarning(UserWarning):
    """An optional backend that was asked for cannot be used, and another has taken its place; results are the same."""


def check_count(name: str, value: object, least: int) -> None:
    """Raise InputError unless an argument is a whole number and not less than `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number and at least {least}, got {value!r}.")
