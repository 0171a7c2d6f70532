"""Hosts of a Ray cluster: Ray launches agents and keeps them, and whatever of it dies costs no job and no bit."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from protocol.client.client import Client
from protocol.job import JobRequest
from protocol.views import WorkerView
from scripts.faults.networks import OtherHost
from scripts.faults.saboteur import patiently
from tests.rays import RAY, RayCluster, ray_cluster, scaled_cluster
from tests.stacks import TRIPTYCH, RunningStack, running_stack

REQUEST = JobRequest(prompt="a red star", seed=1, steps=60, width=32, height=32)
OURS = ("workers.runtime", "orchestrator.")  # in command lines of what the stack starts


@dataclass
class RayStack:
    cluster: RayCluster
    stack: RunningStack
    settings: list[str]

    @property
    def client(self) -> Client:
        return self.stack.client

    @property
    def boxes(self) -> list[OtherHost]:
        return self.cluster.nodes

    def on(self, box: OtherHost) -> list[WorkerView]:
        """The workers of a host that are loaded."""
        return [w for w in self.client.workers().workers if w.host == box.name and w.state != "loading"]

    def all_here(self, *boxes: OtherHost) -> bool:
        return all(len(self.on(box)) == 3 for box in boxes or self.boxes)

    def pids(self) -> set[tuple[str, int]]:
        return {(w.host, w.pid) for box in self.boxes for w in self.on(box)}

    def state_of(self, box: OtherHost) -> str:
        return next(host.state for host in self.client.hosts() if host.name == box.name)


@pytest.fixture
def ray_stack(state: Path, flux_dev: Path) -> Iterator[RayStack]:
    """Two hosts beside the head's, where all denoising is done."""
    with ray_cluster(2) as cluster:
        yield from stack_on(cluster, state, flux_dev)


def stack_on(cluster: RayCluster, state: Path, model: Path) -> Iterator[RayStack]:
    settings = ["--model", str(model), "--device", "cpu", "--checkpoint", "0", "--ray", cluster.address]
    with running_stack(state, *settings, there=cluster.head.there(), env=cluster.env) as stack:
        found = RayStack(cluster, stack, settings)
        patiently(found.all_here, 90)
        yield found
    for box in cluster.nodes:  # after a good end nothing is left anywhere
        patiently(lambda box=box: not any(ours in line for line in box.processes() for ours in OURS), 30)


def trouble(here: RayStack, fault: Callable[[], None], back: Callable[[], bool], count: int = 4) -> None:
    """Make a fault while all hosts denoise: all jobs come to their end with the same bits, and it is overcome."""
    wanted = picture(here)
    jobs = here.client.submit_many([REQUEST] * count, watch=True)
    for event in here.client.events([jobs[0].id], timeout=60):
        if event.state == "denoise" and event.step > 3:
            break
    fault()
    for job in jobs:
        here.client.wait(job.id, 120)
        assert here.stack.pictures(job.id).equal(wanted)
    found = [here.client.job(job.id) for job in jobs]
    assert all([record.stage for record in job.records] == ["text", "denoise", "vae"] for job in found)
    patiently(back, 90)


def picture(here: RayStack) -> torch.Tensor:
    wanted = here.stack.picture(REQUEST.prompt, **REQUEST.model_dump(exclude_defaults=True, exclude={"prompt"}))[1]
    here.client.scale("denoise", 0)
    return wanted


@pytest.mark.all
def test_agents_come_to_all_nodes_and_a_killed_actor_comes_again(ray_stack: RayStack) -> None:
    box = ray_stack.boxes[0]
    before = {worker.pid for worker in ray_stack.on(box)}

    def fault() -> None:
        (actor,) = box.pids("ray::HostActor")
        box.kill(actor)

    trouble(ray_stack, fault, lambda: ray_stack.all_here() and not before & {w.pid for w in ray_stack.on(box)})
    assert "host" in {row["role"] for row in keys_of(ray_stack)}


def keys_of(here: RayStack) -> list[dict[str, str]]:
    import json

    listed = subprocess.run(
        [*TRIPTYCH, "keys", "list", "--json", "--state", str(here.stack.folder)],
        capture_output=True, check=True, text=True, env=here.cluster.env,
    )  # fmt: skip
    found: list[dict[str, str]] = json.loads(listed.stdout)
    return found


@pytest.mark.all
def test_a_worker_and_an_agent_are_killed_on_two_hosts_at_once(ray_stack: RayStack) -> None:
    one, two = ray_stack.boxes

    def fault() -> None:
        one.kill(next(w.pid for w in ray_stack.on(one) if w.stage == "denoise"))
        two.kill(two.pids("orchestrator.cli join")[0])

    trouble(ray_stack, fault, ray_stack.all_here)


@pytest.mark.all
def test_a_raylet_is_killed_and_its_node_comes_again(ray_stack: RayStack) -> None:
    box = ray_stack.boxes[0]

    def fault() -> None:
        box.kill(box.pids("raylet/raylet")[0])
        patiently(lambda: not any(ours in line for line in box.processes() for ours in OURS))
        ray_stack.cluster.start(box)

    trouble(ray_stack, fault, ray_stack.all_here)


@pytest.mark.all
def test_the_launcher_and_the_orchestrator_are_killed_and_hosts_dont_notice(ray_stack: RayStack) -> None:
    head, before = ray_stack.cluster.head, ray_stack.pids()

    def fault() -> None:
        head.kill(head.pids("orchestrator.ray_launcher")[0])
        head.kill(ray_stack.client.stack().pid)

    trouble(ray_stack, fault, ray_stack.all_here)
    assert ray_stack.pids() == before


@pytest.mark.all
def test_the_supervisor_is_killed_and_the_next_one_adopts_the_hosts(ray_stack: RayStack) -> None:
    head, before, stack = ray_stack.cluster.head, ray_stack.pids(), ray_stack.stack
    wanted = picture(ray_stack)
    jobs = ray_stack.client.submit_many([REQUEST] * 3)
    head.kill(head.pids("orchestrator.cli up")[0])
    stack.process.communicate(timeout=30)
    with running_stack(stack.folder, *ray_stack.settings, there=head.there(), env=ray_stack.cluster.env) as again:
        for job in jobs:
            again.client.wait(job.id, 120)
            assert again.pictures(job.id).equal(wanted)
        ray_stack.stack = again
        patiently(ray_stack.all_here, 60)
        assert ray_stack.pids() == before
    stack.process = subprocess.Popen(["true"], text=True)  # what the fixture ends has ended
    stack.process.wait()


@pytest.mark.all
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seconds", [5, 75])
def test_a_link_is_cut_and_healed(ray_stack: RayStack, seconds: int) -> None:
    box, before = ray_stack.boxes[0], ray_stack.pids()

    def fault() -> None:
        box.cut()
        subprocess.run(["sleep", str(seconds)], check=True)  # as long as the link is to be down
        box.heal()

    trouble(ray_stack, fault, ray_stack.all_here)
    assert ray_stack.pids() == before  # nobody was replaced


@pytest.mark.all
def test_a_host_is_gone_for_good(ray_stack: RayStack) -> None:
    box, other = ray_stack.boxes

    trouble(ray_stack, box.switch_off, lambda: ray_stack.all_here(other) and ray_stack.state_of(box) == "silent")
    ray_stack.cluster.nodes.remove(box)


@pytest.mark.all
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="the cluster's state is kept in Redis")
def test_the_clusters_control_store_is_killed_and_comes_again(state: Path, flux_dev: Path) -> None:
    """With Redis behind it nothing that it knew is lost; Triptych does without it meanwhile."""
    with ray_cluster(1, redis=True) as cluster:
        for here in stack_on(cluster, state, flux_dev):
            before, head = here.pids(), cluster.head

            (store,) = head.pids("gcs/gcs_server")
            command = head.run("cat", f"/proc/{store}/cmdline").rstrip("\0").split("\0")
            settings = head.run("cat", f"/proc/{store}/environ").rstrip("\0").split("\0")
            trouble(here, lambda head=head, store=store: head.kill(store), here.all_here)
            assert here.pids() == before
            head.serve(["env", "-i", *settings, *command])  # nobody restarts it by itself
            patiently(lambda here=here: launcher_is_back(here), 60)
            assert here.pids() == before


def launcher_is_back(here: RayStack) -> bool:
    """Return whether the cluster answers, as the launcher needs it for a good end."""
    listed = subprocess.run(
        here.cluster.head.there([RAY, "status", "--address", here.cluster.address]),
        capture_output=True, env=here.cluster.env, timeout=60, check=False, text=True,
    )  # fmt: skip
    return listed.returncode == 0


@pytest.mark.all
@pytest.mark.timeout(420)
def test_hosts_come_for_work_and_go_without(state: Path, flux_dev: Path) -> None:
    with scaled_cluster(2) as cluster:
        settings = ["--model", str(flux_dev), "--device", "cpu", "--ray", cluster.address, "--ray-scale", "0-2"]
        with running_stack(state, *settings, there=cluster.head.there(), env=cluster.env) as stack:
            client = stack.client
            wanted = stack.picture(REQUEST.prompt, **REQUEST.model_dump(exclude_defaults=True, exclude={"prompt"}))[1]
            client.scale("denoise", 0)
            assert not client.hosts()
            job = client.submit(REQUEST)
            client.wait(job.id, 120)
            assert stack.pictures(job.id).equal(wanted)
            (host,) = client.hosts()
            assert next(r.worker for r in client.job(job.id).records if r.stage == "denoise").endswith(f"@{host.name}")
            patiently(lambda: not client.hosts(), 120)  # once it has had nothing to do for as long as it took to come
            patiently(lambda: not any("orchestrator.cli join" in line for line in cluster.head.processes()), 30)


@pytest.mark.all
def test_a_cluster_without_a_token_is_refused(state: Path, flux_dev: Path) -> None:
    with ray_cluster(0, token=False) as cluster:
        up = [*TRIPTYCH, "up", "--state", str(state), "--model", str(flux_dev), "--ray", cluster.address]
        env = {**cluster.env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64}
        done = subprocess.run(cluster.head.there(up), env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "lets everybody in: it was started without a token" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.all
@pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates with openssl")
def test_hosts_come_to_a_cluster_that_encrypts_its_traffic(state: Path, flux_dev: Path) -> None:
    with ray_cluster(1, tls=True) as cluster:
        for here in stack_on(cluster, state, flux_dev):
            job = here.client.submit(REQUEST)
            here.client.wait(job.id, 120)
