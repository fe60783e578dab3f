import math

from mixmae.trainer.telemetry.falling import FallingFigures


def test_evaluations_well_below_the_highest_are_counted_in_a_row() -> None:
    falling = FallingFigures()
    values = [0.5, 0.6, 0.55, 0.53, 0.5, math.nan, 0.59, 0.5]
    assert [falling.add({"top1": value})["top1"] for value in values] == [0, 0, 0, 1, 2, 3, 0, 1]


def test_the_record_of_a_run_counts_too_and_figures_are_told_apart() -> None:
    falling = FallingFigures([{"top1": 0.6, "knn": 0.3}, {"top1": 0.5, "knn": None}, {"top1": 0.4}])
    assert falling.add({"top1": 0.3, "knn": 0.29}) == {"top1": 3, "knn": 0}
