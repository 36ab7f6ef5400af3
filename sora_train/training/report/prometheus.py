"""Metrics for Prometheus: served over HTTP, or written to a file for the node exporter's textfile collector.

Metric names are prefixed by `sora_train_`; the 0.7 of `loss_by_noise/0.7` becomes a label. A scrape also returns the
age of the last checkpoint.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server, write_to_textfile
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_LABELLED = re.compile(r"(\w+)/([\w.]+)$")


class PrometheusWriter:
    """Exports the last metrics of a run as gauges; with `port` 0 to the file `run_dir/metrics.prom`.

    Raises OSError if the port is in use.
    """

    def __init__(self, run_dir: Path, port: int) -> None:
        self.run_dir, self.file = run_dir, None if port else run_dir / "metrics.prom"
        self.values: dict[str, float] = {}
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(self))
        self._server = start_http_server(port, registry=self.registry)[0] if port else None

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Update the gauges with the metrics of a step."""
        self.values |= {**values, "step": step}
        if self.file is not None:
            write_to_textfile(str(self.file), self.registry)  # atomic

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        """Do nothing, as Prometheus has no videos."""

    def close(self) -> None:
        """Stop the HTTP server, if there is one."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Gauges(Collector):
    def __init__(self, writer: PrometheusWriter) -> None:
        self.writer = writer

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the current gauges, one family for each metric name."""
        run, families = self.writer.run_dir.name, dict[str, GaugeMetricFamily]()
        figures = {**self.writer.values, **_checkpoint_age(self.writer.run_dir)}
        for key, value in sorted(figures.items()):
            split = _LABELLED.match(key)
            name, labels = (split[1], [run, split[2]]) if split else (key, [run])
            names = ["run", "bin"] if split else ["run"]
            if name not in families:
                families[name] = GaugeMetricFamily(f"sora_train_{name}", f"docs/metrics.md: {name}", labels=names)
            families[name].add_metric(labels, float(value))
        yield from families.values()


def _checkpoint_age(run_dir: Path) -> dict[str, float]:
    """Seconds since the newest published checkpoint."""
    manifests = sorted(run_dir.glob("checkpoints/step-*/manifest.json"))
    return {"checkpoint_age": time.time() - manifests[-1].stat().st_mtime} if manifests else {}
