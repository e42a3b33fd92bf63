"""Accuracy, F1, Matthews correlation, Pearson and Spearman: values worked out by hand, and those of the usual libraries."""

import numpy as np
import pytest

from megnorm.metrics.scores import of_classes, of_numbers


def test_two_classes_by_hand() -> None:
    """3 true positives, 1 false one, 2 false negatives, 4 true negatives."""
    true = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    said = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    found = of_classes(said, true, 2)
    assert found == pytest.approx({"accuracy": 0.7, "f1": 6 / 9, "mcc": (3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5})


def test_three_classes_by_hand() -> None:
    """F1 of each class: 1/2, 0 (never right), 1; MCC: (3 * 5 - 9) / sqrt((25 - 9) (25 - 9))."""
    true, said = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 0, 2, 2])
    found = of_classes(said, true, 3)
    assert found == pytest.approx({"accuracy": 0.6, "f1": (0.5 + 0 + 1) / 3, "mcc": (3 * 5 - 9) / 16})


def test_one_answer_for_all_has_no_correlation() -> None:
    assert of_classes(np.zeros(4, np.int64), np.array([0, 1, 0, 1]), 2) == {"accuracy": 0.5, "f1": 0.0, "mcc": 0.0}
    flat = of_numbers(np.ones(3), np.array([1.0, 2.0, 3.0]))
    assert (flat["pearson"], flat["spearman"]) == (0.0, 0.0) and flat["mse"] == pytest.approx(5 / 3)


def test_numbers_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4."""
    found = of_numbers(np.array([0.0, 5.0, 5.0, 9.0]), np.array([2.0, 1.0, 3.0, 40.0]))
    assert found["spearman"] == pytest.approx(3.0 / (4.5 * 5.0) ** 0.5)
    line = of_numbers(np.array([1.0, 2.0, 4.0]), np.array([-3.0, -5.0, -9.0]))
    assert (line["pearson"], line["spearman"]) == pytest.approx((-1.0, -1.0))


@pytest.mark.parametrize("classes", [2, 5])
def test_they_are_those_of_scikit_learn(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(classes)
    true, said = random.integers(0, classes, (2, 200))
    found = of_classes(said, true, classes)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))
    assert found["f1"] == pytest.approx(metrics.f1_score(true, said, average="binary" if classes == 2 else "macro"))
    assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(true, said))


def test_they_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    a = random.integers(0, 10, 100).astype(np.float64)
    b = a + random.normal(0, 4, 100)
    found = of_numbers(a, b)
    assert found["pearson"] == pytest.approx(stats.pearsonr(a, b)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(a, b)[0])
