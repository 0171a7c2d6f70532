"""/metrics: what the orchestrator has counted, and how the stack stands now, in Prometheus' words."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from orchestrator.gpu_driver import label_of
from orchestrator.http.asking import Who
from orchestrator.http.jobs import load_of
from protocol.messages.client import Stack, Workers
from protocol.metrics import Metric
from protocol.views import ModelView

router = APIRouter(tags=["health"])
PREFIX = "triptych_"


class Snapshot(Collector):
    """A picture of the stack at one moment, for one answer."""

    def __init__(self, counted: Iterable[Metric], workers: Workers, stack: Stack, models: list[ModelView]) -> None:
        self._counted, self._workers, self._stack, self._models = counted, workers, stack, models

    def collect(self) -> Iterator[Family]:
        for metric in self._counted:
            yield histogram_of(metric) if metric.kind == "histogram" else counter_of(metric)
        jobs = GaugeMetricFamily(f"{PREFIX}jobs", "jobs by state, now", labels=["state"])
        for state, count in self._stack.counts:
            jobs.add_metric([state], count)
        unfinished = GaugeMetricFamily(f"{PREFIX}unfinished_jobs", "unfinished jobs by model", labels=["model"])
        resting = GaugeMetricFamily(f"{PREFIX}model_rests", "1 where a model has no workers now", labels=["model"])
        for model in self._models:
            unfinished.add_metric([model.name], model.jobs)
            resting.add_metric([model.name], int(model.resting))
        yield from (jobs, unfinished, resting, self._of_workers(), self._of_processes(), *self._of_gpus())

    def _of_workers(self) -> Family:
        found = GaugeMetricFamily(f"{PREFIX}workers", "workers by stage and state", labels=["stage", "state"])
        counts = Counter((worker.stage, worker.state) for worker in self._workers.workers)
        for (stage, state), count in sorted(counts.items()):
            found.add_metric([stage, state], count)
        return found

    def _of_processes(self) -> Family:
        found = CounterMetricFamily(f"{PREFIX}process_restarts", "ends of a process, by its name", labels=["process"])
        for process in self._workers.processes:
            found.add_metric([process.name], process.restarts)
        return found

    def _of_gpus(self) -> Iterator[Family]:
        budget = GaugeMetricFamily(f"{PREFIX}gpu_budget_bytes", "bytes that the stack may use of a GPU", labels=["gpu"])
        headroom = GaugeMetricFamily(f"{PREFIX}gpu_headroom_bytes", "bytes of that which nobody has", labels=["gpu"])
        lease = GaugeMetricFamily(f"{PREFIX}gpu_lease_bytes", "bytes of leases", labels=["gpu", "stage"])
        context = GaugeMetricFamily(f"{PREFIX}gpu_context_bytes", "bytes of contexts", labels=["gpu", "stage"])
        for gpu in self._workers.gpus:
            name, leases, contexts = label_of(gpu.host, gpu.index), Counter[str](), Counter[str]()
            for worker in self._workers.workers:
                if gpu.has(worker):
                    load = load_of(worker, gpu.index, self._models)
                    leases[load.stage] += load.lease
                    contexts[load.stage] += load.context
            budget.add_metric([name], gpu.budget)
            headroom.add_metric([name], gpu.budget - leases.total() - contexts.total())
            for stage in sorted(leases):
                lease.add_metric([name, stage], leases[stage])
                context.add_metric([name, stage], contexts[stage])
        yield from (budget, headroom, lease, context)


def counter_of(metric: Metric) -> Family:
    found = CounterMetricFamily(f"{PREFIX}{metric.name}", metric.what, labels=list(metric.labels))
    for sample in metric.samples:
        found.add_metric(list(sample.labels), sample.value)
    return found


def histogram_of(metric: Metric) -> Family:
    found = HistogramMetricFamily(f"{PREFIX}{metric.name}", metric.what, labels=list(metric.labels))
    for sample in metric.samples:
        buckets, total = [], 0
        for limit, count in zip((*map(str, metric.limits), "+Inf"), sample.counts, strict=True):
            total += count
            buckets.append((limit, float(total)))
        found.add_metric(list(sample.labels), buckets, sample.value)
    return found


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(who: Who) -> Response:
    """Show counts and distributions for Prometheus. Its key may be anybody's: it is of the whole stack."""
    async with who.http.stack.acting_for("") as client:
        counted, workers, stack, models = await asyncio.gather(
            client.metrics(), client.workers(), client.stack(), client.models()
        )
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Snapshot(counted, workers, stack, models))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
