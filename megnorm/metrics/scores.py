"""How good predictions are: accuracy, F1, Matthews correlation; Pearson and Spearman correlation. By scikit-learn and scipy."""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]


def require() -> None:
    """Raise ValueError where a library is missing, so that a run is told before its first step."""
    try:
        import scipy.stats  # noqa: F401
        import sklearn.metrics  # noqa: F401
    except ImportError as missing:
        raise ValueError(
            f"a classifier's scores need scikit-learn and scipy ({missing}): pip install megnorm[scores], "
            "or set train.eval_batches=0"
        ) from None


def of_classes(predicted: Ids, true: Ids, classes: int) -> dict[str, float]:
    """accuracy; f1: of the last class where there are two, else the mean over classes; mcc: 0 where it is not defined."""
    from sklearn import metrics

    labels = [1] if classes == 2 else list(range(classes))
    return {
        "accuracy": float(metrics.accuracy_score(true, predicted)),
        "f1": float(metrics.f1_score(true, predicted, labels=labels, average="macro", zero_division=0.0)),
        "mcc": float(metrics.matthews_corrcoef(true, predicted)),
    }


def of_numbers(predicted: Numbers, true: Numbers) -> dict[str, float]:
    """pearson and spearman, 0 where one side is constant; mse."""
    from scipy import stats

    found = {"pearson": 0.0, "spearman": 0.0, "mse": float(np.mean((predicted - true) ** 2))}
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return found
    pearson, spearman = stats.pearsonr(predicted, true), stats.spearmanr(predicted, true)
    return found | {"pearson": float(pearson.statistic), "spearman": float(spearman.statistic)}
