"""Where a model's files are, and which of them a stage needs.

A model is a folder in the diffusers layout, a hub repo id, or `demo`, the one that ships with Triptych. Whatever it
was, it becomes a local folder here, with only this stage's weights downloaded.
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ModelMissing
from protocol.jobs import Stage

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo_model"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
VAES = ("vae", "vqvae", "movq")
DENOISERS = ("transformer", "unet", "prior", "decoder")
TEXT = ("text_encoder", "tokenizer", "text_processor", "processor")
SKIP = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.onnx*", "*.fp16.*", "*.non_ema.*", "*.png", "*.jpg")
SAMPLE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Source:
    """`index` is model_index.json without its private entries: component name → (library, class)."""

    model: str
    folder: Path
    revision: str
    pipeline: str
    index: dict[str, tuple[str, str]]

    def components(self, stage: Stage) -> set[str]:
        """The components with weights, tokenizers or settings that a stage loads."""
        return {name for name in self.index if stage in stages_of(name)}

    def settings(self) -> dict[str, Any]:
        """What the model's own triptych.json says, such as defaults for its jobs."""
        path = self.folder / "triptych.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}


def stages_of(component: str) -> tuple[Stage, ...]:
    """Which stages need a component of a pipeline, by the names that diffusers uses throughout."""
    if component.startswith(TEXT):
        return ("text",)
    if component.startswith(VAES):
        return ("vae",)
    if component.startswith(DENOISERS):
        return ("denoise",)
    if component == "scheduler":
        return ("text", "denoise", "vae")
    return ()


def locate(model: str, revision: str | None, stage: Stage | None) -> Source:
    """Find or download what a stage needs, without a stage no weights; ModelMissing with what to do about it."""
    if model == DEMO:
        return read(model, DEMO_FOLDER, None)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return read(model, folder.resolve(), None)
    if not REPO_ID.fullmatch(model):
        raise ModelMissing(
            f"There is no model {model!r}.",
            "Give a folder in the diffusers layout, a hub id such as black-forest-labs/FLUX.1-dev, or demo.",
        )
    snapshot = download(model, revision, stage)
    return read(model, snapshot, snapshot.name)


def read(model: str, folder: Path, revision: str | None) -> Source:
    """The source in a local folder; a folder without a commit gets a fingerprint of its files."""
    try:
        raw = json.loads((folder / "model_index.json").read_text())
        pipeline = str(raw["_class_name"])
        entries = {name: value for name, value in raw.items() if not name.startswith("_") and isinstance(value, list)}
        index = {name: (str(library), str(cls)) for name, (library, cls) in entries.items() if cls is not None}
    except (OSError, ValueError, KeyError) as error:
        raise ModelMissing(
            f"{model!r} is not a model in the diffusers layout: its model_index.json is missing or can't be read.",
            "Save one there with pipeline.save_pretrained(FOLDER).",
        ) from error
    return Source(model, folder, revision or fingerprint(folder), pipeline, index)


def fingerprint(folder: Path) -> str:
    """Sixteen hex digits that change with any configuration, tensor name, shape or size, or sampled weight."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".model", ".txt")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size}\n".encode())
        with path.open("rb") as file:
            if path.suffix != ".safetensors" or size < 16 * SAMPLE_BYTES:
                digest.update(file.read())
                continue
            (header,) = struct.unpack("<Q", file.read(8))
            digest.update(file.read(min(header, size)))
            for part in range(8):
                file.seek(8 + header + (size - 8 - header - SAMPLE_BYTES) * part // 7)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def download(repo: str, revision: str | None, stage: Stage | None) -> Path:
    """This stage's files of a hub repo, in the Hugging Face cache; nothing if they are there already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    small = ["model_index.json", "triptych.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja"]
    try:
        base = Path(snapshot_download(repo, revision=revision, allow_patterns=small, ignore_patterns=[*SKIP]))
        if stage is None:
            return base
        weights = [f"{name}/*.safetensors" for name in read(repo, base, base.name).components(stage)]
        return Path(
            snapshot_download(repo, revision=base.name, allow_patterns=[*small, *weights], ignore_patterns=[*SKIP])
        )
    except GatedRepoError as error:
        hint = f"Accept its licence at its page on the hub, then: hf auth login. Or use an ungated one, such as {DEMO}."
        raise ModelMissing(f"{repo!r} is gated, and this account has no access.", hint) from error
    except RevisionNotFoundError as error:
        raise ModelMissing(f"{repo!r} has no revision {revision!r}.", "Leave --revision out for the newest.") from error
    except RepositoryNotFoundError as error:
        raise ModelMissing(
            f"The hub has no model {repo!r}, or it is private.", "Check the name, or: hf auth login."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelMissing(
            f"{repo!r} is not in the Hugging Face cache and can't be downloaded.",
            f"With a network: hf download {repo}. HF_HUB_OFFLINE must not be set for that.",
        ) from error
