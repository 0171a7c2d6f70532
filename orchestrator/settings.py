"""A stack's settings: each with its type, default, meaning and flag, once. Flags and docs are generated from here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.functional_validators import BeforeValidator

from protocol.curve_keys import NAME, DoorRole
from protocol.model_spec import PARTS, Choice, ModelName, ModelSpec, name_of, with_added
from protocol.sockets import is_loopback_host
from protocol.speedups import MOST_BATCH, canonical
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


def _numbers(value: object) -> object:
    return tuple(value.split(",")) if isinstance(value, str) else value


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Duration = Annotated[NotNegative | None, BeforeValidator(_duration)]  # seconds; None: for ever
SecondsOrOff = Annotated[NotNegative | None, BeforeValidator(_or_off)]
Seconds = Annotated[NotNegative | None, BeforeValidator(_seconds)]  # None: for ever
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]
Budget = Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(_budget)]  # bytes; None: all that is free
Amounts = Annotated[tuple[Bytes, ...], BeforeValidator(_amounts)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(_numbers), Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Batch = Annotated[int, Field(ge=2, le=MOST_BATCH)]
Device = Annotated[str, Field(pattern=r"^(auto|mps|cuda(:\d+)?|cpu(:\d+(,\d+)*)?)$")]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
HostName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]  # of its key
Given = Annotated[str, Field(min_length=1)]  # a folder, a file or a hub id
Placement = Literal["auto", "replicas", "split", "tensor", "context"]
Optimize = Literal["throughput", "latency"]


@dataclass(frozen=True, slots=True)
class Flag:
    """A setting's flag on the command line; `default` is what its help says where that isn't the field's own."""

    option: str
    metavar: str = ""
    default: str = ""
    short: str = ""
    bare: bool = False  # of a stage's setting: a value without STAGE= is meant for all three


CHOICES = {"controlnets": "controlnet", "refiners": "refiner"}  # tables of what jobs choose among: what each is


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageConfig(Settings):
    """The settings of one stage."""

    workers: Annotated[
        Annotated[int, Field(ge=0, le=1024)] | None,
        Field(description="Workers of a stage."),
        Flag("--workers", "STAGE=N", "as the placement says"),
    ] = None
    device: Annotated[
        Device,
        Field(description="cpu, cuda, mps or auto; cpu:0,1 is a CPU that plays GPUs 0 and 1, which have budgets."),
        Flag("--device", "[STAGE=]DEVICE", bare=True),
    ] = "auto"
    gpus: Annotated[
        Numbers | None,
        Field(description="The GPUs that all stages or one may use."),
        Flag("--gpus", "[STAGE=]0,1", "those that the plan chooses", bare=True),
    ] = None
    max_memory: Annotated[
        Amounts,
        Field(description="The most to use of each GPU: one amount for all, or one each."),
        Flag("--max-memory", "[STAGE=]16GB[,…]", "as the plan says", bare=True),
    ] = ()
    quantize: Annotated[
        str,
        Field(description="torchao's int8, int8-dynamic, fp8, fp8-dynamic of text or denoise. Tier: approximate."),
        Flag("--quantize", "STAGE=KIND", "no"),
    ] = ""
    keep_alive: Annotated[
        Seconds,
        Field(description="Let go of its GPU's memory after so long without work."),
        Flag("--keep-alive", "[STAGE=]SECONDS", "forever", bare=True),
    ] = None


class JobSettings(Settings):
    """Settings by which the orchestrator takes, keeps and ends jobs."""

    queue_limit: Annotated[
        Positive, Field(description="Unfinished jobs that are taken."), Flag("--queue-limit", "N")
    ] = 10_000
    queue_bytes: Annotated[
        Bytes, Field(description="Bytes on disk that unfinished jobs may hold."), Flag("--queue-bytes", "SIZE", "20GB")
    ] = 20_000_000_000
    disk_floor: Annotated[
        Bytes,
        Field(description="Take no jobs where the disk has less left than this."),
        Flag("--disk-floor", "SIZE", "1GB"),
    ] = 1_000_000_000
    keep_jobs: Annotated[
        Duration, Field(description="How long to remember ended jobs."), Flag("--keep-jobs", "30d|forever", "30d")
    ] = 30 * 86400.0
    keep_pictures: Annotated[
        Bytes,
        Field(description="Bytes on disk for finished pictures; the oldest go first."),
        Flag("--keep-pictures", "SIZE", "4GB"),
    ] = 4_000_000_000
    embedding_cache: Annotated[
        Bytes,
        Field(description="Bytes on disk for the embeddings of prompts, for when they come again."),
        Flag("--embedding-cache", "SIZE", "1GB"),
    ] = 1_000_000_000
    lora_cache: Annotated[
        Bytes,
        Field(description="Bytes on disk for LoRAs that clients have sent; the oldest go first."),
        Flag("--lora-cache", "SIZE", "8GB"),
    ] = 8_000_000_000
    share_cache: Annotated[
        bool,
        Field(description="Keys share embeddings: a prompt is encoded once, and who asks can tell that it was."),
        Flag("--share-cache"),
    ] = False
    keep: Annotated[
        bool,
        Field(description="Keep jobs and pictures on disk; without, nothing outlives the orchestrator."),
        Flag("--keep"),
    ] = True
    patience: Annotated[
        float,
        Field(gt=0, description="Seconds that a task waits for workers of its GPU whose turn it is."),
        Flag("--patience", "SECONDS"),
    ] = 30.0
    step_timeout: Annotated[
        float,
        Field(gt=0, description="After so many seconds at one step a worker counts as hung."),
        Flag("--step-timeout", "SECONDS", "600, or less once known"),
    ] = 600.0
    client_jobs: Annotated[
        Positive, Field(description="Unfinished jobs of one client's key."), Flag("--client-jobs", "N")
    ] = 1000
    client_rate: Annotated[
        float,
        Field(gt=0, description="Jobs a second of one client's key, a minute's worth at once."),
        Flag("--client-rate", "N"),
    ] = 10.0
    listen: Annotated[
        str | None,
        Field(description="For clients elsewhere; needs keys unless HOST is 127.0.0.1."),
        Flag("--listen", "tcp://HOST:PORT", "private"),
    ] = None
    listen_workers: Annotated[
        str | None,
        Field(description="The same for workers on other hosts."),
        Flag("--listen-workers", "tcp://HOST:PORT", "private"),
    ] = None

    def remote(self) -> list[tuple[DoorRole, str]]:
        """TCP endpoints by who may come to them."""
        wanted: list[tuple[DoorRole, str | None]] = [("client", self.listen), ("worker", self.listen_workers)]
        return [(role, endpoint) for role, endpoint in wanted if endpoint]


class Quality(Settings):
    """The meaning of a word for quality in a request: steps, as a part of the model's own, and another model."""

    steps: Annotated[float, Field(gt=0, le=10, description="Times the model's own number of steps.")] = 1.0
    model: Annotated[str | None, Field(description="A model of the stack, in place of the default one.")] = None


QUALITIES = {
    "low": Quality(steps=0.5), "medium": Quality(steps=0.75), "xhigh": Quality(steps=1.5), "max": Quality(steps=2.0)
}  # fmt: skip


class HttpSettings(Settings):
    """Settings of the HTTP process, which serves browsers and the APIs that other programs speak."""

    http: Annotated[
        Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]+):\d{1,5}$")] | None,
        Field(description="Serve a page and HTTP APIs there; needs keys unless HOST is the loopback address."),
        Flag("--http", "HOST:PORT", "no"),
    ] = None
    http_keys: Annotated[
        Literal["auto", "required"],
        Field(description="Who comes by HTTP needs a key: unless HOST is the loopback address, or always."),
        Flag("--http-keys"),
    ] = "auto"
    http_hosts: Annotated[
        tuple[str, ...],
        Field(description="Names by which the HTTP process may be called, beside those of the loopback address."),
        Flag("--http-host", "NAME", "none"),
    ] = ()
    http_origins: Annotated[
        tuple[str, ...],
        Field(description="Other sites whose pages may call the HTTP process from a browser."),
        Flag("--http-origin", "https://HOST[:PORT]", "none"),
    ] = ()
    http_certificate: Annotated[
        Path | None,
        Field(description="TLS certificate with its chain, PEM."),
        Flag("--http-certificate", "FILE", "no TLS"),
    ] = None
    http_private_key: Annotated[
        Path | None,
        Field(description="The certificate's private key, PEM."),
        Flag("--http-private-key", "FILE", "in the certificate's file"),
    ] = None
    http_body: Annotated[
        Bytes, Field(description="Bytes of a request's body at most."), Flag("--http-body", "SIZE", "100MB")
    ] = 100_000_000
    http_rate: Annotated[
        float,
        Field(gt=0, description="Requests a second by HTTP of one key or address, ten seconds' worth at once."),
        Flag("--http-rate", "N"),
    ] = 50.0
    http_qualities: Annotated[
        dict[str, Quality], Field(description="What words for quality mean, each a table with `steps` and `model`.")
    ] = Field(default_factory=lambda: dict(QUALITIES))

    @property
    def http_host(self) -> str:
        """The host at which HTTP is served, without its port; empty where it isn't."""
        return (self.http or "").rpartition(":")[0].strip("[]")

    @property
    def http_needs_keys(self) -> bool:
        """Return whether whoever comes by HTTP needs a key."""
        return self.http_keys == "required" or not is_loopback_host(self.http_host)


class RaySettings(Settings):
    """Settings of the process that has a Ray cluster's hosts work for the stack."""

    ray: Annotated[
        Given | None,
        Field(description="Have the hosts of a Ray cluster work for the stack; auto: the cluster of this machine."),
        Flag("--ray", "auto|HOST:PORT", "no"),
    ] = None
    ray_hosts: Annotated[
        tuple[str, ...],
        Field(description="Of the cluster's hosts these only, by the names of their machines."),
        Flag("--ray-host", "NAME", "all"),
    ] = ()
    ray_labels: Annotated[
        dict[str, str],
        Field(description="Of the cluster's hosts those only whose nodes have these labels."),
        Flag("--ray-label", "NAME=VALUE", "all"),
    ] = Field(default_factory=dict)
    ray_scale: Annotated[
        str | None,
        Field(
            description="Have Ray's autoscaler bring hosts and take them away, as the work is worth it: from how many "
            "to how many, such as 0-8. Their nodes offer --ray-resource.",
            pattern=r"^[0-9]{1,4}-[0-9]{1,4}$",
        ),
        Flag("--ray-scale", "LEAST-MOST", "no"),
    ] = None
    ray_resource: Annotated[
        Given,
        Field(description="The custom resource that nodes offer which are to come and go with --ray-scale."),
        Flag("--ray-resource", "NAME"),
    ] = "triptych"

    @model_validator(mode="after")
    def _scales_a_cluster(self) -> "RaySettings":
        if self.ray_scale:
            least, most = self.scale_limits
            if least > most:
                raise ValueError(f"ray_scale is {self.ray_scale!r}: the first number is the smaller one")
            if not self.ray:
                raise ValueError("ray_scale is for the hosts of a Ray cluster, which ray names")
        return self

    @property
    def scale_limits(self) -> tuple[int, int]:
        """Return how many hosts --ray-scale wants at least, and at most; 0 and 0 without it."""
        least, _, most = (self.ray_scale or "0-0").partition("-")
        return int(least), int(most)


class ModelConfig(Settings):
    """All that a person may say of a model and of the workers that run it."""

    model: Annotated[
        str,
        Field(description="A folder, a hub id, a .safetensors file, or demo (draws shapes). Several: of one stack."),
        Flag("--model", "[NAME=]MODEL", short="-m"),
    ] = "demo"
    revision: Annotated[
        str | None,
        Field(description="Branch, tag or commit of a hub model."),
        Flag("--revision", "REVISION", "the newest"),
    ] = None
    base: Annotated[
        str | None,
        Field(description="Of a model that is one file: the model whose configuration it goes by."),
        Flag("--base", "MODEL", "by the file's tensors, as diffusers finds it"),
    ] = None
    controlnet: Annotated[
        str | None,
        Field(description="A ControlNet for jobs with a control image: a folder or a hub id."),
        Flag("--controlnet", "MODEL", "none"),
    ] = None
    controlnets: Annotated[
        dict[ModelName, Given],
        Field(description="Names of ControlNets that jobs choose among, each with its folder or hub id."),
        Flag("--controlnet-alias", "NAME=MODEL", "none"),
    ] = Field(default_factory=dict)
    refiner: Annotated[
        str | None,
        Field(description="A refiner (SDXL) that makes the last steps of all pictures: a folder or a hub id."),
        Flag("--refiner", "MODEL", "none"),
    ] = None
    refiners: Annotated[
        dict[ModelName, Given],
        Field(description="Names of refiners that jobs choose among, each with its folder or hub id."),
        Flag("--refiner-alias", "NAME=MODEL", "none"),
    ] = Field(default_factory=dict)
    ip_adapter: Annotated[
        str | None,
        Field(description="An IP-Adapter's weights (safetensors); its image_encoder is beside it, or the model's own."),
        Flag("--ip-adapter", "FILE|OWNER/NAME/FILE", "none"),
    ] = None
    transformer: Annotated[
        str | None,
        Field(description="The denoiser's weights in one file (safetensors, GGUF), in place of the model's own."),
        Flag("--transformer", "FILE|OWNER/NAME/FILE", "the model's own"),
    ] = None
    lora_folder: Annotated[
        str | None,
        Field(description="A folder of LoRAs (safetensors), which jobs name as their files are called."),
        Flag("--loras", "DIR", "none"),
    ] = None
    loras: Annotated[
        dict[str, str],
        Field(description="Names of LoRAs, each with its file, or OWNER/NAME[:FILE] on the hub."),
        Flag("--lora-alias", "NAME=FILE", "none"),
    ] = Field(default_factory=dict)
    dtype: Annotated[
        Dtype, Field(description="Of all stages."), Flag("--dtype", default="bfloat16 on GPUs, float32 on the CPU")
    ] = "auto"
    placement: Annotated[
        Placement,
        Field(
            description="Of the denoiser: replicas (one a GPU), split (its layers over all GPUs), tensor or context "
            "(all GPUs at one job; tier: numeric)."
        ),
        Flag("--placement", default="auto, by the plan"),
    ] = "auto"
    compile: Annotated[bool, Field(description="Compile the denoiser's blocks. Tier: numeric."), Flag("--compile")] = (
        False
    )
    cuda_graphs: Annotated[
        bool,
        Field(description="Launch a step's kernels at once where the GPU waits for the host. Same bits."),
        Flag("--cuda-graphs"),
    ] = True
    attention: Annotated[
        str,
        Field(description="diffusers' attention backend: _native_cudnn, flash … Tier: numeric, of sage approximate."),
        Flag("--attention", "BACKEND", "diffusers' own"),
    ] = ""
    fuse_qkv: Annotated[
        bool, Field(description="Query, key, value in one product. Tier: numeric."), Flag("--fuse-qkv")
    ] = False
    cache: Annotated[
        str,
        Field(description="diffusers' step cache: first-block[:0.05], taylorseer … Tier: approximate."),
        Flag("--cache", "KIND", "none"),
    ] = ""
    batch: Annotated[
        Batch | None,
        Field(description="Waiting jobs of one size and number of steps are denoised together. Tier: numeric."),
        Flag("--batch", "JOBS", "one by one"),
    ] = None
    width: Annotated[
        Positive | None,
        Field(description="Width of the pictures that the stack is planned for, in pixels."),
        Flag("--plan-width", "PIXELS", "the model's own"),
    ] = None
    height: Annotated[
        Positive | None, Field(description="Their height."), Flag("--plan-height", "PIXELS", "the model's own")
    ] = None
    steps: Annotated[
        Positive | None, Field(description="Their denoising steps."), Flag("--plan-steps", "N", "the model's own")
    ] = None
    cfg_scale: Annotated[
        NotNegative | None,
        Field(description="Their scale of true classifier-free guidance: above 1, two passes a step."),
        Flag("--plan-cfg-scale", "NUMBER", "the model's own"),
    ] = None  # fmt: skip
    frames: Annotated[
        Positive | None, Field(description="Frames of a video."), Flag("--plan-frames", "N", "the model's own")
    ] = None
    rest_after: Annotated[
        Duration,
        Field(description="Without a job of it for so long a model's processes end, until it is asked for again."),
        Flag("--rest-after", "10m|forever", "forever"),
    ] = None
    stages: dict[Stage, StageConfig] = Field(default_factory=dict)

    def model_spec(self) -> ModelSpec:
        """Return what its workers are to load."""
        return ModelSpec(name=self.model, **{part: getattr(self, part) for part in PARTS})

    def speedups(self) -> tuple[str, ...]:
        """Return all that may change a picture's bits, as speedups.py writes it; BadRequest."""
        denoiser = {
            "compile": self.compile, "fuse-qkv": self.fuse_qkv,
            f"attention={self.attention}": self.attention, f"cache={self.cache}": self.cache,
            f"batch={self.batch}": self.batch,
        }  # fmt: skip
        found = [f"denoise:{text}" for text, wanted in denoiser.items() if wanted]
        found += [f"{name}:quantize={kind}" for name in STAGES if (kind := self.stage(name).quantize)]
        return canonical(found)

    def stage(self, stage: Stage) -> StageConfig:
        return self.stages.get(stage, StageConfig())


class HostConfig(Settings):
    """The settings of another host of the stack's, which differ from the stack's own."""

    gpus: Annotated[
        dict[int, Budget],
        Field(description="The most that the stack may use of a GPU there, contexts included."),
    ] = Field(default_factory=dict)
    host_memory: Annotated[
        Bytes | None, Field(description="The most of that host's memory that the stack may use.")
    ] = None
    models: Annotated[
        tuple[ModelName, ...] | None, Field(description="The stack's models that run there, by name.")
    ] = None
    stages: Annotated[
        dict[Stage, StageConfig], Field(description="Settings of stages there: workers, device, gpus, max_memory.")
    ] = Field(default_factory=dict)


class StackConfig(JobSettings, HttpSettings, RaySettings, ModelConfig):
    """All that a person may say of a stack."""

    optimize: Annotated[Optimize, Field(description="What auto is to choose for."), Flag("--optimize")] = "throughput"
    gpus: Annotated[
        dict[int, Budget],
        Field(description="The most that the stack may use of a GPU, contexts included."),
        Flag("--budget", "[GPU=]16GB", "all that is free"),
    ] = Field(default_factory=dict)
    host_memory: Annotated[
        Bytes | None,
        Field(description="The most of this host's memory that the stack may use; weights beyond it are read anew."),
        Flag("--host-memory", "32GB", "all that is free"),
    ] = None
    checkpoint: Annotated[
        SecondsOrOff,
        Field(description="Seconds between two checkpoints of a denoising job at least; 0: every step."),
        Flag("--checkpoint", "SECONDS|off"),
    ] = 0.1
    models: dict[ModelName, ModelConfig] = Field(default_factory=dict)
    hosts: dict[HostName, HostConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_models(self) -> "StackConfig":
        """Check what is said beside several models, of which `model` is then the default one's name."""
        given = self.model_fields_set
        if self.models and "model" in given and self.model not in self.models:
            raise ValueError(f"model is {self.model!r}, which is none of the models {', '.join(self.models)}")
        if self.models and (own := [part for part in (*PARTS, *CHOICES) if part in given]):
            raise ValueError(f"{own[0]} is a single model's: write it below [models.NAME]")
        for model in (self, *self.models.values()):
            if twice := [name for name in model.controlnets if name in model.refiners]:
                raise ValueError(f"{twice[0]!r} is the name of a ControlNet and of a refiner")
            if model.refiners and (beside := model.controlnet or model.ip_adapter):
                raise ValueError(f"the refiner {next(iter(model.refiners))!r} can't be chosen beside {beside!r}")
            if model.controlnets and (beside := model.refiner):
                raise ValueError(f"the ControlNet {next(iter(model.controlnets))!r} can't be chosen beside {beside!r}")
        return self

    def each(self) -> dict[str, "StackConfig"]:
        """Return the configuration of each model as if it were alone, by its name; the default one comes first.

        A model with a ControlNet or a refiner that jobs choose is one of its own.
        """
        if not self.models:
            return self._with_choices(name_of(self.model))
        found = {name: self._alone(name, own) for name, own in self.models.items()}
        default = self.model if "model" in self.model_fields_set else next(iter(found))
        found = {default: found[default], **found}
        return {full: one for name, alone in found.items() for full, one in alone._with_choices(name).items()}

    def _with_choices(self, name: str) -> dict[str, "StackConfig"]:
        """Return the configuration of a model alone, and with each of those that its jobs choose among, by name."""
        plain = self.model_copy(update={choices: {} for choices in CHOICES})
        chosen = {
            with_added(name, alias): plain.model_copy(update={part: given})
            for choices, part in CHOICES.items()
            for alias, given in getattr(self, choices).items()
        }
        return {name: plain, **chosen}

    def _alone(self, name: str, own: ModelConfig) -> "StackConfig":
        """Return what holds for a model: its own settings, where it has none those of the stack."""
        given = {field: getattr(own, field) for field in own.model_fields_set}
        stages = dict(self.stages)
        for stage, settings in own.stages.items():
            said = {field: getattr(settings, field) for field in settings.model_fields_set}
            stages[stage] = self.stage(stage).model_copy(update=said)
        # What is the stack's only model's, where it has but one, is no other's.
        parts = dict.fromkeys(PARTS) | {choices: {} for choices in CHOICES}
        return self.model_copy(update=parts | {"model": name} | given | {"stages": stages, "models": {}})

    def on_host(self, name: str, memory: int, dtype: str) -> "StackConfig":
        """Return the configuration of a model on another host, which has so many bytes of memory, in a dtype.

        What is said of this host's GPUs and numbers of workers is not said of others.
        """
        own, stages = self.hosts.get(name, HostConfig()), {}
        for stage in STAGES:
            here, there = self.stage(stage), own.stages.get(stage, StageConfig())
            kind = here.device.partition(":")[0]
            plain = StageConfig(device=kind, quantize=here.quantize, keep_alive=here.keep_alive)
            said = {field: getattr(there, field) for field in there.model_fields_set}
            stages[stage] = plain.model_copy(update=said)
        given = {"gpus": own.gpus, "host_memory": own.host_memory or memory, "stages": stages, "dtype": dtype}
        return self.model_copy(update=given)

    def beside(self, name: str, spec: ModelSpec) -> "StackConfig":
        """Return the configuration of a model that comes to a running stack, as if it were alone."""
        given = {part: value for part in PARTS if (value := getattr(spec, part)) is not None}
        return self._alone(name, ModelConfig(model=spec.name, **given))


class AccountSettings(Settings):
    """A GPU whose memory is leased to workers."""

    budget: Annotated[int, Field(gt=0)]  # bytes, for those that work in leases
    foreign: int = 0  # bytes in use before the stack came
    kept: int = 0  # bytes beside the budget, that other workers of the stack keep for themselves
    name: str = ""  # as its driver calls it
    driver: bool = True  # whether a driver counts what is in use


class ModelSettings(Settings):
    """A model of the stack, as the orchestrator has to know it."""

    name: str = ""  # by which jobs name it; empty where a stack has but one, and was started without a supervisor
    model: str = ""  # a folder, or a hub id
    chosen: Choice | None = None  # what its jobs have chosen to be added to another model
    fixed: dict[Stage, int] = Field(default_factory=dict)  # workers at most of stages whose memory is planned
    keep_alive: dict[Stage, float] = Field(default_factory=dict)  # in seconds; none for ever
    rest_after: float | None = None  # seconds without a job of it; None: never


class OrchestratorSettings(JobSettings):
    """The settings of jobs, and what the supervisor has planned."""

    models: tuple[ModelSettings, ...] = (ModelSettings(),)  # the default one comes first
    gpus: dict[int, AccountSettings] = Field(default_factory=dict)  # of this host, by the driver's numbers
    describer: bool = False  # processes without weights look at models and at prompts before jobs are taken


class OrchestratorSpec(Settings):
    """All that the orchestrator's process is started with."""

    state: Path
    clients: str  # endpoint
    workers: str  # endpoint
    doors: dict[DoorRole, str] = Field(default_factory=dict)  # endpoints where the doors for others come to
    guarded: bool = False  # those want keys
    settings: OrchestratorSettings


class HttpSpec(Settings):
    """All that the HTTP process is started with."""

    state: Path
    endpoint: str  # of the orchestrator's for clients
    socket: int  # descriptor of the listening socket
    settings: HttpSettings


class RaySpec(Settings):
    """All that the process that launches on a Ray cluster is started with."""

    state: Path
    settings: RaySettings


class DoorSpec(Settings):
    """All that a door's process is started with."""

    state: Path
    role: DoorRole
    inside: str  # endpoint of the orchestrator's for it
    guarded: bool = False  # it wants keys
