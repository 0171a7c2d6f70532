"""A stack's settings: flags over TRIPTYCH_* variables over a TOML file over these defaults.

model = "black-forest-labs/FLUX.1-dev"
dtype = "bfloat16"

[gpus]
0 = "16GB"
1 = "all"

[stages.text]
gpus = [1]

[stages.denoise]
gpus = [0]
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.functional_validators import BeforeValidator

from protocol.curve_keys import Role
from protocol.errors import BadRequest
from protocol.speedups import canonical
from protocol.stages import STAGES, Stage
from protocol.units import parse_bytes, parse_seconds


def _bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


def _amounts(value: object) -> object:
    """'15GB,12GB', '16GB', or a list of such."""
    return tuple(value.split(",")) if isinstance(value, str) else value


def _budget(value: object) -> object:
    return None if value == "all" else _bytes(value)


def _seconds(value: object) -> object:
    return None if value == "forever" else value


def _duration(value: object) -> object:
    value = _seconds(value)
    return parse_seconds(value) if isinstance(value, str) else value


def _or_off(value: object) -> object:
    return None if value == "off" else value


Duration = Annotated[Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, BeforeValidator(_duration)]
SecondsOrOff = Annotated[Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, BeforeValidator(_or_off)]
Seconds = Annotated[
    Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, BeforeValidator(_seconds)  # None: forever
]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]

Budget = Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(_budget)]  # None: all that is free
Amounts = Annotated[tuple[Bytes, ...], BeforeValidator(_amounts)]
Device = Annotated[str, Field(pattern=r"^(auto|mps|cuda(:\d+)?|cpu(:\d+(,\d+)*)?)$")]
Placement = Literal["auto", "replicas", "split", "tensor", "context"]
Optimize = Literal["throughput", "latency"]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageConfig(Settings):
    """How one stage is run."""

    workers: Annotated[int, Field(ge=0, le=1024)] | None = None  # None: as the placement says
    device: Device = "auto"  # auto, cpu, mps, cuda, cuda:N; cpu:0,1 is a CPU that plays GPUs 0 and 1, with budgets
    gpus: Annotated[tuple[int, ...], Field(min_length=1)] | None = None  # None: those that the plan chooses
    max_memory: Amounts = ()  # of each GPU for itself: one for all, or one each; none: as the plan says
    quantize: str = ""  # int8, int8-dynamic, fp8 or fp8-dynamic, of text and denoise
    keep_alive: Seconds = None  # how long a lease is kept when there is nothing to do: "forever", 0, or seconds


class StackConfig(Settings):
    model: str = "demo"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    queue_limit: Annotated[int, Field(ge=1)] = 10_000  # unfinished jobs
    queue_bytes: Bytes = 20_000_000_000  # that unfinished jobs may hold on disk
    disk_floor: Bytes = 1_000_000_000  # left on the disk, below which no jobs are taken
    keep_jobs: Duration = 30 * 86400.0  # how long to remember ended jobs: "30d", or "forever"
    checkpoint: SecondsOrOff = 0.1  # between two checkpoints of a denoising job at least; 0: every step; or "off"
    step_timeout: Annotated[float, Field(gt=0)] = 600.0  # seconds at one step, after which a worker counts as hung
    embedding_cache: Bytes = 1_000_000_000  # on disk
    keep_pictures: Bytes = 4_000_000_000  # on disk; the oldest go first
    client_jobs: Annotated[int, Field(ge=1)] = 1000  # unfinished ones of one key
    client_rate: Annotated[float, Field(gt=0)] = 10.0  # jobs a second of one key, a minute's worth at once
    keep: bool = True  # False: nothing outlives the orchestrator; to measure what keeping costs
    listen: str | None = None  # tcp://HOST:PORT for clients, beside the private socket
    listen_workers: str | None = None  # the same for workers on other hosts
    gpus: dict[int, Budget] = Field(default_factory=dict)  # the stack's budgets; others: all that is free
    patience: Annotated[float, Field(gt=0)] = 30.0  # seconds that a task waits for those whose turn it is
    compile: bool = False  # the denoiser's blocks
    attention: str = ""  # a backend of diffusers, for the denoiser
    cache: str = ""  # a step cache of diffusers, for the denoiser: first-block[:THRESHOLD], taylorseer, …
    fuse_qkv: bool = False  # of the denoiser
    placement: Placement = "auto"  # of the denoiser: one a GPU, its layers over all, or all GPUs at one job
    optimize: Optimize = "throughput"  # what auto is to choose for: pictures an hour, or the time of one
    width: Annotated[int, Field(ge=1)] | None = None  # pixels, of the pictures that it is planned for
    height: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    stages: dict[Stage, StageConfig] = Field(default_factory=dict)

    def speedups(self) -> tuple[str, ...]:
        """All that may change a picture's bits, as speedups.py writes it; BadRequest."""
        denoiser = {
            "compile": self.compile, "fuse-qkv": self.fuse_qkv,
            f"attention={self.attention}": self.attention, f"cache={self.cache}": self.cache,
        }  # fmt: skip
        found = [f"denoise:{text}" for text, wanted in denoiser.items() if wanted]
        found += [f"{name}:quantize={kind}" for name in STAGES if (kind := self.stage(name).quantize)]
        return canonical(found)

    def stage(self, stage: Stage) -> StageConfig:
        return self.stages.get(stage, StageConfig())


class AccountSettings(Settings):
    """A GPU whose memory is leased to workers."""

    budget: Annotated[int, Field(gt=0)]  # bytes, for those that work in leases
    foreign: int = 0  # bytes in use before the stack came
    kept: int = 0  # bytes beside the budget, that other workers of the stack keep for themselves
    name: str = ""  # as its driver calls it
    driver: bool = True  # whether a driver counts what is in use


class OrchestratorSettings(Settings):
    """What the supervisor gives the orchestrator's process."""

    queue_limit: int = 10_000
    queue_bytes: int = 20_000_000_000
    disk_floor: int = 1_000_000_000
    embedding_cache: int = 1_000_000_000
    keep_pictures: int = 4_000_000_000
    keep_jobs: float | None = 30 * 86400.0  # seconds; None: for ever
    patience: float = 30.0
    fixed: dict[Stage, int] = Field(default_factory=dict)  # workers at most of stages whose memory is planned
    step_seconds: float = 600.0
    client_jobs: int = 1000  # unfinished ones of one key
    client_rate: float = 10.0  # jobs a second of one key, a minute's worth at once
    keep: bool = True  # False: nothing outlives the process; to measure what keeping costs
    describer: bool = False  # a process without weights looks at the model and at prompts before jobs are taken
    listen: str | None = None
    listen_workers: str | None = None
    keep_alive: dict[Stage, float] = Field(default_factory=dict)  # in seconds; none for ever
    gpus: dict[int, AccountSettings] = Field(default_factory=dict)

    def remote(self) -> list[tuple[Role, str]]:
        """TCP endpoints by who may come to them."""
        wanted: list[tuple[Role, str | None]] = [("client", self.listen), ("worker", self.listen_workers)]
        return [(role, endpoint) for role, endpoint in wanted if endpoint]


def load_config(path: Path | None, flags: dict[str, Any], stage_flags: dict[Stage, dict[str, Any]]) -> StackConfig:
    """The settings of a file, with flags laid over it; BadRequest names the entry that is wrong."""
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise BadRequest(f"The configuration {str(path)!r} can't be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise BadRequest(f"The configuration {str(path)!r} is not UTF-8 text.", "Save it as UTF-8.") from error
        except tomllib.TOMLDecodeError as error:
            raise BadRequest(f"The configuration {str(path)!r} is not valid TOML: {error}.") from error
    data |= flags
    stages = data.setdefault("stages", {})
    for stage, values in stage_flags.items():
        if isinstance(stages, dict) and isinstance(stages.setdefault(stage, {}), dict):
            stages[stage] |= values
    try:
        return StackConfig.model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        fits = _fits(fault["type"], where)
        if where.startswith("stages.") and where.endswith(".[key]"):
            where, fault["msg"] = where.removesuffix(".[key]"), "there is no such stage"
            fits = f"Stages are {', '.join(STAGES)}."
        if where.endswith("device"):
            fault["msg"], fits = f"{fault['input']!r} is no device", "Write auto, cpu, cuda, cuda:0 or mps."
        raise BadRequest(f"The setting {where!r} is not valid: {fault['msg']}.", fits) from error


def _fits(kind: str, where: str) -> str:
    if kind != "extra_forbidden":
        return ""
    of_stage = where.startswith("stages.") and where.count(".") > 1
    known = (StageConfig if of_stage else StackConfig).model_fields
    return f"Known settings are {', '.join(known)}."


def parse_stage_values(option: str, values: tuple[str, ...], every_stage: bool) -> dict[Stage, str]:
    """'denoise=2' gives one stage a value; a bare value, where allowed, gives it to all three."""
    found: dict[Stage, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals and every_stage:
            found |= {stage: value for stage in STAGES if stage not in found}
        elif equals and name in STAGES and rest:
            found[name] = rest
        else:
            shape = f"{option} STAGE=VALUE" + (f" or {option} VALUE" if every_stage else "")
            raise BadRequest(
                f"{option} {value!r} is not right.", f"Write {shape}, with STAGE one of {', '.join(STAGES)}."
            )
    return found
