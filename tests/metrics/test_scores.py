"""Accuracy, F1, Matthews correlation, Pearson and Spearman: values worked out by hand."""

import sys

import numpy as np
import pytest

from megnorm.metrics.scores import of_classes, of_numbers, require


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


def test_a_class_that_nobody_has_counts_in_the_mean() -> None:
    """Of the classes 0 to 3 the last two are neither there nor said."""
    both = np.array([0, 1, 1, 0])
    assert of_classes(both, both, 4) == {"accuracy": 1.0, "f1": 0.5, "mcc": 1.0}


def test_one_row_has_no_correlation() -> None:
    one = np.array([2.0])
    assert of_numbers(one, one) == {"pearson": 0.0, "spearman": 0.0, "mse": 0.0}


@pytest.mark.parametrize("library", ["sklearn.metrics", "scipy.stats"])
def test_a_missing_library_is_told(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=r"pip install megnorm\[scores\], or set train.eval_batches=0"):
        require()
