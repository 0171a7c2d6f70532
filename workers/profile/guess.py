"""A stage's arithmetic by its weights and the size asked for, where its pipeline can't be run on shapes alone.

The bytes of weights, which decide what fits, are exact all the same; seconds and workspaces are guesses, until jobs
have run.
"""

import torch

from protocol.job import Recipe
from protocol.stages import Stage

PIXELS_A_TOKEN = 256  # 16 x 16, as nearly all denoisers by now
FRAMES_A_TOKEN = 4
PROMPT_TOKENS = 512
WIDEST = 64  # times the tokens: a wider layer gives words, not states
# A decode of FLUX's VAE on shapes, 1024 x 1024: 2.5 TFLOP, and 256 channels at full size as its largest result.
DECODE_FLOP_A_PIXEL, DECODE_CHANNELS = 2.4e6, 256


def tokens_of(stage: Stage, recipe: Recipe) -> int:
    """Return about how many rows a stage's linear layers act on at once."""
    if stage == "text":
        return PROMPT_TOKENS
    frames = 1 + ((recipe.frames or 1) - 1) // FRAMES_A_TOKEN
    return recipe.width * recipe.height // PIXELS_A_TOKEN * frames * recipe.num_images + PROMPT_TOKENS


def flop_of(module: torch.nn.Module, tokens: int) -> float:
    """Return about the operations of a run of a module on so many tokens: a product and a sum for each weight."""
    return 2.0 * tokens * sum(parameter.numel() for parameter in module.parameters())


def largest_of(module: torch.nn.Module, tokens: int, itemsize: int) -> int:
    """Return about the bytes of the largest result of a module's linear layers."""
    widths = [layer.out_features for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    return tokens * max((width for width in widths if width < tokens * WIDEST), default=0) * itemsize


def decoding(recipe: Recipe, itemsize: int) -> tuple[float, int]:
    """Return about the operations of a decode, and the bytes of its largest result."""
    pixels = recipe.width * recipe.height * recipe.num_images
    at_once = pixels * DECODE_CHANNELS * itemsize * min(recipe.frames or 1, FRAMES_A_TOKEN)
    return DECODE_FLOP_A_PIXEL * pixels * (recipe.frames or 1), at_once
