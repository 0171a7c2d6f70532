"""A job run on shapes alone: its pipeline's own code, with every model on the meta device, where nothing is computed.

What comes out are bytes and floating-point operations, of each stage and of each block of the denoiser.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from protocol.job import Recipe
from protocol.model_profile import BlockProfile, StageProfile
from protocol.stages import FIRST, STAGES, Stage
from protocol.tensors import Tensor
from workers.models.loading import install_boundaries, is_quantized, stored_bytes
from workers.models.skeleton import build_skeleton, on_meta
from workers.models.source import BITSANDBYTES, Source, quantization_method, stages_of
from workers.profile import guess
from workers.profile.live_bytes import LiveBytes
from workers.replay.boundaries import Stopped, install_component
from workers.replay.call_record import CallRecord
from workers.replay.placeholder import of_the_same_name
from workers.replay.values import DISTRIBUTIONS
from workers.stages.pipeline_call import arguments_of, new_run, until_stop
from workers.tensors import DTYPES
from workers.weights.forward_trace import LEAST_SHARE, MOST_ROWS, Call, around_blocks, standing_in
from workers.weights.lockstep import FirstStep
from workers.weights.loose_tensors import LooseTensors
from workers.weights.modulation import SLOTS
from workers.weights.residency import block_rows, streamable
from workers.weights.streaming import Block, least_bytes, room

Decodes = list[tuple[str, Any]]  # that a denoising has prepared, see Run
MOST_VISITS = 8
MOST_CONDITIONS = 10_000  # of one run of a model
MASKS = "attention_mask"  # name of an encoder's argument
META, HERE = torch.device("meta"), torch.device("cpu")


@dataclass(slots=True)
class Seen:
    """The operations that a stage's models were seen to do."""

    runs: int = 0
    flop: float = 0.0  # of all runs
    known: dict[Any, tuple[float, Any]] = field(default_factory=dict)  # FLOP and result, on shapes, of like runs
    largest: int = 0  # bytes, of what goes into a layer or comes out of it
    by_module: dict[str, float] = field(default_factory=dict)  # FLOP of one run by name
    few_rows: set[str] = field(default_factory=set)  # linear layers that got but a few rows
    steps: dict[str, FirstStep] = field(default_factory=dict)  # of each denoiser


class Conditions(TorchDispatchMode):
    """Let every condition on tensors that have but shapes be true: a model asks whether all of a mask is set, say.

    RuntimeError where it asks again and again: a loop that would never end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            self._asked += 1
            if self._asked > MOST_CONDITIONS:
                raise RuntimeError("a loop waits for what shapes don't tell")
            return True
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_shapes(seen: Seen, name: str, model: torch.nn.Module) -> Iterator[None]:
    """Let a model on shapes be called like one on the CPU."""
    real = model.forward
    names = list(inspect.signature(real).parameters)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if MASKS in names[: len(args)]:
            args, kwargs = (), dict(zip(names, args, strict=False)) | kwargs
        with standing_in(model, real):
            return watched(seen, name, model, model, *args, **kwargs)

    with standing_in(model, forward):
        yield


@contextlib.contextmanager
def encoding_on_shapes(seen: Seen, name: str, vae: Any) -> Iterator[None]:
    """Let a VAE on shapes encode as if it were on the CPU."""
    real = vae.encode
    vae.__dict__["encode"] = lambda *args, **kwargs: watched(seen, name, vae, real, *args, **kwargs)
    try:
        yield
    finally:
        del vae.__dict__["encode"]


def watched(seen: Seen, name: str, model: torch.nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a model on shapes, and note what it does; its result is zeros on the CPU, a denoiser's ones.

    Masks are left out: some models look whether they can be ignored, which shapes don't tell.
    """
    given, named = tree_map(on_meta_device, (args, {k: v for k, v in kwargs.items() if k != MASKS}))
    key = (name, getattr(run, "__name__", ""), *map(likeness, tree_leaves((given, sorted(named.items())))))
    if key not in seen.known:
        with (
            looking(model, name, seen),
            Conditions(),
            FlopCounterMode(display=False) as counter,
        ):
            result = run(*given, **named)
        seen.known[key] = float(counter.get_total_flops()), result
        prefix = type(model).__name__
        for module, counts in counter.get_flop_counts().items():
            if module.startswith(f"{prefix}."):
                seen.by_module[f"{name}{module.removeprefix(prefix)}"] = float(sum(counts.values()))
    flop, result = seen.known[key]
    seen.runs += 1
    seen.flop += flop
    if name in seen.steps:
        seen.steps[name].see(Call(args, kwargs))
    return tree_map(on_cpu if name not in seen.steps else ones, result)


def likeness(value: Any) -> Any:
    """Return what two arguments have in common by which a model does the same work: shapes, and settings."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    return value if isinstance(value, bool | int | str) else type(value)


class MetaRun:
    def __init__(self, source: Source, recipe: Recipe, given: Sequence[Tensor] = ()) -> None:
        """Build the pipeline on shapes; `given` are the pictures that the recipe names."""
        self._given = given
        self.source, self.recipe, self.dtype = source, recipe, DTYPES[recipe.dtype]
        self.pipeline: Any = build_skeleton(source, self.dtype)
        install_boundaries(self.pipeline)
        self._record = CallRecord()
        self._models: dict[Stage, list[tuple[str, torch.nn.Module]]] = {"text": [], "denoise": [], "vae": []}
        self._stored: dict[str, float] = {}  # of components that were saved quantized: their share of bytes in `dtype`
        for name in sorted(source.index):
            stage, *others = stages_of(name)
            if others or not (name in self.pipeline.components or name in source.added):
                continue
            if (model := on_meta(source, name)) is not None:
                model = torch.nn.Module.to(model, device=META, dtype=self.dtype).eval()  # some have a narrower `to`
                self._models[stage].append((name, said_to_be_here(model)))
                if is_quantized(source, name):
                    self._stored[name] = stored_bytes(source, name) / max(1, model_bytes(model))
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def stages(self) -> tuple[StageProfile, ...]:
        """Return the stages' profiles: text, denoise, vae."""
        seen: dict[Stage, Seen] = {stage: Seen() for stage in STAGES}
        seen["denoise"].steps = {name: FirstStep() for name, _ in self._models["denoise"]}
        visited, decodes = FIRST, self._visit(FIRST, seen[FIRST])
        for _ in range(MOST_VISITS):
            if isinstance(decodes, Stopped):
                visited = decodes.owner
                decodes = self._visit(visited, seen[visited])
        if isinstance(decodes, Stopped):
            raise RuntimeError(f"{self.source.pipeline} doesn't come to its decoding on shapes")
        passes = max(1, seen["denoise"].runs)
        seen["denoise"].flop /= passes
        denoise = self._figures("denoise", seen["denoise"], passes)
        return self._figures("text", seen["text"], 1), denoise, self._vae(seen["vae"], decodes)

    def guessed(self) -> tuple[StageProfile, ...]:
        """Return profiles by bytes alone, where the pipeline can't be run on shapes."""
        text, denoise = (self._guess(stage) for stage in ("text", "denoise"))
        flop, largest = guess.decoding(self.recipe, self.dtype.itemsize)
        guided = 2 if (self.recipe.cfg_scale or 0) > 1 else 1
        return (
            self._figures("text", text, 1),
            self._figures("denoise", denoise, self.recipe.steps * guided),
            self._figures("vae", Seen(1, flop, largest=largest), 1),
        )

    def _guess(self, stage: Stage) -> Seen:
        seen, tokens = Seen(1), guess.tokens_of(stage, self.recipe)
        for name, model in self._models[stage]:
            seen.flop += guess.flop_of(model, tokens)
            seen.largest = max(seen.largest, guess.largest_of(model, tokens, self.dtype.itemsize))
            for row in block_rows(model):
                seen.by_module[f"{name}.{row}"] = guess.flop_of(model.get_submodule(row), tokens)
        return seen

    def _visit(self, stage: Stage, seen: Seen) -> Decodes | Stopped:
        """Run the pipeline's own call up to what is another stage's: its next call, or all decodes."""
        with self._on_shapes(stage, seen):
            run = new_run(stage, self._record, HERE, self.recipe)
            found = until_stop(self.pipeline, run, arguments_of(self.pipeline, self.recipe, self._given))
        return found if isinstance(found, Stopped) and not run.pending else run.pending

    @contextlib.contextmanager
    def _on_shapes(self, stage: Stage, seen: Seen) -> Iterator[None]:
        """Let the pipeline run on the CPU, and a stage's models, which take nearly all of its time, on shapes."""
        models = {name: model for name, model in self._models[stage] if name in self.pipeline.components}
        placeholders = {name: self.pipeline.components[name] for name in models}
        self.pipeline.register_modules(**models)
        with contextlib.ExitStack() as stack:
            for name, model in models.items():
                stack.enter_context(on_shapes(seen, name, model))
                if stage == "vae":
                    stack.enter_context(encoding_on_shapes(seen, name, model))
                if stage != "denoise":
                    install_component(name, model, stage)  # gone with what is around its methods
            yield
        self.pipeline.register_modules(**placeholders)

    def _vae(self, seen: Seen, decodes: Decodes) -> StageProfile:
        label, (args, kwargs, _) = decodes[0]
        name, vae = next((name, vae) for name, vae in self._models["vae"] if label.startswith(f"{name}."))
        decode: Any = vae.decode
        args, kwargs = tree_map(on_meta_device, (args, kwargs))
        latents = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if latents.is_floating_point():
            vae.to(latents.dtype)
        with LiveBytes() as live:
            watched(seen, name, vae, decode, *args, **kwargs)
        vae.to(self.dtype)
        return self._figures("vae", seen, 1).model_copy(update={"peak": live.peak})

    def _figures(self, stage: Stage, seen: Seen, passes: int) -> StageProfile:
        models = self._models[stage]
        shares = {name: self._stored.get(name, 1.0) for name, _ in models}
        sizes = {name: int(model_bytes(model) * shares[name]) + LooseTensors(model).nbytes for name, model in models}
        if not models:  # of a pipeline without a VAE
            return StageProfile(
                stage=stage, components=(), least=0, largest=0, flop=0.0, passes=1, blocks=(), loose=0, heads=0, after=0
            )
        main = max(sizes, key=lambda name: sizes[name])
        blocks, least = [], 0
        for name, model in models:
            rows = smaller(streamable(model, block_rows(model)), shares[name]) if self._streams(stage, name) else []
            whole = sizes[name]
            least += least_bytes(rows, whole) if stage != "vae" else whole
            if name == main and stage != "vae":
                blocks = [block_figures(model, row, name, seen, shares[name]) for row in rows]
        once = sum(block.once for block in blocks)
        loose = max((largest_linear(dict(models)[main], seen.few_rows, main)), default=0) * SLOTS
        if once < LEAST_SHARE * sizes[main] or main in self._stored:  # not worth the trouble, or not done
            blocks, loose = [block.model_copy(update={"once": 0}) for block in blocks], 0
        return StageProfile(
            stage=stage, components=tuple(sizes.items()), least=least, largest=seen.largest, flop=seen.flop,
            passes=passes, together=max((step.together for step in seen.steps.values()), default=1),
            blocks=tuple(blocks), loose=loose,
            heads=heads_of(dict(models)[main]),
            quantized=any(quantization_method(self.source, name) for name in sizes),
            after=int(shares[main] * sum(model_bytes(part) for part in after_blocks(dict(models)[main], blocks))),
        )  # fmt: skip

    def _streams(self, stage: Stage, name: str) -> bool:
        """Return whether a component's blocks may be streamed."""
        return stage != "vae" and (name not in self._stored or quantization_method(self.source, name) == BITSANDBYTES)


def smaller(rows: Sequence[Block], share: float) -> list[Block]:
    """Return blocks of so many times the bytes."""
    return [Block(row.name, {name: int(size * share) for name, size in row.weights.items()}) for row in rows]


def after_blocks(model: torch.nn.Module, blocks: Sequence[BlockProfile]) -> list[torch.nn.Module]:
    _, after = around_blocks(model, [block.name for block in blocks])
    return [model.get_submodule(name) for name in after]


def heads_of(model: torch.nn.Module) -> int:
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    return heads if isinstance(heads, int) else 0


def parameter_sizes(model: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.nbytes for name, parameter in model.named_parameters()}


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights on a device, with what must be set aside around each."""
    return sum(map(room, parameter_sizes(model).values()))


def block_figures(model: torch.nn.Module, row: Block, component: str, seen: Seen, share: float) -> BlockProfile:
    block = model.get_submodule(row.name)
    prefix = f"{component}.{row.name}"
    once = sum(model_bytes(layer) for name, layer in block.named_modules() if f"{prefix}.{name}" in seen.few_rows)
    size = int(model_bytes(block) * share)
    return BlockProfile(name=row.name, bytes=size, once=once, flop=seen.by_module.get(prefix, 0.0))


def largest_linear(model: torch.nn.Module, names: set[str], component: str) -> Iterator[int]:
    """Yield the bytes of each named layer that is the component's."""
    for name in (name for name in names if name.startswith(f"{component}.")):
        yield model_bytes(model.get_submodule(name.removeprefix(f"{component}.")))


@contextlib.contextmanager
def looking(model: torch.nn.Module, component: str, seen: Seen) -> Iterator[None]:
    """Note what goes through the model's layers, and which of those inside its blocks act on the timestep alone."""
    rows = tuple(f"{row}." for row in block_rows(model))
    hooks = []
    for name, layer in model.named_modules():
        if any(True for _ in layer.children()):
            continue

        def see(layer: torch.nn.Module, args: tuple[Any, ...], result: Any, name: str = name) -> None:
            tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            seen.largest = max([seen.largest, *(tensor.nbytes for tensor in tensors)])
            linear = isinstance(layer, torch.nn.Linear) and name.startswith(rows)
            if linear and args and args[0].numel() <= MOST_ROWS * args[0].shape[-1]:  # one a sample
                seen.few_rows.add(f"{component}.{name}")

        hooks.append(layer.register_forward_hook(see))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def said_to_be_here(model: torch.nn.Module) -> torch.nn.Module:
    """Let a model say that it is on the CPU, where a pipeline then puts its latents. Its class keeps its known name."""
    model.__class__ = of_the_same_name(type(model), device=property(lambda _: HERE))
    return model


def on_meta_device(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) else value


def ones(value: Any) -> Any:
    """Return ones on the CPU for a tensor that has but a shape: by them a loop's latents move from step to step."""
    return torch.ones(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value


def on_cpu(value: Any) -> Any:
    """Return zeros for a tensor that has but a shape, or for the parameters of a distribution."""
    if isinstance(value, torch.Tensor) and value.device == META:
        return torch.zeros(value.shape, dtype=value.dtype)
    found = next((make for kind, make in DISTRIBUTIONS.values() if isinstance(value, kind)), None)
    return found(on_cpu(value.parameters), bool(getattr(value, "deterministic", False))) if found else value
