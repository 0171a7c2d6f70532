"""Buffers, attributes and caches go with the weights; the meta device stands in for a GPU that tensors lie on."""

import functools
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from tests import tiny
from workers.weights.loose_tensors import LooseTensors
from workers.weights.residency import Residency
from workers.weights.streaming import room

META, CPU = torch.device("meta"), torch.device("cpu")


class Keeper(torch.nn.Module):
    """Keeps tensors in every way that models do."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0))
        self.rotary = torch.arange(8.0)
        self.cache: dict[int, torch.Tensor] = {}
        self.last: torch.Tensor | None = None
        self.names = ["a"]

    @functools.cache  # noqa: B019  as diffusers does it
    def by_size(self, size: int) -> torch.Tensor:
        return torch.zeros(size, device=META)


def test_nothing_stays_on_the_device_and_everything_is_as_it_was() -> None:
    outer = torch.nn.Sequential(Keeper())
    keeper: Any = outer[0]
    cache, names = keeper.cache, keeper.names
    loose = LooseTensors(outer)
    assert loose.nbytes == room(16) + room(32)
    loose.move_in(META)
    assert keeper.table.device == META
    keeper.rotary = keeper.rotary.to(META)
    keeper.cache[7] = torch.zeros(7, device=META)
    keeper.last, keeper.new = torch.zeros(3, device=META), [torch.zeros(2, device=META)]
    keeper.by_size(5)
    assert keeper.by_size.cache_info().currsize == 1
    loose.let_go(META)
    assert torch.equal(keeper.table, torch.arange(4.0))
    assert torch.equal(keeper.rotary, torch.arange(8.0))
    assert keeper.cache is cache
    assert (cache, keeper.last, keeper.names) == ({}, None, names)
    assert not hasattr(keeper, "new")
    assert keeper.by_size.cache_info().currsize == 0


def test_caches_behind_a_wrapper_of_diffusers_are_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image's rotary tables: plain attributes, and tensors on the device in a cache that no name leads to."""
    rope = QwenEmbedRope(theta=10000, axes_dim=[4, 6, 6], scale_rope=True)
    loose = LooseTensors(rope)
    assert loose.nbytes == room(rope.pos_freqs.nbytes) + room(rope.neg_freqs.nbytes)
    first = rope._get_device_freqs(META)
    assert rope._get_device_freqs(META)[0] is first[0]
    loose.let_go(META)
    assert rope._get_device_freqs(META)[0] is not first[0]
    loose.let_go(META)


def test_a_part_leaves_the_others_tensors_alone() -> None:
    outer = torch.nn.Sequential(Keeper(), Keeper())
    loose = LooseTensors(outer, lambda name: not f"{name}.".startswith("1."))
    loose.move_in(META)
    assert (outer[0].table.device, outer[1].table.device) == (META, CPU)


def test_a_residency_counts_its_buffers_and_drops_them_with_the_weights() -> None:
    model = tiny.sd3().transformer
    residency = Residency("transformer", model, CPU)
    (table,) = [b for name, b in model.named_buffers() if name == "pos_embed.pos_embed"]
    weights = sum(room(p.nbytes) for p in model.parameters())
    assert residency.total_bytes == weights + room(table.nbytes)
    residency.swap_in(residency.total_bytes)
    assert residency.device_bytes >= weights + room(table.nbytes)
    residency.swap_out()
    assert model.pos_embed.pos_embed is table
