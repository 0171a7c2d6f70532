"""Weights that stay on the device between forwards, in pieces of memory of their own.

A piece holds weights of blocks that run one after the other, or weights of no block. Between two forwards pieces of
blocks can be let go, the last blocks' first, and come back beside the next forward: each block waits for its own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.hooks import RemovableHandle

from workers.tensors import flat_bytes
from workers.weights.copy_stream import CopyStream, Mark
from workers.weights.sharded import LocalPart
from workers.weights.streaming import memory_of_its_own, room, view_of

PIECE_BYTES = 512 << 20  # at least, where there is as much: the allocator rounds each up by 1 MiB on average


@dataclass(slots=True)
class Piece:
    names: list[str]  # of weights
    rows: list[str]  # the blocks whose they are; none: they are of no block, and are never let go
    memory: torch.Tensor | None = None  # flat uint8


class ResidentPieces:
    """The weights `names` of a module on its device, copied from `host`; `rows` are its blocks, in order."""

    def __init__(
        self,
        module: torch.nn.Module,
        names: Sequence[str],
        rows: Sequence[str],
        parameters: Mapping[str, torch.nn.Parameter | LocalPart],
        host: Mapping[str, torch.Tensor],
        copy_stream: CopyStream,
        piece_bytes: int,
    ) -> None:
        self._module, self._parameters, self._host, self._copy_stream = module, parameters, host, copy_stream
        self._pieces = pieces_of(names, rows, {name: room(host[name].nbytes) for name in names}, piece_bytes)
        self._hooks: list[RemovableHandle] = []  # of blocks whose weights are on their way
        for mark in [self._fetch(piece) for piece in self._pieces]:
            copy_stream.wait(mark)

    @property
    def nbytes(self) -> int:
        return sum(piece.memory.nbytes for piece in self._pieces if piece.memory is not None)

    @property
    def lendable_bytes(self) -> int:
        """Bytes that can be let go."""
        return sum(piece.memory.nbytes for piece in self._pieces if piece.memory is not None and piece.rows)

    def let_go(self, size: int) -> None:
        """Let go of pieces of `size` bytes together, or of all that are of blocks; nothing may be running."""
        self.close()
        for piece in reversed(self._pieces):
            if size <= 0:
                return
            if piece.memory is not None and piece.rows:
                size -= piece.memory.nbytes
                piece.memory = None
                for name in piece.names:
                    self._parameters[name].data = self._host[name]

    def take_again(self, beside: bool) -> None:
        """Bring back what was let go: `beside` the next forward, if its blocks are run as modules; else at once."""
        for piece in self._pieces:
            if piece.memory is None:
                mark = self._fetch(piece)
                if beside:
                    self._await(piece.rows, mark)
                else:
                    self._copy_stream.wait(mark)

    def _await(self, rows: Iterable[str], mark: Mark) -> None:
        """Let the first block that runs wait for a piece, before all that is hooked on to it."""

        def arrived(*_: object) -> None:
            self._copy_stream.wait(mark)
            for hook in hooks:
                hook.remove()

        blocks = [self._module.get_submodule(row) for row in rows]
        hooks = [block.register_forward_pre_hook(arrived, prepend=True) for block in blocks]
        self._hooks += hooks

    def close(self) -> None:
        """Take the hooks off, which hold on to the memory; nothing may be on its way any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _fetch(self, piece: Piece) -> Mark:
        """Copy a piece's weights to their places, in large parts: a file's neighbours stay such."""
        size = sum(room(self._host[name].nbytes) for name in piece.names)
        piece.memory = memory = memory_of_its_own(size, self._copy_stream.device)
        offset = 0
        spans: list[tuple[torch.Tensor, int, int]] = []  # (first source, bytes from it on, place in the memory)
        after: tuple[int, int] | None = None  # where the last source and its place end
        for name in sorted(piece.names, key=lambda name: self._host[name].data_ptr()):
            source = self._host[name]
            place = self._parameters[name].data = view_of(memory, offset, source)
            offset = place.data_ptr() - memory.data_ptr()
            if after == (source.data_ptr(), offset) and same_storage(spans[-1][0], source):
                first, length, start = spans.pop()
                spans.append((first, length + source.nbytes, start))
            else:
                spans.append((source, source.nbytes, offset))
            offset += source.nbytes
            after = source.data_ptr() + source.nbytes, offset
        copies = [(memory[start : start + length], flat_bytes(first, length)) for first, length, start in spans]
        return self._copy_stream.copy(copies, self._copy_stream.mark())


def pieces_of(names: Iterable[str], rows: Sequence[str], sizes: Mapping[str, int], piece_bytes: int) -> list[Piece]:
    """Return pieces of at least so many bytes, but for the last: what is of no block first, then block by block."""
    of_row: dict[str, list[str]] = {row: [] for row in rows}
    loose: list[str] = []
    for name in names:
        row = next((part for part in prefixes(name) if part in of_row), None)
        (loose if row is None else of_row[row]).append(name)
    pieces = [Piece(loose, [])] if loose else []
    size = piece_bytes
    for row, of_it in of_row.items():
        for name in of_it:
            if size >= piece_bytes:
                pieces.append(Piece([], []))
                size = 0
            pieces[-1].names.append(name)
            pieces[-1].rows += [row] if row not in pieces[-1].rows else []
            size += sizes[name]
    return pieces


def prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules that a weight is in, the outermost first."""
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)


def same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
