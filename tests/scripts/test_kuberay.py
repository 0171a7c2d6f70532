"""The manifests for KubeRay: what they call exists, and the nodes offer what the stack asks Ray for."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.stack_options import stack_config
from orchestrator.cli.up import up
from orchestrator.settings import StackConfig

yaml = pytest.importorskip("yaml")
FILE = Path(__file__).parents[2] / "docs" / "kuberay" / "triptych.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    (found,) = [part for part in yaml.safe_load_all(FILE.read_text()) if part["kind"] == "RayCluster"]
    return found["spec"]


def container(group: dict[str, Any], name: str) -> dict[str, Any]:
    return next(part for part in group["template"]["spec"]["containers"] if part["name"] == name)


def config_of(command: list[str]) -> StackConfig:
    assert command[:2] == ["triptych", "up"]
    options = up.make_context("up", command[2:]).params
    for name in ("state", "as_json", "restore", "warm_up"):
        options.pop(name)
    return stack_config(options)


def test_the_stacks_command_is_one_and_nodes_offer_what_it_asks_for(cluster: dict[str, Any]) -> None:
    stack = container(cluster["headGroupSpec"], "stack")
    config = config_of(stack["command"])
    (gpus,) = cluster["workerGroupSpecs"]
    offered = json.loads(json.loads(gpus["rayStartParams"]["resources"].replace("'", "")))
    assert offered == {config.ray_resource: 1}
    assert config.ray_scale == f"{gpus['minReplicas']}-{gpus['maxReplicas']}"
    assert config.ray == "auto"
    mounts = {mount["mountPath"] for mount in stack["volumeMounts"]}
    assert not mounts & {part.partition("=")[2] for part in stack["command"]}  # a volume's root is not a stack's own
    assert {e["name"]: e.get("value") for e in stack["env"]}["RAY_AUTH_MODE"] == "token"
    assert cluster["authOptions"]["mode"] == "token"


def test_no_secret_is_written_down(cluster: dict[str, Any]) -> None:
    (secret,) = [part for part in yaml.safe_load_all(FILE.read_text()) if part["kind"] == "Secret"]
    assert secret["stringData"] == {"auth_token": ""}
    assert secret["metadata"]["name"] == cluster["authOptions"]["secretName"]


def test_rays_version_is_the_pinned_one(cluster: dict[str, Any]) -> None:
    pinned = (FILE.parents[2] / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in pinned
