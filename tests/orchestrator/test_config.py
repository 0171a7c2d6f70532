"""Settings: each with a flag, each as it was given, flags over the file, and a word for what can't be."""

from pathlib import Path
from typing import Any

import click
import pytest

from orchestrator.cli.stack_options import flags_of, parameter, stack_config, stack_options
from orchestrator.config import load_config
from orchestrator.settings import JobSettings, OrchestratorSettings, StackConfig, StageConfig
from protocol.errors import BadRequest
from scripts.generate_docs import commands, configuration


def given(*arguments: str) -> StackConfig:
    """The configuration of a command line."""
    found: list[StackConfig] = []

    @click.command()
    @stack_options
    def command(**options: Any) -> None:
        found.append(stack_config(options))

    command.main([*arguments], standalone_mode=False)
    return found[0]


def test_without_flags_all_is_as_the_fields_say() -> None:
    assert given() == StackConfig()


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        (["--model", "m"], "model", "m"), (["-m", "m"], "model", "m"), (["--revision", "r"], "revision", "r"),
        (["--rest-after", "2m"], "rest_after", 120.0),
        (["--dtype", "float16"], "dtype", "float16"), (["--placement", "split"], "placement", "split"),
        (["--optimize", "latency"], "optimize", "latency"), (["--compile"], "compile", True),
        (["--attention", "flash"], "attention", "flash"), (["--fuse-qkv"], "fuse_qkv", True),
        (["--cache", "taylorseer"], "cache", "taylorseer"), (["--checkpoint", "off"], "checkpoint", None),
        (["--checkpoint", "2"], "checkpoint", 2.0), (["--plan-width", "512"], "width", 512),
        (["--plan-height", "512"], "height", 512), (["--plan-steps", "4"], "steps", 4),
        (["--queue-limit", "5"], "queue_limit", 5), (["--queue-bytes", "2GB"], "queue_bytes", 2 * 10**9),
        (["--disk-floor", "3MB"], "disk_floor", 3 * 10**6), (["--keep-jobs", "2h"], "keep_jobs", 7200.0),
        (["--keep-jobs", "forever"], "keep_jobs", None), (["--keep-pictures", "1KB"], "keep_pictures", 1000),
        (["--embedding-cache", "7B"], "embedding_cache", 7), (["--no-keep"], "keep", False),
        (["--patience", "9"], "patience", 9.0), (["--step-timeout", "8"], "step_timeout", 8.0),
        (["--client-jobs", "3"], "client_jobs", 3), (["--client-rate", "0.5"], "client_rate", 0.5),
        (["--listen", "tcp://h:1"], "listen", "tcp://h:1"), (["--listen-workers", "tcp://h:2"], "listen_workers", "tcp://h:2"),
        (["--budget", "0=1GB", "--budget", "1=all"], "gpus", {0: 10**9, 1: None}),
    ],
)  # fmt: skip
def test_each_flag_is_its_setting_and_no_other(flag: list[str], name: str, value: object) -> None:
    assert given(*flag) == StackConfig().model_copy(update={name: value})


@pytest.mark.parametrize(
    ("flag", "stages"),
    [
        (["--workers", "denoise=2"], {"denoise": {"workers": 2}}),
        (["--device", "text=cpu", "--device", "mps"],
         {"text": {"device": "cpu"}, "denoise": {"device": "mps"}, "vae": {"device": "mps"}}),
        (["--gpus", "denoise=0,1"], {"denoise": {"gpus": (0, 1)}}),
        (["--max-memory", "vae=1GB,2GB"], {"vae": {"max_memory": (10**9, 2 * 10**9)}}),
        (["--keep-alive", "text=3"], {"text": {"keep_alive": 3.0}}),
        (["--quantize", "text=int8"], {"text": {"quantize": "int8"}}),
    ],
)  # fmt: skip
def test_stages_have_settings_of_their_own(flag: list[str], stages: dict[str, Any]) -> None:
    assert given(*flag).stages == {stage: StageConfig(**values) for stage, values in stages.items()}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"controlnet": "c", "refiners": {"xl": "r"}}, "'xl' can't be chosen beside 'c'"),
        ({"refiner": "r", "controlnets": {"canny": "c"}}, "'canny' can't be chosen beside 'r'"),
        ({"controlnets": {"x": "c"}, "refiners": {"x": "r"}}, "'x' is the name of a ControlNet and of a refiner"),
        ({"controlnets": {"x": ""}}, "controlnets.x"),
        ({"models": {"a": {}}, "controlnets": {"x": "c"}}, "write it below"),
        ({"ray": "auto", "ray_scale": "8-2"}, "the first number is the smaller one"),
        ({"ray_scale": "0-2"}, "for the hosts of a Ray cluster"),
        ({"ray": "auto", "ray_scale": "some"}, "ray_scale"),
    ],
)
def test_what_can_not_be_chosen_is_told_before_anything_starts(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        load_config(None, settings, {})


def test_what_jobs_choose_is_a_model_of_its_own() -> None:
    models = {"a": {"model": "o/a", "controlnets": {"canny": "c"}}, "b": {"model": "o/b", "refiners": {"xl": "r"}}}
    found = load_config(None, {"models": models}, {}).each()
    assert list(found) == ["a", "a+canny", "b", "b+xl"]
    assert [one.controlnet for one in found.values()] == [None, "c", None, None]
    assert [one.refiner for one in found.values()] == [None, None, None, "r"]
    assert [one.model for one in found.values()] == ["o/a", "o/a", "o/b", "o/b"]


def test_every_setting_has_a_flag_and_a_meaning() -> None:
    for settings, without in ((StackConfig, {"stages", "models", "hosts", "http_qualities"}), (StageConfig, set())):
        flags = {name: (field, flag) for name, field, flag in flags_of(settings)}
        assert flags.keys() == settings.model_fields.keys() - without
        assert all(field.description for field, _ in flags.values())
        assert len({parameter(flag) for _, flag in flags.values()}) == len(flags)


def test_the_orchestrators_settings_are_those_of_the_stack() -> None:
    for name, field in JobSettings.model_fields.items():
        assert (
            OrchestratorSettings.model_fields[name].default == field.default == StackConfig.model_fields[name].default
        )


def test_several_models_have_settings_of_their_own_over_those_of_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(
        'dtype = "bfloat16"\nloras.ink = "i"\n[stages.text]\ndevice = "cpu"\nkeep_alive = 7\n'
        '[models.big]\nmodel = "owner/big"\nrevision = "r"\nsteps = 8\n'
        '[models.small]\ndtype = "float32"\nloras = {}\nrest_after = "1m"\nstages.text.keep_alive = 9\n'
    )
    found = load_config(path, {"steps": 4}, {}).each()
    assert list(found) == ["big", "small"]
    big, small = found["big"], found["small"]
    assert (big.model, big.revision, big.dtype, big.steps, big.loras) == ("owner/big", "r", "bfloat16", 8, {"ink": "i"})
    assert (small.model, small.revision, small.dtype, small.steps, small.loras) == ("small", None, "float32", 4, {})
    assert (big.rest_after, small.rest_after) == (None, 60.0)
    assert [(one.stage("text").device, one.stage("text").keep_alive) for one in found.values()] == [
        ("cpu", 7.0),
        ("cpu", 9.0),
    ]
    assert list(load_config(path, {"model": "small"}, {}).each()) == ["small", "big"]
    for one in found.values():
        assert one.each() == {one.model.rpartition("/")[2]: one}


@pytest.mark.parametrize(
    ("arguments", "models"),
    [
        (["-m", "owner/Big.1", "-m", "demo"], {"Big.1": "owner/Big.1", "demo": "demo"}),
        (["-m", "small=demo", "-m", "demo"], {"small": "demo", "demo": "demo"}),
        (["-m", "small=demo"], {"small": "demo"}),
        (["-m", "./a=b/c"], {"c": "./a=b/c"}),
        (["-m", "/models/my model/"], {"my-model": "/models/my model/"}),
        (["-m", "/models/own.safetensors"], {"own": "/models/own.safetensors"}),
    ],
)
def test_models_are_named_by_flags(arguments: list[str], models: dict[str, str]) -> None:
    assert {name: one.model for name, one in given(*arguments).each().items()} == models


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(BadRequest, match="Two models are called 'demo': a/demo and b/demo") as refused:
        given("-m", "a/demo", "-m", "b/demo")
    assert "--model NAME=b/demo" in refused.value.hint


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "stack.toml"
    path.write_text('model = "file"\nqueue_limit = 5\n[stages.text]\ndevice = "cpu"\nkeep_alive = 7\n')
    found = load_config(path, {"model": "flag"}, {"text": {"device": "mps"}})
    assert (found.model, found.queue_limit) == ("flag", 5)
    assert (found.stage("text").device, found.stage("text").keep_alive) == ("mps", 7.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modes = 'x'", "Known settings are"), ("models = 'x'", "'models' is not valid"),
        ("model = 'x'\n[models.a]", "none of the models a"), ("[models.'a b']", "letters, digits"),
        ("revision = 'r'\n[models.a]", "revision is a single model's"),
        ("[models.a]\nmode = 'x'", "Known settings are"),
        ("[models.a.stages.text]\ndevice = 'gpu'", "'gpu' is no device"),
        ("[models.a.stages.txt]\ndevice = 'cpu'", "there is no such stage"),
        ("[models.a.models.b]", "Known settings are"),
        ("[stages.txt]\ndevice = 'cpu'", "there is no such stage"),
        ("[stages.text]\ndevice = 'gpu'", "'gpu' is no device"), ("queue_limit = 0", "'queue_limit' is not valid"),
        ("keep_jobs = 'soon'", "is not a duration"), ("x = ", "is not valid TOML"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(text)
    with pytest.raises(BadRequest) as caught:
        load_config(path, {}, {})
    assert says in str(caught.value)


def test_the_reference_pages_are_what_the_code_says() -> None:
    docs = Path(__file__).parents[2] / "docs"
    assert (docs / "commands.md").read_text() == commands()
    assert (docs / "configuration.md").read_text() == configuration()


def test_what_is_said_of_this_hosts_gpus_is_not_said_of_others(tmp_path: Path) -> None:
    path = tmp_path / "stack.toml"
    path.write_text(
        'model = "m"\nhost_memory = "16GB"\n[gpus]\n0 = "8GB"\n'
        '[stages.denoise]\ndevice = "cuda:1"\nworkers = 2\nmax_memory = "7GB"\nkeep_alive = 5\n'
        '[hosts.box]\ngpus = {1 = "20GB"}\nhost_memory = "64GB"\n[hosts.box.stages]\nvae.workers = 0\n'
    )
    config = load_config(path, {}, {})
    box, other = config.on_host("box", 1, "bfloat16"), config.on_host("other", 32 * 10**9, "bfloat16")
    assert (box.gpus, box.host_memory, box.stage("vae").workers) == ({1: 20 * 10**9}, 64 * 10**9, 0)
    assert (other.gpus, other.host_memory, other.stage("vae").workers) == ({}, 32 * 10**9, None)
    denoise = other.stage("denoise")
    assert (denoise.device, denoise.workers, denoise.max_memory, denoise.keep_alive) == ("cuda", None, (), 5.0)
    path.write_text("[hosts.box]\ngpu = 1\n")
    with pytest.raises(BadRequest, match=r"hosts\.box\.gpu"):
        load_config(path, {}, {})
