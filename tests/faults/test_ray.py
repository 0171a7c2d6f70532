"""Hosts of a Ray cluster: Ray launches agents and keeps them, and whatever of it dies costs no job and no bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.job import JobRequest
from protocol.views import WorkerView
from scripts.faults.saboteur import patiently
from tests.rays import RayCluster, ray_cluster
from tests.stacks import RunningStack, running_stack

REQUEST = JobRequest(prompt="a red star", seed=1, steps=40, width=32, height=32)


@dataclass
class RayStack:
    cluster: RayCluster
    stack: RunningStack

    def on(self, name: str) -> list[WorkerView]:
        """The workers of a host that are loaded."""
        return [w for w in self.stack.client.workers().workers if w.host == name and w.state != "loading"]


@pytest.fixture
def ray_stack(state: Path, flux_dev: Path) -> Iterator[RayStack]:
    settings = ["--model", str(flux_dev), "--device", "cpu", "--checkpoint", "0"]
    with ray_cluster(2) as cluster:
        there, address = cluster.head.there(), cluster.address
        with running_stack(state, *settings, "--ray", address, there=there, env=cluster.env) as stack:
            yield RayStack(cluster, stack)


def test_agents_come_to_all_nodes_and_end_with_the_stack(ray_stack: RayStack) -> None:
    one, two = ray_stack.cluster.nodes
    patiently(lambda: len(ray_stack.on(one.name)) == len(ray_stack.on(two.name)) == 3, 90)
