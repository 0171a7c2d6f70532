"""Boundaries: the calls of a pipeline into its components, answered from a record, made, or left to another stage.

They are installed once, as a stage is loaded. Each run has its own record and place in it, so that jobs in flight and
dry runs inside of a job share the components. Without a run they do what they did before.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch.utils._pytree import tree_map

from protocol.stages import Stage
from workers.errors import StageError
from workers.replay.call_record import Call, CallRecord, Unprepared
from workers.replay.placeholder import is_placeholder

MOST_SHAPES = 64  # of a component's arguments, of which the result's are kept
OUTSIDE_FORWARD = (
    "generate",
    "get_image_features",
    "get_text_features",
    "scale",
    "unscale",
)  # entries of an encoder beside its forward


class Stopped(BaseException):
    """Not an error: the next call is another stage's. Nothing of a pipeline's own may catch it."""

    def __init__(self, owner: Stage, label: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__(f"{label} is for the {owner} stage")
        self.owner, self.label, self.arguments, self.keywords = owner, label, arguments, keywords


@dataclass(frozen=True, slots=True)
class MadeCall:
    """A call with its arguments and its result."""

    label: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


# Return a call that was made ahead, by its place in the record; None where that was another one.
Foreseen = Callable[[int, str, tuple[Any, ...], Mapping[str, Any]], MadeCall | None]


@dataclass(slots=True)
class Run:
    """A run of a pipeline's call in a stage, from its first argument on; what it makes is added to the record."""

    stage: Stage | None  # None: it owns nothing, and stops at the first call
    record: CallRecord
    device: torch.device
    finishes: bool = False  # the record has all decodes' arguments: come to the end with them, without denoising
    goes_on: bool = False  # it has those of some, whose results something but the end depends on: record these
    skips: bool = True  # it comes to the end by skipping the denoising loop, not by zeros for the denoisers' results
    generator: torch.Generator | None = None  # of the call's random numbers
    most: int | None = None  # calls to be made before it stops, and to be kept in `made`; None: all, and none
    made: list[MadeCall] = field(default_factory=list)
    foreseen: Foreseen | None = None  # results of calls that were made ahead
    _next: int = 0  # call of the record
    inside: bool = False  # a call is being made, and what it calls itself is a part of it
    pending: list[tuple[str, Any]] = field(default_factory=list)  # decodes that are left to the vae stage
    _decoded: int = 0
    _forwards: int = 0

    def call(self, owner: Stage, label: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer a call that is recorded, make one that is this stage's, or stop."""
        if self._next < len(self.record.calls):
            self._next += 1
            return self._recorded(self.record.calls[self._next - 1], label)
        if owner != self.stage or self.is_tainted(args, kwargs) or len(self.made) == self.most:
            raise Stopped(owner, label, args, kwargs)
        known = self.foreseen(self._next, label, args, kwargs) if self.foreseen else None
        result = known.result if known else self._make(real, args, kwargs)
        if self.most is not None:
            self.made.append(MadeCall(label, args, kwargs, result))
        self.record.add(label, result, self.device)
        self._next += 1
        return self.record.value(self.record.calls[-1], self.device)

    def decode(self, label: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Decode what is recorded, in the vae stage.

        The denoise stage puts the arguments aside for it and goes on with what has but the result's shape, to find
        what else there is to decode. Any other stage stops. What an earlier visit has decoded is answered, as other
        calls are.
        """
        if self._next < len(self.record.calls) and self.record.calls[self._next].label == label:
            self._next += 1
            return self.record.value(self.record.calls[self._next - 1], self.device)
        if self.stage == "denoise":
            return self._put_aside(label, real, args, kwargs)
        if not (self.finishes or self.goes_on):
            raise Stopped("denoise", label, args, kwargs)
        if self._decoded == len(self.record.decodes):
            if self.goes_on:
                raise Stopped("denoise", label, args, kwargs)
            raise Unprepared(f"{label} is called again, which another stage has not prepared")
        args, kwargs, state = self._recorded(self.record.decodes[self._decoded], label)
        self._decoded += 1
        if self.goes_on and any(map(is_generator, (*args, *kwargs.values()))):
            raise StageError("it decodes with random numbers and denoises on; such a pipeline can't be split")
        args = tuple(self.generator if is_generator(value) else value for value in args)
        kwargs = {name: self.generator if is_generator(value) else value for name, value in kwargs.items()}
        if self.generator is not None and state is not None:
            self.generator.set_state(state.cpu())
        result = self._make(real, args, kwargs)
        if not all(torch.isfinite(tensor).all() for tensor in tensors_of(result)):
            raise StageError("the decoded picture holds NaN or infinity; another --dtype may help")
        if self.goes_on:
            self.record.add(label, result, self.device)
            self._next += 1
            return self.record.value(self.record.calls[-1], self.device)
        return result

    def _put_aside(self, label: str, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.is_tainted(args, kwargs):
            raise Stopped("vae", label, args, kwargs)
        kept = [GENERATOR if isinstance(value, torch.Generator) else value for value in args]
        named = {n: GENERATOR if isinstance(v, torch.Generator) else v for n, v in kwargs.items()}
        state = None if self.generator is None else self.generator.get_state()
        self.pending.append((label, (kept, named, state)))
        result = shape_of(real, args, kwargs)
        if self.generator is not None and state is not None:
            self.generator.set_state(state)  # whatever was drawn for a shape
        return result

    def check_may_denoise(self, *given: Any) -> None:
        """Raise Stopped where a denoiser is to run on what is yet to be decoded; StageError where it can't be told."""
        if self.is_tainted(*given):
            raise Stopped("vae", "decode", (), {})
        if any(GENERATOR in [*kept, *named.values()] for _, (kept, named, _) in self.pending):
            raise StageError("it decodes with random numbers and denoises on; such a pipeline can't be split")

    def is_tainted(self, *given: Any) -> bool:
        """Return whether values have come of a decode that is yet to be made."""
        return bool(self.pending) and any(tensor.is_meta for tensor in tensors_of(list(given), every=True))

    def for_decoding(self, goes_on: bool, unsure: bool) -> CallRecord:
        """Return the record with which the vae stage decodes what was put aside, by the same random numbers.

        It comes to its end with them, or `goes_on`: what was put aside is recorded, and denoising is visited again. Or
        that will be seen (`unsure`).
        """
        record = self.record if goes_on or unsure else self.record.shapes_only()
        record.goes_on, record.unsure = goes_on, unsure
        for label, arguments in self.pending:
            record.add_decode(label, arguments, self.device)
        return record

    def denoise(self, label: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let zeros of its results' shapes stand in for a denoiser, in the vae stage; any other stage stops."""
        if not self.finishes and not (self.goes_on and self._forwards < self.record.forwards_made):
            raise Stopped("denoise", label, args, kwargs)
        result = self.record.forward(self._forwards, self.device)
        self._forwards += 1
        return result

    def _recorded(self, known: Call, label: str) -> Any:
        """Return what is recorded of a call, which must be the one that is made now; StageError."""
        if known.label != label:
            raise StageError(f"{label} is called where {known.label} is recorded; another stage ran otherwise")
        return self.record.value(known, self.device)

    def _make(self, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.inside = True
        try:
            return real(*args, **kwargs)
        finally:
            self.inside = False


ENCODING = (  # a pipeline's own methods
    "encode_prompt", "encode_prompt_multiple_images", "_encode_prompt", "encode_for_refiner",
)  # fmt: skip
GENERATOR = {"generator": True}  # in the place of the call's own among a decode's arguments


def is_generator(value: Any) -> bool:
    return isinstance(value, dict) and value == GENERATOR


_current: ContextVar[Run | None] = ContextVar("run", default=None)


@contextlib.contextmanager
def running(pipeline: DiffusionPipeline, run: Run) -> Iterator[None]:
    """Let boundaries heed a run meanwhile. What the pipeline notes of itself during a call is taken back."""
    token = _current.set(run)
    before = dict(vars(pipeline))
    try:
        yield
    finally:
        _current.reset(token)
        vars(pipeline).clear()
        vars(pipeline).update(before)


def tensors_of(value: Any, every: bool = False) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value, those of floating-point numbers or `every` one."""
    match value:
        case torch.Tensor() if every or value.is_floating_point():
            yield value
        case list() | tuple():
            for item in value:
                yield from tensors_of(item, every)
        case Mapping():
            yield from tensors_of(list(value.values()), every)


def shape_of(real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a component's result on the meta device, where the component is; memoryless, and it taints what it meets.

    None where its code can't be run so. It is found once for arguments of the same shapes, which takes some 50 ms.
    """
    known: dict[str, Any] = vars(real.__self__).setdefault("_triptych_shapes", {})  # type: ignore[attr-defined]
    given, named = tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, (args, kwargs))
    key = repr(tree_map(lambda v: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else type(v), (args, kwargs)))
    if key not in known:
        if len(known) >= MOST_SHAPES:
            known.clear()
        try:
            known[key] = real(*given, **named)
        except Exception:  # whatever its code does of its own
            known[key] = None
    return known[key]


# -- installing ---------------------------------------------------------------------------------------


def install(pipeline: DiffusionPipeline, owners: Mapping[str, Stage]) -> None:
    """Install the boundaries of a pipeline, and of those of its components (`owners`: by name) that have none yet."""
    for entry in ENCODING:
        if hasattr(pipeline, entry):
            wrap(pipeline, entry, "text", entry)
    install_steps(pipeline)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and not hasattr(component, "_triptych_boundaries"):
            component.__dict__["_triptych_boundaries"] = True
            install_component(name, component, owners.get(name, "denoise"))


def install_steps(pipeline: DiffusionPipeline) -> None:
    """Install what a pipeline's loop and its pictures heed, and none of its calls into components."""
    if can_skip(type(pipeline).__call__):
        pipeline.__dict__["progress_bar"] = skipping(pipeline, pipeline.progress_bar)
    for processor in (*vars(pipeline).values(), *pipeline.components.values()):
        if isinstance(processor, VaeImageProcessor):
            install_processor(processor)


def install_processor(processor: VaeImageProcessor) -> None:
    """Let what makes files' pictures of decoded tensors pass by what is yet to be decoded."""
    for entry in ("postprocess", "postprocess_video"):
        if (real := getattr(processor, entry, None)) is not None:
            processor.__dict__[entry] = functools.partial(unless_tainted, real)


def unless_tainted(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    run = _current.get()
    return None if run is not None and run.is_tainted(args, kwargs) else real(*args, **kwargs)


def install_component(name: str, component: torch.nn.Module, owner: Stage) -> None:
    if is_placeholder(component):
        for part, module in component.named_modules():
            if part and part != "model" and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(functools.partial(refuse_on_the_host, owner, f"{name}.{part}"))
    match owner:
        case "text":
            for entry in ("forward", *OUTSIDE_FORWARD):
                if hasattr(component, entry):
                    wrap(component, entry, owner, f"{name}.{entry}")
            if isinstance(inner := getattr(component, "model", None), torch.nn.Module):
                wrap(inner, "forward", owner, f"{name}.model")  # which some pipelines call past it
        case "vae":
            if hasattr(component, "encode"):
                wrap(component, "encode", owner, f"{name}.encode")
            if isinstance(quantizer := getattr(component, "quantize", None), torch.nn.Module):
                wrap(quantizer, "forward", owner, f"{name}.quantize")  # which some pipelines call themselves
            if hasattr(component, "decode"):  # what else comes after it, such as a safety checker, is run as it comes
                wrap(component, "decode", owner, f"{name}.decode", Run.decode)
        case "denoise":
            component.register_forward_pre_hook(refuse_tainted, with_kwargs=True)
            if is_placeholder(component):  # where its weights are, its forward is left as it is
                wrap(component, "forward", owner, f"{name}.forward", Run.denoise)
            else:
                component.register_forward_hook(note_shapes)


def refuse_on_the_host(owner: Stage, name: str, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """A forward hook of a placeholder's layers, before they run: only shapes can go through them.

    torch multiplies by weights on the meta device in silence, and what comes out is whatever was in memory.
    """
    run = _current.get()
    if run is None or (run.finishes and owner == "denoise") or all(tensor.is_meta for tensor in tensors_of(args)):
        return
    told = f"{name} is called on its own, where it has no weights"
    raise RuntimeError(f"{told}: it is on the meta device") if run.pending else StageError(told)


def refuse_tainted(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward hook of a denoiser, before it runs."""
    run = _current.get()
    if run is not None and run.pending:
        run.check_may_denoise(args, kwargs)


def note_shapes(module: torch.nn.Module, args: tuple[Any, ...], result: Any) -> None:
    """A forward hook of a denoiser."""
    run = _current.get()
    if run is not None and not run.finishes:
        run.record.add_forward(result, run.device)


@functools.cache
def can_skip(call: Callable[..., Any]) -> bool:
    """Return whether a pipeline's call leaves its loop's steps out once it is told to (`_interrupt`)."""
    return "self.interrupt" in inspect.getsource(inspect.unwrap(call))


def skipping(pipeline: DiffusionPipeline, real: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's `progress_bar`, with which its loop begins: a run that finishes leaves the loop out."""

    @functools.wraps(real)
    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        run = _current.get()
        if run is not None and run.finishes and run.skips:
            pipeline._interrupt = True
        return real(*args, **kwargs)

    return progress_bar


def wrap(target: Any, entry: str, owner: Stage, label: str, how: Callable[..., Any] | None = None) -> None:
    """Put a boundary around a method of a pipeline or a component."""
    real = getattr(target, entry)

    @functools.wraps(real)
    def boundary(*args: Any, **kwargs: Any) -> Any:
        run = _current.get()
        if run is None or run.inside:
            return real(*args, **kwargs)
        if how is None:
            return run.call(owner, label, real, *args, **kwargs)
        return how(run, label, real, *args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):
        boundary.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    target.__dict__[entry] = boundary
