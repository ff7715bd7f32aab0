"""Counters of the server in Prometheus' text format."""

from collections import Counter
from collections.abc import Mapping

__all__ = ["Metrics"]

_BUCKETS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_HELP = {
    "scd_connections": ("gauge", "Open connections."),
    "scd_connections_total": ("counter", "Connections that were opened."),
    "scd_refused_total": ("counter", "Connections that were refused, by reason."),
    "scd_requests_total": ("counter", "Requests, by kind: plan, observe (no plan), control (no observation)."),
    "scd_errors_total": ("counter", "Requests that failed, by whose fault it was."),
    "scd_evictions_total": ("counter", "Histories dropped because their client was silent."),
    "scd_batches_total": ("counter", "Batches of requests that were computed."),
    "scd_batch_rows_total": ("counter", "Requests in these batches."),
}


class Metrics:
    """Used from the event loop only."""

    def __init__(self) -> None:
        self._values: Counter[tuple[str, str]] = Counter()
        self._buckets: Counter[float] = Counter()
        self._sum_ms = 0.0
        self._count = 0

    def add(self, name: str, amount: int = 1, **labels: str) -> None:
        """Adds to a counter or gauge; `labels` take values of ours only, never a client's."""
        if name not in _HELP:
            raise KeyError(name)
        self._values[name, _labels(labels)] += amount

    def value(self, name: str, **labels: str) -> int:
        """Of a counter or gauge."""
        return self._values[name, _labels(labels)]

    def observe_ms(self, milliseconds: float) -> None:
        """Notes how long a request took, waiting included."""
        self._sum_ms += milliseconds
        self._count += 1
        for bound in _BUCKETS_MS:
            self._buckets[bound] += milliseconds <= bound

    def text(self) -> str:
        """All of them."""
        lines = []
        for name, (kind, words) in _HELP.items():
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
            found = sorted((labels, value) for (key, labels), value in self._values.items() if key == name)
            lines += [f"{name}{labels} {value}" for labels, value in found or [("", 0)]]
        name = "scd_request_ms"
        lines += [f"# HELP {name} Milliseconds per request, waiting included.", f"# TYPE {name} histogram"]
        lines += [f'{name}_bucket{{le="{bound}"}} {self._buckets[bound]}' for bound in _BUCKETS_MS]
        lines += [f'{name}_bucket{{le="+Inf"}} {self._count}', f"{name}_sum {self._sum_ms:g}"]
        return "\n".join([*lines, f"{name}_count {self._count}", ""])


def _labels(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return f"{{{inner}}}" if inner else ""
