"""The most bytes of tensors that live at once while something runs on shapes: a GPU takes as much, or little more."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what operations make on the meta device, until nothing holds it any more; arguments are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()  # storages, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in meta_tensors((args, kwargs)):
            self._see(tensor.untyped_storage(), counts=False)  # unless it was made meanwhile
        made = func(*args, **(kwargs or {}))
        for tensor in meta_tensors(made):
            self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return made

    def _see(self, storage: torch.UntypedStorage, counts: bool = True) -> None:
        address, size = storage._cdata, storage.nbytes() if counts else 0
        if address not in self._known:
            self._known.add(address)
            self._now += size
            weakref.finalize(storage, self._let_go, address, size)

    def _let_go(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


def meta_tensors(value: Any) -> Iterator[torch.Tensor]:
    yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor) and leaf.is_meta)
