"""Counters of the service in the text format of Prometheus.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping

# Upper bounds of the durations of answers, in seconds.
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Labels = Mapping[str, str]
Metric = tuple[str, str, str, Iterable[tuple[Labels, float]]]  # name, type, help, and samples of labels and value


class Counters:
    """Counters of requests and images; safe to use from several threads.

    Attributes:
        accepted: Number of images that were accepted for scoring.
        answered: Number of accepted images that were answered, with a score or an error.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = {}
        self._decisions: dict[tuple[str, str], int] = {}
        self._buckets = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0
        self.accepted = self.answered = 0

    def count_request(self, route: str, status: int) -> None:
        """Count a request by its route and the status of its answer."""
        with self._lock:
            self._requests[route, status] = self._requests.get((route, status), 0) + 1

    def count_accepted(self) -> None:
        """Count an image that was accepted for scoring."""
        with self._lock:
            self.accepted += 1

    def count_answered(self) -> None:
        """Count an accepted image that was answered."""
        with self._lock:
            self.answered += 1

    def count_scored(self, detector: str, decision: str, seconds: float) -> None:
        """Count a scored image.

        Args:
            detector: Name of the detector.
            decision: Its decision, or "none".
            seconds: Time from the whole request to the answer.
        """
        with self._lock:
            self._decisions[detector, decision] = self._decisions.get((detector, decision), 0) + 1
            self._buckets[bisect_left(BOUNDS, seconds)] += 1
            self._seconds += seconds

    def format(self, gauges: Iterable[Metric]) -> str:
        """Return all counters as text.

        Args:
            gauges: Further metrics: name, type, help and samples of labels and value.
        """
        with self._lock:
            requests = [({"route": r, "status": str(s)}, float(n)) for (r, s), n in sorted(self._requests.items())]
            images = [({"detector": d, "decision": k}, float(n)) for (d, k), n in sorted(self._decisions.items())]
            buckets, seconds = list(self._buckets), self._seconds
            accepted, answered = self.accepted, self.answered
        metrics: list[Metric] = [
            ("requests_total", "counter", "Requests by route and status.", requests),
            ("accepted_total", "counter", "Images accepted for scoring.", [({}, float(accepted))]),
            ("answered_total", "counter", "Accepted images that were answered.", [({}, float(answered))]),
            ("images_total", "counter", "Scored images by detector and decision.", images),
            *gauges,
        ]
        lines: list[str] = []
        for name, kind, text, samples in metrics:
            lines += [f"# HELP recontrast_{name} {text}", f"# TYPE recontrast_{name} {kind}"]
            lines += [f"recontrast_{name}{_format_labels(labels)} {value:.17g}" for labels, value in samples]
        lines += _format_histogram(buckets, seconds)
        return "\n".join(lines) + "\n"


def _format_histogram(buckets: list[int], seconds: float) -> list[str]:
    name, total = "recontrast_answer_seconds", 0
    lines = [f"# HELP {name} Time from a whole request to its answer.", f"# TYPE {name} histogram"]
    for bound, count in zip([*(f"{bound:g}" for bound in BOUNDS), "+Inf"], buckets, strict=True):
        total += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f"{name}_sum {seconds:.17g}", f"{name}_count {total}"]


def _format_labels(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escape(value)}"' for name, value in labels.items())
    return "{" + ",".join(pairs) + "}"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
