"""Accuracy, precision, recall and F1 of a confusion matrix, worked out by hand."""

import pytest

from rlhf.report.classification import Scores, evaluate_classes

MATRIX = [[6, 2, 0], [1, 3, 0], [0, 4, 0]]


def test_a_matrix_by_hand():
    """Class a: 6 of 7 named a are, 6 of 8 are found; b: 3 of 9, 3 of 4; c is never named."""
    found = evaluate_classes(("a", "b", "c"), MATRIX)
    assert (found.rows, found.texts, found.confusion) == (16, (8, 4, 4), ((6, 2, 0), (1, 3, 0), (0, 4, 0)))
    assert found.accuracy == pytest.approx(9 / 16)
    assert found.majority == pytest.approx(8 / 16)
    precision, recall = (6 / 7, 3 / 9, 0.0), (6 / 8, 3 / 4, 0.0)
    f1 = (2 * 6 / (7 + 8), 2 * 3 / (9 + 4), 0.0)
    for name, *expected in zip("abc", precision, recall, f1, strict=True):
        scores = found.classes[name]
        assert (scores.precision, scores.recall, scores.f1) == pytest.approx(tuple(expected))
    means = tuple(sum(values) / 3 for values in (precision, recall, f1))
    assert (found.macro.precision, found.macro.recall, found.macro.f1) == pytest.approx(means)


def test_it_is_what_scikit_learn_says_of_the_single_texts():
    from sklearn.metrics import classification_report

    true = [i for i, row in enumerate(MATRIX) for count in row for _ in range(count)]
    taken = [j for row in MATRIX for j, count in enumerate(row) for _ in range(count)]
    expected = classification_report(true, taken, target_names=["a", "b", "c"], output_dict=True, zero_division=0)
    found = evaluate_classes(("a", "b", "c"), MATRIX)
    assert found.accuracy == pytest.approx(expected["accuracy"])
    for name, scores in {**found.classes, "macro avg": found.macro}.items():
        told = expected[name]
        assert scores == Scores(*(pytest.approx(told[key]) for key in ("precision", "recall", "f1-score")))


def test_a_perfect_classifier():
    found = evaluate_classes(("x", "y"), [[5, 0], [0, 5]])
    assert found.accuracy == found.macro.f1 == found.classes["y"].precision == 1.0
