"""The safetensors files of a component: which ones loading reads, and what their headers say. No weights are read."""

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from protocol.errors import ModelMissing

BASES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of file names, by library
LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library takes
LFS = b"version https://git-lfs"  # how a pointer begins that stands for a file which was not downloaded
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Damaged(Exception):
    """A file that is not what loading needs: `file` is its name, `fault` what is wrong, `remedy` what to do."""

    def __init__(self, file: str, fault: str, remedy: str) -> None:
        super().__init__(f"{file} {fault}")
        self.file, self.fault, self.remedy = file, fault, remedy


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a header describes it: its dtype by safetensors' name, its shape, and its bytes' begin and end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of a component, and the variant that they are of, such as fp16; None: the plain ones."""

    paths: tuple[Path, ...]
    variant: str | None = None
    index: Path | None = None  # which says what lies in which of several files


NUMBERED = re.compile(r"(^|-)\d+-of-\d+$")  # one of several files


def weight_files(folder: Path, library: str) -> WeightFiles:
    """Choose a component's files as `from_pretrained` does, or those of its only variant; Damaged."""
    if library not in BASES:  # a class of its pipeline's own module, by either library's names
        own = any(folder.glob(f"{BASES['transformers']}*.safetensors*"))
        return weight_files(folder, "transformers" if own else "diffusers")
    base = BASES[library]
    whole, index = folder / f"{base}.safetensors", folder / f"{base}.safetensors.index.json"
    order = (index, whole) if library == "diffusers" else (whole, index)
    for path in order:
        if path.exists() or path.is_symlink():
            return of_index(path, None) if path is index else WeightFiles((path,))
    single = re.compile(re.escape(base) + r"\.(?P<variant>[\w-]+)\.safetensors")
    several = re.compile(re.escape(base) + r"\.safetensors\.index\.(?P<variant>[\w-]+)\.json")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    matches = [match for name in names for pattern in (several, single) if (match := pattern.fullmatch(name))]
    variants = sorted({match["variant"] for match in matches if not NUMBERED.search(match["variant"])})
    if len(variants) > 1:
        raise Damaged(
            f"{folder.name}/", f"has weights in the variants {', '.join(variants)} only",
            f"Rename the files of one of them, without its name: {base}.safetensors.",
        )  # fmt: skip
    if not variants:
        others = [name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".msgpack", ".onnx"))]
        fault = f"has no weights as safetensors ({whole.name})" + (f", but {others[0]}" if others else "")
        raise Damaged(f"{folder.name}/", fault, "Download it again, or save it with pipeline.save_pretrained(FOLDER).")
    variant = variants[0]
    parts = folder / f"{base}.safetensors.index.{variant}.json"
    return (
        of_index(parts, variant)
        if parts.exists()
        else WeightFiles((folder / f"{base}.{variant}.safetensors",), variant)
    )


def of_index(path: Path, variant: str | None) -> WeightFiles:
    """The files that an index names, all in its own folder."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise Damaged(told(path), "names no files (weight_map)", "Download it again.")
    names = sorted({str(name) for name in found.values()})
    if outside := [name for name in names if Path(name).name != name]:
        raise Damaged(told(path), f"names a file outside of its folder: {outside[0]}", "Download it again.")
    return WeightFiles(tuple(path.parent / name for name in names), variant, path)


def told(path: Path) -> str:
    """A file as a person finds it in the model's folder."""
    return f"{path.parent.name}/{path.name}"


def check_file(path: Path) -> int:
    """The size of a regular file that holds something, in bytes; Damaged."""
    again = "Download it again."
    if path.is_symlink() and not path.exists():
        raise Damaged(told(path), "is a link to nothing", again)
    if not path.exists():
        raise Damaged(told(path), "is missing", again)
    if not path.is_file():
        raise Damaged(told(path), "is not a regular file", "Put the file itself there.")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(len(LFS))
    except OSError as error:
        raise Damaged(told(path), f"can't be read: {error.strerror}", "Make it readable.") from error
    if not size:
        raise Damaged(told(path), "is empty", again)
    if begin == LFS:
        raise Damaged(
            told(path), "is a Git LFS pointer, not the file that it stands for", "Run: git lfs pull. Or: hf download."
        )
    return size


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object; Damaged."""
    check_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(told(path), "is not valid JSON", "Download it again.") from error
    if not isinstance(found, dict):
        raise Damaged(told(path), "holds no JSON object", "Download it again.")
    return found


def header_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, its sizes checked against the file's; Damaged."""
    size = check_file(path)
    broken = Damaged(told(path), "is no safetensors file, or is damaged", "Download it again.")
    with path.open("rb") as file:
        begin = file.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
        if not 2 <= length <= LARGEST_HEADER:
            raise broken
        raw = file.read(length)
    if len(raw) < length:
        raise Damaged(told(path), f"is cut short, at {size} bytes", "Download it again.")
    try:
        entries = json.loads(raw)
        found = {name: stored(entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken from error
    wanted = 8 + length + max((tensor.end for tensor in found.values()), default=0)
    if size != wanted:
        how = "is cut short: it has" if size < wanted else "is longer than its header says: it has"
        raise Damaged(told(path), f"{how} {size} of {wanted} bytes", "Download it again.")
    return found


def stored(entry: Any) -> StoredTensor:
    """Return an entry's tensor; ValueError, KeyError or TypeError where it is not as the format wants it."""
    (start, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), str(entry["dtype"])
    if not all(isinstance(n, int) and n >= 0 for n in (start, end, *shape)):
        raise ValueError("offsets and sizes are whole numbers")
    if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError("a tensor's bytes are not those of its shape")
    return StoredTensor(dtype, shape, start, end)


def headers_of(files: WeightFiles) -> dict[str, StoredTensor]:
    """The tensors of all files of a component, by name; Damaged."""
    found: dict[str, StoredTensor] = {}
    for path in files.paths:
        found |= header_of(path)
    if files.index:
        listed = read_json(files.index)["weight_map"]
        if lost := sorted(set(listed) - set(found)):
            raise Damaged(told(files.index), f"names {lost[0]}, which is in none of its files", "Download it again.")
    return found


def missing(model: str, component: str, damaged: Damaged) -> ModelMissing:
    """The error for a person, naming component, file and what to do."""
    return ModelMissing(f"{model!r}, {component}: {damaged.file} {damaged.fault}.", damaged.remedy)
