"""The digest of all that a model's stage computes with, by which models share what is known of it, and its workers.

Those with the same text stage share prompts' embeddings, those with the same VAE colors for previews. Workers are
shared where the pipeline's code meets the same configurations of other stages' components, too.

It is exact or not there: small files are read whole, large ones are known by the content that the hub's cache names
them by, or by being the very same file.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol.stages import Stage
from workers.models.skeleton import pipeline_class, plain_settings
from workers.models.source import Source, stages_of

SMALL = 64 << 20  # bytes of a file that is read whole
CONTENT = re.compile(r"[0-9a-f]{64}")  # name of a large file in the hub's cache: its SHA-256


def stage_digest(source: Source, stage: Stage) -> str:
    """Return sixteen hex digits, equal for models whose stages of a kind are; empty where that can't be told."""
    beside = any(stage in stages_of(name) for name in (*source.added, *source.single))
    if beside or source.ip_adapter or source.blocks:
        return ""
    cls = pipeline_class(source)
    names = sorted(source.components(stage))
    parts: list[Any] = [cls.__name__, plain_settings(source, cls), {name: source.index[name] for name in names}]
    for name in names:
        folder = source.folder_of(name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if (folder / "config.json").exists() and not any(path.suffix == ".safetensors" for path in files):
            return ""  # whose weights are not here yet
        parts += [(str(path.relative_to(source.folder)), content_of(path)) for path in files]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def worker_digests(source: Source, own: Mapping[Stage, str]) -> tuple[tuple[Stage, str], ...]:
    """Return digests that are equal where one model's worker of a stage can do the other's tasks.

    `own` are those of all that stages compute with. Those of a stage that can't be told are left out.
    """
    return tuple((stage, worker_digest(source, stage, digest)) for stage, digest in own.items() if digest)


def worker_digest(source: Source, stage: Stage, own: str) -> str:
    """Return sixteen hex digits, equal where also the configurations of all components are."""
    parts = [own]
    for name in sorted(source.index.keys() - source.components(stage)):
        folder = source.folder_of(name)
        files = sorted(path for path in folder.rglob("*.json") if not path.name.endswith(".index.json"))
        parts += [name, *source.index[name], *(f"{path.relative_to(folder)}: {content_of(path)}" for path in files)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def content_of(path: Path) -> str:
    """Return what a file's content is known by."""
    blob = path.resolve()
    if CONTENT.fullmatch(blob.name):
        return blob.name
    told = blob.stat()
    if told.st_size <= SMALL:
        return hashlib.sha256(blob.read_bytes()).hexdigest()
    return f"{told.st_dev}:{told.st_ino}:{told.st_size}:{told.st_mtime_ns}"
