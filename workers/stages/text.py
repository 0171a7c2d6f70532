"""Prompt → embeddings, by the pipeline's own `encode_prompt`.

What it returns is told apart by the names of the variables in its return statement: for nearly all pipelines they are
the names of `__call__`'s arguments, which is how the denoiser takes them.
"""

import ast
import contextlib
import inspect
import textwrap
from typing import Any

import torch

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.errors import StageError
from workers.models.description import call_parameters
from workers.models.loading import Loaded
from workers.stages.contract import Outcome, Report
from workers.tensors import Value, pack


class TextStage:
    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.pipeline, self.device = loaded.pipeline, device
        self.residencies = tuple(loaded.residencies.values())
        self.names = returned_names(type(self.pipeline).encode_prompt)

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Embeddings under the names of `__call__`'s arguments, repeated for every picture of the job."""
        report(0, 1)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for residency in self.residencies:
                stack.enter_context(residency.job(None))
            return Outcome(pack(self.embeddings(recipe)), next="denoise")

    def embeddings(self, recipe: Recipe) -> dict[str, Value]:
        true_cfg = recipe.true_cfg
        found = self.encode(recipe, recipe.prompt, recipe.negative_prompt, true_cfg)
        apart = true_cfg and not any(name.startswith("negative_") for name in found)
        # Pipelines with a `true_cfg_scale` make the second pass only where a negative prompt was given, be it empty.
        if apart and (recipe.negative_prompt is not None or "true_cfg_scale" not in call_parameters(self.pipeline)):
            negative = self.encode(recipe, recipe.negative_prompt or "", None, true_cfg)
            found |= {f"negative_{name}": value for name, value in negative.items()}
        taken = call_parameters(self.pipeline)
        return {name: value for name, value in found.items() if name in taken}

    def encode(self, recipe: Recipe, prompt: str, negative: str | None, true_cfg: bool) -> dict[str, Value]:
        """Call `encode_prompt` by the names of its parameters; defaults are `__call__`'s where it has them."""
        known: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative,
            "device": self.device,
            "num_images_per_prompt": recipe.num_images,
            "num_videos_per_prompt": recipe.num_images,
            "do_classifier_free_guidance": true_cfg,
        }
        if recipe.max_sequence_length is not None:
            known["max_sequence_length"] = recipe.max_sequence_length
        call = call_parameters(self.pipeline)
        if negative is None and "negative_prompt" in call:
            known["negative_prompt"] = call["negative_prompt"].default  # None nearly everywhere, "" in PixArt
        arguments: dict[str, Any] = {}
        for name, parameter in inspect.signature(self.pipeline.encode_prompt).parameters.items():
            if name in known:
                arguments[name] = known[name]
            elif name in call and call[name].default is not inspect.Parameter.empty:
                arguments[name] = call[name].default
            elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                arguments[name] = None
        returned = self.pipeline.encode_prompt(**arguments)
        values = returned if isinstance(returned, tuple) else (returned,)
        if len(values) != len(self.names):
            raise StageError(
                f"{type(self.pipeline).__name__}.encode_prompt returned {len(values)} values, not {self.names}"
            )
        return {name: value for name, value in zip(self.names, values, strict=True) if _is_tensors(value)}


def _is_tensors(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, torch.Tensor) for item in value)
    )


def returned_names(function: Any) -> list[str]:
    """The names in a function's last return statement: `return prompt_embeds, text_ids` → those two."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    returns = [node.value for node in ast.walk(tree.body[0]) if isinstance(node, ast.Return) and node.value is not None]
    match max(returns, key=lambda value: value.lineno):
        case ast.Tuple(elts=elements):
            return [ast.unparse(element) for element in elements]
        case ast.expr() as single:
            return [ast.unparse(single)]
