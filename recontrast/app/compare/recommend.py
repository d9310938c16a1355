"""Recommendation of one method, in one sentence that states the rule."""

from collections.abc import Sequence
from dataclasses import dataclass

from recontrast.app.compare.record import MethodResult
from recontrast.evaluation.results import METRICS

COMPARED = ("i_auroc", "i_ap", "p_auroc", "p_ap", "aupro")  # metrics of the tables, fields of `Row`
CLOSE = 0.01  # methods whose separation differs by at most this are chosen between by their cost


@dataclass(frozen=True)
class Recommendation:
    """Recommended method.

    Attributes:
        method: Name of the method.
        rule: Rule that chose it: "metrics", "separation" or "cost".
        sentence: The recommendation with its rule and its numbers.
    """

    method: str
    rule: str
    sentence: str


def list_metrics(results: Sequence[MethodResult]) -> list[str]:
    """Return those of `COMPARED` that all measured methods have."""
    measured = [result for result in results if result.error is None]
    return [name for name in COMPARED if measured and all(name in result.metrics for result in measured)]


def compute_mean(result: MethodResult, names: Sequence[str]) -> float:
    """Return the mean of the metrics ``names`` of a method, in [0, 1]."""
    return sum(result.metrics[name] for name in names) / len(names)


def recommend(results: Sequence[MethodResult], noun: str = "image") -> Recommendation | None:
    """Recommend a method: by its metrics, else by its separation, else by its cost.

    Args:
        results: Measures of all methods.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.

    Returns:
        The recommendation; None if no method was measured.
    """
    measured = [result for result in results if result.error is None]
    if not measured:
        return None
    if names := list_metrics(measured):
        return _recommend_by_metrics(measured, names, noun)
    if all(result.separation is not None for result in measured):
        return _recommend_by_separation(measured, noun)
    best = min(measured, key=_cost)
    return Recommendation(
        best.name, "cost",
        f"{best.name}: the shortest time for {_one(noun)} ({_milliseconds(best)}), because no labelled test {noun}s "
        f"and no held-out good {noun}s say which method is the most accurate.",
    )  # fmt: skip


def _recommend_by_metrics(measured: Sequence[MethodResult], names: Sequence[str], noun: str) -> Recommendation:
    order = sorted(measured, key=lambda result: (-compute_mean(result, names), _cost(result)))
    best, images = order[0], f"{order[0].images} labelled test {noun}s"
    *others, last = [METRICS[name] for name in names]
    mean = f"mean of {', '.join(others)} and {last}" if others else last
    value = f"{100 * compute_mean(best, names):.1f} %"
    if len(order) > 1:
        value += f"; next {order[1].name}, {100 * compute_mean(order[1], names):.1f} %"
    return Recommendation(
        best.name, "metrics",
        f"{best.name}: the highest {mean} on the {images} ({value}), which are the {noun}s that chose it, so that its "
        f"figures on new {noun}s can be lower.",
    )  # fmt: skip


def _recommend_by_separation(measured: Sequence[MethodResult], noun: str) -> Recommendation:
    highest = max(result.separation or 0 for result in measured)
    close = [result for result in measured if (result.separation or 0) >= highest - CLOSE]
    best = min(close, key=_cost)
    count = len(best.held_out_scores)
    value = f"{100 * (best.separation or 0):.1f} %"
    reason = f"the best separation of {count} held-out good {noun}s from copies with an artificial defect ({value})"
    if len(close) > 1:
        names = ", ".join(result.name for result in close if result is not best)
        reason = (
            f"the fastest ({_milliseconds(best)} for {_one(noun)}) of the methods that best separate {count} held-out "
            f"good {noun}s from copies with an artificial defect ({value}; {names} within {100 * CLOSE:.0f} point)"
        )
    return Recommendation(
        best.name, "separation", f"{best.name}: {reason}; labelled test {noun}s would be a better judge."
    )


def _one(noun: str) -> str:
    return f"{'an' if noun == 'image' else 'a'} {noun}"


def _cost(result: MethodResult) -> tuple[float, float]:
    return result.image_seconds or 0.0, result.train_seconds or 0.0


def _milliseconds(result: MethodResult) -> str:
    return f"{1000 * (result.image_seconds or 0):.3g} ms"
