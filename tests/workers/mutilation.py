"""Ways in which a model's folder can be broken, each as a copy of it that shares all other files."""

import functools
import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A change of one file, given from the model's folder on."""

    file: str
    how: str
    change: Change

    def __str__(self) -> str:
        return f"{self.file} {self.how}"

    def applied(self, model: Path, to: Path) -> Path:
        """The broken copy, whose other files are hard links."""
        for path in model.rglob("*"):
            target = to / path.relative_to(model)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                os.link(path, target) if same_device(path, to) else target.write_bytes(path.read_bytes())
        target = to / self.file
        data = target.read_bytes()
        target.unlink()
        target.write_bytes(data)  # no longer the same file as the model's
        self.change(target)
        return to


def same_device(path: Path, to: Path) -> bool:
    return path.stat().st_dev == to.stat().st_dev


def files(model: Path) -> Iterator[Case]:
    """Every file removed, emptied, cut short, and replaced by a pointer."""
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        name = str(path.relative_to(model))
        yield Case(name, "removed", Path.unlink)
        yield Case(name, "emptied", lambda path: os.truncate(path, 0))
        yield Case(name, "cut short", lambda path: os.truncate(path, path.stat().st_size * 2 // 3))
        yield Case(name, "a pointer", lambda path: void(path.write_text(POINTER)))


def folders(model: Path) -> Iterator[str]:
    yield from sorted(path.name for path in model.iterdir() if path.is_dir() and path.name != "loras")


def tensors(model: Path) -> Iterator[Case]:
    """Every tensor dropped, and every one that isn't square transposed."""
    for path in sorted(model.rglob("*.safetensors")):
        if path.parent.name == "loras":
            continue
        name = str(path.relative_to(model))
        for tensor, entry in header(path).items():
            yield Case(name, f"without {tensor}", functools.partial(drop_tensor, tensor=tensor))
            shape = entry["shape"]
            if len(shape) > 1 and shape[0] != shape[1]:
                turned = [shape[1], shape[0], *shape[2:]]
                yield Case(name, f"{tensor} turned", functools.partial(turn, tensor=tensor, shape=turned))


def keys(model: Path) -> Iterator[Case]:
    """Every key of every JSON file dropped, but for the entries of vocabularies."""
    for path in sorted(model.rglob("*.json")):
        name = str(path.relative_to(model))
        for way in ways(json.loads(path.read_text())):
            yield Case(name, f"without {'.'.join(way)}", functools.partial(drop_key, way=way))


def ways(value: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and "vocab" not in before and len(before) < 3:
        for key, inner in value.items():
            yield (*before, key)
            yield from ways(inner, (*before, key))


def drop_key(path: Path, way: tuple[str, ...]) -> None:
    found = json.loads(path.read_text())
    owner = found
    for key in way[:-1]:
        owner = owner[key]
    del owner[way[-1]]
    path.write_text(json.dumps(found))


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(length))
    found.pop("__metadata__", None)
    return dict(found)


def drop_tensor(path: Path, tensor: str) -> None:
    rewrite(path, lambda found: found.pop(tensor))


def turn(path: Path, tensor: str, shape: list[int]) -> None:
    rewrite(path, lambda found: found[tensor].update(shape=shape))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A file whose header is changed, its tensors' bytes one after the other: holes, which nobody is to read."""
    found = header(path)
    change(found)
    end = 0
    for entry in sorted(found.values(), key=lambda entry: entry["data_offsets"]):
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = [end, end + stop - start]
        end += stop - start
    raw = json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)


def void(_: object) -> None:
    """For a change that returns something."""
