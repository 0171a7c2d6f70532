"""Modular pipelines with the interface of the others: components by name, and one call with a signature.

Diffusers makes them of blocks, which share a state and call the same components; so the same boundaries split them.
"""

import contextlib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.modular_pipelines import ModularPipelineBlocks

from protocol.errors import ModelMissing
from workers.models.tasks import IMAGES, MASKS
from workers.replay.placeholder import where_another_is

CALLBACK = "callback_on_step_end"
logging.getLogger("diffusers.modular_pipelines.modular_pipeline").setLevel(logging.CRITICAL)  # errors are raised, too
SOUND = ("audio", "sampling_rate")  # names of what may come besides
RESULTS = ("images", "videos", "image", "video")  # names of what blocks come to in the end


class ModularAdapter(DiffusionPipeline):  # type: ignore[misc]
    """A modular pipeline, called like the others. Its subclasses are made by `adapter_of`."""

    modular: ClassVar[type[ModularPipeline]]
    blocks: ClassVar[type[ModularPipelineBlocks]]
    parts: ClassVar[tuple[str, ...]]  # names of components that are loaded
    settings: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]
    result: ClassVar[str]

    def _assemble(self, given: Mapping[str, Any]) -> None:
        """Make the modular pipeline with its components; those of None are the blocks' own, or absent."""
        cls = where_another_is(self.modular, self)
        settings = {name: given[name] for name in self.settings if name in given}
        object.__setattr__(self, "inner", cls(blocks=self.blocks(), modular_config_dict=settings))
        self.inner.set_progress_bar_config(disable=True)
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
        if guider is not None:  # which notes of its calls what step they are at
            own = {} if scale is None else {"guidance_scale": scale}
            self.inner.guider = type(guider).from_config({**guider.config, **own})
        names = [self.result, *(name for name in SOUND if name in self.outputs)]
        try:
            with counting(self.inner, lambda step: callback(self, step, None, {}) if callback else None):
                made = self.inner(output=names, **given)
        finally:
            if guider is not None:
                self.inner.guider = guider
        field = "images" if self.result.startswith("image") else "frames"
        return SimpleNamespace(**{field: made.pop(self.result)}, **made)


@contextlib.contextmanager
def counting(pipeline: Any, callback: Callable[[int], None]) -> Iterator[None]:
    """Call back at each step of a modular pipeline's scheduler: its loops have no callbacks of their own."""
    scheduler = pipeline.scheduler
    before, real, done = scheduler.__dict__.get("step"), scheduler.step, itertools.count()

    def step(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        callback(next(done))
        return made

    scheduler.step = functools.wraps(real)(step)
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


def every_block(blocks: ModularPipelineBlocks) -> Iterator[ModularPipelineBlocks]:
    """Yield blocks, and all those that they are made of."""
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
    guider = next((spec for spec in made.expected_components if spec.name == "guider"), None)
    scale = (guider.config or {}).get("guidance_scale") if guider else None

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
    defaults = {
        one.name: one.default for block in every_block(made) for one in block.inputs if one.default is not None
    }  # what the whole leaves open may be a block's own
    parameters = {
        name: inspect.Parameter(name, keyword, default=default_of(one, defaults.get(name)))
        for name, one in inputs.items()
    }
    parameters[CALLBACK] = inspect.Parameter(CALLBACK, keyword, default=None)
    if scale is not None:
        parameters["guidance_scale"] = inspect.Parameter("guidance_scale", keyword, default=scale)
    __call__.__signature__ = inspect.Signature([myself, *parameters.values()])  # type: ignore[attr-defined]
    __call__.__annotations__ = {name: one.type_hint for name, one in inputs.items() if one.type_hint is not None}
    return type(
        cls.__name__,
        (ModularAdapter,),
        {
            "modular": cls, "blocks": blocks, "parts": parts, "settings": settings, "outputs": tuple(outputs),
            "result": next((name for name in RESULTS if name in outputs), "images"),
            "_optional_components": list(parts), "__init__": __init__, "__call__": __call__,
        },
    )  # fmt: skip


def default_of(given: Any, of_block: Any) -> Any:
    """Return the default of a block's input; none for pictures and videos that it can't do without."""
    of_pictures = given.name in (*IMAGES, *MASKS) or given.name.endswith("_video") or given.name == "video"
    if given.required and of_pictures:
        return inspect.Parameter.empty
    return of_block if given.default is None else given.default
