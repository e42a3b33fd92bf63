"""How good predictions are: accuracy, F1, Matthews correlation; Pearson and Spearman correlation. In numpy."""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]


def of_classes(predicted: Ids, true: Ids, classes: int) -> dict[str, float]:
    """accuracy; f1: of the last class where there are two, else the mean over classes; mcc: 0 where it is not defined."""
    table = np.zeros((classes, classes), np.float64)  # true by predicted
    np.add.at(table, (true, predicted), 1.0)
    return {"accuracy": float(np.trace(table) / table.sum()), "f1": _f1(table), "mcc": _mcc(table)}


def of_numbers(predicted: Numbers, true: Numbers) -> dict[str, float]:
    """pearson and spearman, 0 where one side is constant; mse."""
    return {
        "pearson": _correlation(predicted, true),
        "spearman": _correlation(_ranks(predicted), _ranks(true)),
        "mse": float(np.mean((predicted - true) ** 2)),
    }


def _f1(table: Numbers) -> float:
    hits, both = np.diag(table), table.sum(0) + table.sum(1)
    each = np.divide(2.0 * hits, both, out=np.zeros_like(hits), where=both > 0)
    return float(each[-1] if len(each) == 2 else each.mean())


def _mcc(table: Numbers) -> float:
    """The correlation of two assignments to classes (Gorodkin 2004); of two classes Matthews' own."""
    total, true, predicted = table.sum(), table.sum(1), table.sum(0)
    top = np.trace(table) * total - true @ predicted
    bottom = np.sqrt((total**2 - predicted @ predicted) * (total**2 - true @ true))
    return float(top / bottom) if bottom > 0 else 0.0


def _correlation(a: Numbers, b: Numbers) -> float:
    a, b = a - a.mean(), b - b.mean()
    bottom = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / bottom if bottom > 0 else 0.0


def _ranks(x: Numbers) -> Numbers:
    """1 for the least; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse].astype(np.float64)
