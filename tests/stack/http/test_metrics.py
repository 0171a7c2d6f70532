"""Metrics of a real stack: what Prometheus reads, and what a terminal shows."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.stacks import RunningStack, triptych


def samples(web: httpx.Client) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    answer = web.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def one(rows: list[tuple[dict[str, str], float]], **labels: str) -> float:
    return sum(value for found, value in rows if labels.items() <= found.items())


def test_jobs_are_counted_and_timed(web: httpx.Client, served: RunningStack) -> None:
    before = samples(web)
    job = served.client.submit("counted", seed=1, width=32, height=32, steps=2)
    served.client.wait(job.id)
    cancelled = served.client.submit("counted", seed=2, width=32, height=32, steps=300)
    served.client.cancel(cancelled.id)
    after = samples(web)

    def more(name: str, **labels: str) -> float:
        return one(after[name], **labels) - one(before.get(name, []), **labels)

    assert more("triptych_jobs_total", state="done", owner="local") == 1
    assert more("triptych_jobs_total", state="cancelled") == 1
    for stage in ("text", "denoise", "vae"):
        assert more("triptych_stage_seconds_count", stage=stage) >= 1
        assert more("triptych_stage_seconds_bucket", stage=stage, le="+Inf") == more(
            "triptych_stage_seconds_count", stage=stage
        )
    assert more("triptych_job_seconds_count") == 1
    assert more("triptych_queue_wait_seconds_count") >= 1
    assert one(after["triptych_workers"], stage="denoise") == 1
    assert one(after["triptych_jobs"], state="done") >= 1


def test_top_shows_the_stack_once(served: RunningStack) -> None:
    shown = triptych("top", "--once", folder=served.folder)
    assert shown.returncode == 0, shown.stderr
    for words in ("jobs:", "since the start", "denoise-1", "text-1", "vae-1"):
        assert words in shown.stdout
