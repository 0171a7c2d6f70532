"""Modular pipelines with the interface of the others: components by name, and one call with a signature.

Diffusers makes them of blocks, which share a state and call the same components; so the same boundaries split them.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks

from protocol.errors import ModelMissing
from workers.models.tasks import FRAMES, IMAGES, MASKS
from workers.replay.placeholder import of_the_same_name

CALLBACK = "callback_on_step_end"
RESULTS = ("images", "videos", "image", "video")  # names of what blocks come to in the end


class StepCount:
    """What stands for a progress bar in a loop of blocks: it calls back at each step."""

    def __init__(self, steps: Iterable[Any], callback: Callable[[int], None]) -> None:
        self._steps, self._callback, self._done = steps, callback, 0

    def __enter__(self) -> "StepCount":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for step in self._steps:
            yield step
            self.update()

    def update(self, count: int = 1) -> None:
        for _ in range(count):
            self._done += 1
            self._callback(self._done - 1)


class ModularAdapter(DiffusionPipeline):  # type: ignore[misc]
    """A modular pipeline, called like the others. Its subclasses are made by `adapter_of`."""

    modular: ClassVar[type[ModularPipeline]]
    blocks: ClassVar[type[ModularPipelineBlocks]]
    parts: ClassVar[tuple[str, ...]]  # names of components that are loaded
    settings: ClassVar[tuple[str, ...]]
    result: ClassVar[str]

    def _assemble(self, given: Mapping[str, Any]) -> None:
        """Make the modular pipeline with its components; those of None are the blocks' own, or absent."""
        here, computing = property(lambda _: self.device), property(lambda _: self._execution_device)
        cls: Any = of_the_same_name(self.modular, device=here, _execution_device=computing)
        settings = {name: given[name] for name in self.settings if name in given}
        object.__setattr__(self, "inner", cls(blocks=self.blocks(), modular_config_dict=settings))
        for name in self.parts:
            if given.get(name) is not None:
                setattr(self.inner, name, given[name])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)

    @classmethod
    def _get_signature_keys(cls, obj: Any) -> tuple[set[str], set[str]]:
        return set(cls.parts), set(cls.settings)

    @property
    def components(self) -> dict[str, Any]:
        """All components by name, those of the blocks' own included."""
        found: dict[str, Any] = self.inner.components
        return found

    def register_modules(self, **modules: Any) -> None:
        """Put components in the place of others."""
        for name, module in modules.items():
            setattr(self.inner, name, module)

    def _call(self, given: dict[str, Any]) -> SimpleNamespace:
        callback = given.pop(CALLBACK, None)
        scale = given.pop("guidance_scale", None)
        guider = getattr(self.inner, "guider", None)
        if scale is not None and guider is not None:
            self.inner.guider = type(guider).from_config({**guider.config, "guidance_scale": scale})
        try:
            with counting(self.inner._blocks, lambda step: callback(self, step, None, {}) if callback else None):
                made = self.inner(output=self.result, **given)
        finally:
            if scale is not None and guider is not None:
                self.inner.guider = guider
        return SimpleNamespace(**{"images" if self.result.startswith("image") else "frames": made})


@contextlib.contextmanager
def counting(blocks: ModularPipelineBlocks, callback: Callable[[int], None]) -> Iterator[None]:
    """Call back at each step of the loops among some blocks."""
    loops = [block for block in every_block(blocks) if isinstance(block, LoopSequentialPipelineBlocks)]
    for loop in loops:
        loop.progress_bar = lambda iterable=None, total=None: StepCount(iterable or (), callback)
    try:
        yield
    finally:
        for loop in loops:
            del loop.progress_bar


def every_block(blocks: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    yield blocks
    for block in getattr(blocks, "sub_blocks", {}).values():
        yield from every_block(block)


def adapter_of(model: str, cls: type[ModularPipeline], blocks_name: str | None) -> type[DiffusionPipeline]:
    """Return a pipeline class for a modular one and its blocks, by their name in diffusers; ModelMissing."""
    blocks = getattr(diffusers, blocks_name or cls.default_blocks_name or "", None)
    if blocks is None or not getattr(blocks, "block_classes", None):
        blocks = getattr(diffusers, cls.default_blocks_name or "", None)
    if blocks is None:
        raise ModelMissing(f"{model!r} is made of blocks {blocks_name!r}, which diffusers doesn't have.", "Update it.")
    made: type[DiffusionPipeline] = _adapter(cls, blocks)  # type: ignore[arg-type]
    return made


@functools.cache
def _adapter(cls: type[ModularPipeline], blocks: type[ModularPipelineBlocks]) -> type[DiffusionPipeline]:
    made = blocks()
    parts = tuple(spec.name for spec in made.expected_components)
    settings = tuple(spec.name for spec in made.expected_configs)
    outputs = [output.name for output in made.outputs]
    guided = any(spec.name == "guider" and "guidance_scale" in (spec.config or {}) for spec in made.expected_components)
    scale = next((spec.config["guidance_scale"] for spec in made.expected_components if spec.name == "guider"), None)

    def __init__(self: Any, **given: Any) -> None:
        DiffusionPipeline.__init__(self)
        self._assemble(given)

    def __call__(self: Any, **given: Any) -> SimpleNamespace:
        return cast(SimpleNamespace, self._call(given))

    keyword = inspect.Parameter.KEYWORD_ONLY
    myself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [myself, *(inspect.Parameter(name, keyword, default=None) for name in (*parts, *settings))]
    )
    inputs = {given.name: given for given in made.inputs if given.name}
    parameters = {name: inspect.Parameter(name, keyword, default=default_of(one)) for name, one in inputs.items()}
    parameters[CALLBACK] = inspect.Parameter(CALLBACK, keyword, default=None)
    if guided:
        parameters["guidance_scale"] = inspect.Parameter("guidance_scale", keyword, default=scale)
    __call__.__signature__ = inspect.Signature([myself, *parameters.values()])  # type: ignore[attr-defined]
    __call__.__annotations__ = {name: one.type_hint for name, one in inputs.items() if one.type_hint is not None}
    return type(
        cls.__name__,
        (ModularAdapter,),
        {
            "modular": cls, "blocks": blocks, "parts": parts, "settings": settings,
            "result": next((name for name in RESULTS if name in outputs), "images"),
            "_optional_components": list(parts), "__init__": __init__, "__call__": __call__,
        },
    )  # fmt: skip


def default_of(given: Any) -> Any:
    """Return the default of a block's input; none for pictures and videos that it can't do without."""
    of_pictures = given.name in (*IMAGES, *MASKS) or given.name.endswith("_video") or given.name == "video"
    if given.required and of_pictures and given.name not in FRAMES:
        return inspect.Parameter.empty
    return given.default
