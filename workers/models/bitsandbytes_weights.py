"""Weights that bitsandbytes has quantized, in host memory: both libraries would load them onto a GPU at once.

What it keeps beside a weight (scales of its blocks, tables) is moved with the loose tensors of its model.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def loaded_on_host() -> Iterator[None]:
    """Let models that bitsandbytes has quantized be loaded where others are, with no GPU lent yet."""
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    quantizers: list[Any] = [
        BnB4BitDiffusersQuantizer, BnB8BitDiffusersQuantizer, Bnb4BitHfQuantizer, Bnb8BitHfQuantizer,
    ]  # fmt: skip
    before = [(cls, cls.validate_environment, cls.update_device_map) for cls in quantizers]
    for cls in quantizers:
        cls.validate_environment = lambda *_, **__: None  # which wants a GPU
        cls.update_device_map = lambda _, device_map: device_map  # and puts all of a model on it
    try:
        yield
    finally:
        for cls, validate, update in before:
            cls.validate_environment, cls.update_device_map = validate, update


def let_move(module: torch.nn.Module) -> None:
    """Let its weights be moved as others are.

    Layers of eight bits take theirs from where it is now; those of four bits give it no layout that only CPUs have,
    which is made in place.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each call what dtype it casts to
    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        if isinstance(layer, Linear8bitLt):
            layer.init_8bit_state()
            layer.register_forward_pre_hook(take_weight)


def take_weight(layer: Any, _: Any) -> None:
    """A hook before a layer of eight bits runs, which computes with its state's copy of the weight."""
    layer.state.CB = layer.weight.data
