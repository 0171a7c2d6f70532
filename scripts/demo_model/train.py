"""Train the demo model that ships with Triptych, from nothing, on one GPU.

    python -m scripts.demo_model.train --output workers/demo_model

A whole Flux pipeline in miniature, 10 M parameters in bf16. The two text encoders learn to read prompts, the VAE learns
drawn scenes, then the transformer learns to paint, by flow matching on the VAE's latents. Everything that a picture
shows is drawn by demo_scenes.py. On a CPU, `--smoke` runs every line in a minute and learns nothing.

Longer than other files: the phases of one training, in their order.
"""

import json
import math
import multiprocessing
import os
import random
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from scripts.demo_model import scenes

TEXT_LENGTH = 48  # T5 tokens in training, and the default of the shipped model
DEFAULTS = {"width": 128, "height": 128, "num_inference_steps": 10, "max_sequence_length": TEXT_LENGTH}


@dataclass(frozen=True, slots=True)
class Bucket:
    """A shape of training batch; only the first is compiled, since compiling the rare ones costs what it gains."""

    height: int
    width: int
    share: float  # of the steps, once SIZES_FROM of the time has passed; until then all go to the first
    batch: float  # of --batch
    text_length: int = TEXT_LENGTH

    def stance(self) -> AbstractContextManager[object]:
        stance: AbstractContextManager[object] = torch.compiler.set_stance(
            "default" if self is BUCKETS[0] else "force_eager"
        )
        return stance

    def lengthen(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return nearly what T5 gives with more padding: the last padding again and again."""
        more = tokens[:, -1:].expand(-1, self.text_length - TEXT_LENGTH, -1)
        return torch.cat([tokens, more], 1) if self.text_length > TEXT_LENGTH else tokens


BUCKETS = (
    Bucket(128, 128, 0.7, 1.0),
    Bucket(64, 64, 0.1, 0.75),
    Bucket(192, 192, 0.1, 0.375),
    Bucket(128, 192, 0.035, 0.375),
    Bucket(192, 128, 0.035, 0.375),
    Bucket(128, 128, 0.03, 0.125, 512),
)
SIZES_FROM = 0.5
EDGE_WEIGHT = 4.0
JITTER = 0.5  # of what the VAE sees: how far a painted object may stray from its place, size, angle and color
RARE = 0.1  # of the prompts get a picture in each size other than the first
VAE_SIZES = ((128, 128), (128, 128), (64, 64), (128, 128), (128, 128), (192, 192))


# -- the parts --------------------------------------------------------------------------------------


def t5_tokenizer() -> T5Tokenizer:
    """Whole words with and without a capital, and single characters for all the rest."""
    words = [w for word in scenes.vocabulary() for w in dict.fromkeys((word, word.capitalize()))]
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": -10.0, "▁": -4.0}
    pieces |= {piece: -2.0 for word in words for piece in ("▁" + word, word)}
    pieces |= {chr(c): -8.0 for c in range(33, 127) if chr(c) not in pieces}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges spell the words of the vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    vocab = dict.fromkeys(alphabet + [c + "</w>" for c in alphabet])
    merges: dict[tuple[str, str], None] = {}
    for word in filter(str.isalpha, scenes.vocabulary()):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab[parts[0]] = None
    tokens = [*vocab, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges), model_max_length=77)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(24, 48, 64, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_text_encoders(clip: CLIPTokenizer, t5: T5Tokenizer) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=128,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(t5),
        d_model=160,
        d_kv=40,
        d_ff=320,
        num_layers=4,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return CLIPTextModel(clip_config), T5EncoderModel(t5_config)


def build_transformer() -> FluxTransformer2DModel:
    """The transformer, whose modulations and output start at zero, so that each block starts as the identity."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=160,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    double = [norm.linear for b in transformer.transformer_blocks for norm in (b.norm1, b.norm1_context)]
    single = [block.norm.linear for block in transformer.single_transformer_blocks]
    for layer in (*double, *single, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


# -- data -------------------------------------------------------------------------------------------


def _prompts(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[scenes.Scene]]:
    """Prompts as tokens of CLIP and T5, whose words the latter are, and the scenes; none of a held-out combination."""
    seed, count = job
    rng = random.Random(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    texts: list[str] = []
    spans: list[list[tuple[int, int]]] = []
    kept: list[scenes.Scene] = []
    while len(kept) < count:
        scene = scenes.random_scene(rng, full=rng.random() < 0.35)
        given = [t for t in scene.things if min(t.color, t.shape, t.size, t.place) >= 0]
        if any(scenes.held_out(t.color, t.shape, t.size, t.place) for t in given):
            continue
        text, words = scenes.compose(scene, rng, plain=rng.random() < 0.25)
        style = rng.random()
        texts.append(text.capitalize() if style < 0.2 else text.title() if style < 0.23 else text)
        spans.append(words)
        kept.append(scene)
    clip_ids = clip(texts, padding="max_length", max_length=77, truncation=True, return_tensors="np").input_ids
    read = t5(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="np",
        return_offsets_mapping=True,
    )  # fmt: skip
    owner = np.full(read.input_ids.shape, -1, np.int8)
    ends = read.offset_mapping[..., 1]
    for k in (0, 1):
        start, end = np.array([words[k] if k < len(words) else (0, 0) for words in spans]).T[:, :, None]
        owner[(start < ends) & (ends <= end)] = k
    return clip_ids.astype(np.int16), read.input_ids.astype(np.int16), owner, kept


class PromptPool:
    """Tokenized prompts on the device: `clip` (n, 77), `t5` (n, TEXT_LENGTH), what they ask for, and `owner`, of t5's
    shape: the object, 0 or 1, among whose words a token is, else -1."""

    def __init__(self, count: int, device: str, seed: int) -> None:
        chunk = 4096
        jobs = [(seed * 1_000_003 + i, chunk) for i in range(math.ceil(count / chunk))]
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are parallel enough
        with multiprocessing.get_context("fork").Pool() as pool:
            parts = pool.map(_prompts, jobs, chunksize=1)
        self.clip = torch.from_numpy(np.concatenate([part[0] for part in parts])).to(device)
        self.t5 = torch.from_numpy(np.concatenate([part[1] for part in parts])).to(device)
        self.owner = torch.from_numpy(np.concatenate([part[2] for part in parts])).to(device)
        asked = scenes.SceneBatch.of([scene for part in parts for scene in part[3]])
        self.attributes = asked.attributes.to(device)
        self.background = asked.background.to(device)
        self.second = asked.second.to(device)

    def sample(self, index: torch.Tensor) -> scenes.SceneBatch:
        return scenes.SceneBatch(self.attributes[index], self.background[index], self.second[index])


@dataclass
class Artist:
    """Draws random training pictures on the device."""

    device: str
    seed: int
    jitter: float = 1.0

    def __post_init__(self) -> None:
        self.atlas = scenes.shape_atlas().to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def draw(self, batch: scenes.SceneBatch, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (n, 3, h, w) in [-1, 1] and which of them may be learned from, (n,) of bool."""
        attributes, background, bad = scenes.fill_in(batch, self.generator)
        picture = scenes.draw(
            attributes, background, batch.second, self.atlas, height, width, self.generator, self.jitter
        )
        return picture, ~bad

    def open_scenes(self, count: int) -> scenes.SceneBatch:
        second = torch.rand(count, generator=self.generator, device=self.device) < 0.67
        whole = torch.full((count, 2, 4), -1, device=self.device)
        return scenes.SceneBatch(whole, torch.full((count,), -1, device=self.device), second)


# -- training ---------------------------------------------------------------------------------------


class StepDeadlines:
    """Learning rate over a budget of minutes: a short warm-up, then a cosine to zero."""

    def __init__(self, minutes: float, rate: float, steps: int | None) -> None:
        self.start, self.seconds, self.rate, self.steps = time.monotonic(), minutes * 60, rate, steps

    def share(self, step: int) -> float:
        return step / self.steps if self.steps else (time.monotonic() - self.start) / self.seconds

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> bool:
        """Sets the rate; False once the budget is spent."""
        share = min(1.0, self.share(step))
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = self.rate * warm * (0.5 + 0.5 * math.cos(math.pi * share))
        return share < 1


def train_vae(device: str, minutes: float, batch: int, steps: int | None, seed: int) -> AutoencoderKL:
    vae = build_vae().to(device).to(memory_format=torch.channels_last)
    artist, kind = Artist(device, seed), torch.device(device).type
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    pace, step = StepDeadlines(minutes, 2e-3, steps), 0
    while pace.set(optimizer, step):
        height, width = VAE_SIZES[step % len(VAE_SIZES)]
        count = max(2, batch * 128 * 128 // (height * width))
        picture, _ = artist.draw(artist.open_scenes(count), height, width)
        with torch.autocast(kind, torch.bfloat16):
            posterior = vae.encode(picture).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        decoded = decoded.float()
        error = F.l1_loss(decoded, picture) + 2 * F.mse_loss(decoded, picture)
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = error + 5e-5 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 256 == 0:
            l1 = F.l1_loss(decoded, picture).item()
            print(f"vae {step} l1 {l1:.4f} kl {kl.item():.3f} {time.monotonic() - pace.start:.0f} s", flush=True)
        step += 1
    vae.eval().requires_grad_(False)
    picture, _ = artist.draw(artist.open_scenes(8 * batch), 128, 128)
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16):
        latents = vae.encode(picture).latent_dist.mode().float()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    print(f"vae done: {step} steps, latents {latents.mean().item():.3f} ± {latents.std().item():.3f}", flush=True)
    return vae


class Average:
    """Exponential moving average of weights, with a horizon that grows with the steps."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.live = parameters
        self.kept = [p.detach().clone() for p in self.live]

    def update(self, step: int) -> None:
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.kept, [p.detach() for p in self.live], 1 - decay)

    def apply(self) -> None:
        for live, kept in zip(self.live, self.kept, strict=True):
            live.data.copy_(kept)


@dataclass(frozen=True, slots=True)
class Texts:
    """All prompts as the encoders that ship read them, bf16."""

    pooled: torch.Tensor  # of CLIP (n, 128)
    tokens: torch.Tensor  # of T5 (n, TEXT_LENGTH, 160)

    @staticmethod
    @torch.no_grad()
    def of(clip: CLIPTextModel, t5: T5EncoderModel, pool: PromptPool) -> "Texts":
        pooled = [clip(ids.int()).pooler_output for ids in pool.clip.split(8192)]
        tokens = [t5(ids.int())[0] for ids in pool.t5.split(8192)]
        return Texts(torch.cat(pooled), torch.cat(tokens))


@dataclass(frozen=True, slots=True)
class Lessons:
    """Encoded pictures of one size and which prompts they show, drawn once so that the flow need not wait for them."""

    latents: torch.Tensor  # packed and normalized, bf16 (n, tokens, 64)
    weight: torch.Tensor  # of each token's error, bf16 (n, tokens)
    prompt: torch.Tensor  # place of each picture's prompt in the pool (n,)
    ids: torch.Tensor  # where each token lies in the picture

    @staticmethod
    @torch.no_grad()
    def of(vae: AutoencoderKL, pool: PromptPool, artist: Artist, count: int, height: int, width: int) -> "Lessons":
        device = artist.device
        every = torch.randperm(len(pool.clip), generator=artist.generator, device=device)[:count]
        latents, weights, kept = [], [], []
        for index in every.split(1024 * 128 * 128 // (height * width)):
            picture, good = artist.draw(pool.sample(index), height, width)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                # Not a sample: the posterior's noise is nothing that a prompt could predict.
                mode = vae.encode(picture).latent_dist.mode().float()
            mode = (mode - vae.config.shift_factor) * vae.config.scaling_factor
            latents.append(FluxPipeline._pack_latents(mode, *mode.shape)[good].bfloat16())
            weights.append(edge_weights(picture)[good].bfloat16())
            kept.append(index[good])
        ids = FluxPipeline._prepare_latent_image_ids(1, height // 16, width // 16, device, torch.float32)
        return Lessons(torch.cat(latents), torch.cat(weights), torch.cat(kept), ids)


def edge_weights(picture: torch.Tensor) -> torch.Tensor:
    """1 for a token of one flat color, EDGE_WEIGHT where an outline passes: few tokens, and all of the shape."""
    reach = F.max_pool2d(picture, 16) + F.max_pool2d(-picture, 16)
    return 1 + (EDGE_WEIGHT - 1) * (reach.amax(1) > 0.1).float().flatten(1)


class Reader(torch.nn.Module):
    """Says from a text encoder's output what a prompt asks for; thrown away once the encoder can read."""

    SCENE = (9, 2)  # background, whether there is a second object; the choice 0 stands for what is left open
    THING = (9, 9, 4, 10)  # color, shape, size, place

    def __init__(self, width: int, choices: tuple[int, ...]) -> None:
        super().__init__()
        self.choices = choices
        self.head = torch.nn.Linear(width, sum(choices))

    def loss(self, read: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Cross-entropy of `wanted`, (…, choices), -100 where nothing is asked, and the share of faultless rows."""
        parts = self.head(read).float().split(self.choices, -1)
        answers = list(zip(parts, wanted.unbind(-1), strict=True))
        losses = [F.cross_entropy(part.flatten(0, -2), want.flatten(), ignore_index=-100) for part, want in answers]
        right = torch.stack([(part.argmax(-1) == want) | (want == -100) for part, want in answers], -1)
        return torch.stack(losses).sum(), right.flatten(1).all(1).float().mean().item()


def reading_goals(pool: PromptPool, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the goals of CLIP's summary: the whole scene (n, 10); each token of T5: its own object (n, tokens, 6)."""
    asked = pool.sample(index)
    scene = torch.stack([asked.background + 1, asked.second.long()], 1)
    first, second = asked.attributes[:, 0] + 1, torch.where(asked.second[:, None], asked.attributes[:, 1] + 1, 0)
    owner = pool.owner[index][..., None]
    own = torch.where(owner == 0, first[:, None], torch.where(owner == 1, second[:, None], -100))
    around = scene[:, None].expand(-1, owner.shape[1], -1)
    return torch.cat([scene, first, second], 1), torch.cat([around, own], 2)


def train_reading(
    clip: CLIPTextModel,
    t5: T5EncoderModel,
    pool: PromptPool,
    device: str,
    minutes: float,
    batch: int,
    steps: int | None,
    seed: int,
) -> None:
    """Teach the text encoders to read before anything is painted: pictures alone teach language slowly."""
    generator, kind = torch.Generator(device).manual_seed(seed + 2), torch.device(device).type
    whole = Reader(clip.config.hidden_size, Reader.SCENE + 2 * Reader.THING)
    of_clip, of_t5 = whole.to(device), Reader(t5.config.d_model, Reader.SCENE + Reader.THING).to(device)
    modules = [clip.to(device).train(), t5.to(device).train(), of_clip, of_t5]
    optimizer = flow_optimizer([p for module in modules for p in module.parameters()])
    pace, step = StepDeadlines(minutes, 1.5e-3, steps), 0
    while pace.set(optimizer, step):
        index = torch.randint(len(pool.clip), (batch,), generator=generator, device=device)
        with torch.autocast(kind, torch.bfloat16):
            pooled = clip(pool.clip[index].int()).pooler_output
            tokens = t5(pool.t5[index].int())[0]
        of_scene, of_tokens = reading_goals(pool, index)
        first, clip_right = of_clip.loss(pooled, of_scene)
        second, t5_right = of_t5.loss(tokens, of_tokens)
        optimizer.zero_grad(set_to_none=True)
        (first + second).backward()
        torch.nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(
                f"reading {step} right {clip_right:.3f} {t5_right:.3f} "
                f"loss {first.item():.3f} {second.item():.3f} {time.monotonic() - pace.start:.0f} s",
                flush=True,
            )
        step += 1
    for module in modules:
        module.eval().requires_grad_(False).to(torch.bfloat16)


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Half uniform, half logit-normal with its weight on noisy levels, where the layout is decided."""
    uniform = torch.rand(count, generator=generator, device=generator.device)
    normal = torch.randn(count, generator=generator, device=generator.device)
    return torch.where(uniform < 0.5, 2 * uniform, torch.sigmoid(normal + 0.4))


def flow_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW that decays matrices alone."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def flow_loss(
    transformer: FluxTransformer2DModel,
    texts: Texts,
    lessons: Lessons,
    bucket: Bucket,
    count: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Rectified flow: the transformer learns noise − latents at sigma·noise + (1 − sigma)·latents."""
    device = lessons.latents.device
    index = torch.randint(len(lessons.prompt), (count,), generator=generator, device=device)
    prompt = lessons.prompt[index]
    latents = lessons.latents[index].float()
    sigma = noise_levels(count, generator)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    level = sigma[:, None, None]
    with torch.autocast(device.type, torch.bfloat16), bucket.stance():
        flow = transformer(
            hidden_states=level * noise + (1 - level) * latents,
            timestep=sigma,
            pooled_projections=texts.pooled[prompt],
            encoder_hidden_states=bucket.lengthen(texts.tokens[prompt]),
            txt_ids=torch.zeros(bucket.text_length, 3, device=device),
            img_ids=lessons.ids,
        ).sample
    error = (flow.float() - (noise - latents)).square().mean(2)
    weight = lessons.weight[index].float()
    loss: torch.Tensor = (error * weight).sum() / weight.sum()
    return loss


def train_flow(
    transformer: FluxTransformer2DModel,
    texts: Texts,
    lessons: dict[tuple[int, int], Lessons],
    device: str,
    minutes: float,
    batch: int,
    steps: int | None,
    seed: int,
) -> None:
    generator, rng = torch.Generator(device).manual_seed(seed), random.Random(seed)
    parameters = list(transformer.to(device).train().parameters())
    average, optimizer = Average(parameters), flow_optimizer(parameters)
    pace, step, seen = StepDeadlines(minutes, 1.2e-3, steps), 0, 0
    while pace.set(optimizer, step):
        bucket = BUCKETS[step] if step < len(BUCKETS) else BUCKETS[0]  # each once at first: what fails, fails soon
        if step >= len(BUCKETS) and pace.share(step) > SIZES_FROM:
            bucket = rng.choices(BUCKETS, [b.share for b in BUCKETS])[0]
        count = max(2, int(batch * bucket.batch))
        loss = flow_loss(transformer, texts, lessons[bucket.height, bucket.width], bucket, count, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        seen += count
        if step % 250 == 0:
            print(f"flow {step} loss {loss.item():.4f} {time.monotonic() - pace.start:.0f} s", flush=True)
        step += 1
    average.apply()
    transformer.eval().requires_grad_(False)
    print(f"flow done: {step} steps, {seen} pictures", flush=True)


def save(pipeline: FluxPipeline, folder: Path) -> None:
    """The standard layout, bf16, and the defaults that suit this model."""
    pipeline.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    (folder / "triptych.json").write_text(json.dumps({"defaults": DEFAULTS}, indent=2) + "\n")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB", flush=True)


@click.command(help=__doc__.split("\n")[0])
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--device", default="cuda")
@click.option("--minutes", default=12.5, show_default=True, help="the whole training; the flow gets what is left")
@click.option("--vae-minutes", default=2.6, show_default=True)
@click.option("--reading-minutes", default=0.6, show_default=True)
@click.option("--batch", default=512, show_default=True, help="of the flow; reading takes twice, the VAE an eighth")
@click.option("--pool", default=450_000, show_default=True, help="different prompts")
@click.option("--seed", default=0, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--smoke", is_flag=True, help="a few tiny steps, to see that everything runs")
def main(
    output: Path, device: str, minutes: float, vae_minutes: float, reading_minutes: float, batch: int, pool: int,
    seed: int, compiled: bool, smoke: bool,
) -> None:  # fmt: skip
    start, steps = time.monotonic(), None
    if smoke:
        batch, pool, steps = 32, 200, 7
    torch.manual_seed(seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward failed on an H200 with torch 2.11
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    prompts = PromptPool(pool, device, seed)
    print(f"{len(prompts.clip)} prompts after {time.monotonic() - start:.0f} s", flush=True)
    clip_tok, t5_tok = clip_tokenizer(), t5_tokenizer()
    clip, t5 = build_text_encoders(clip_tok, t5_tok)
    transformer = build_transformer()
    train_reading(clip, t5, prompts, device, reading_minutes, 2 * batch, steps, seed)
    vae = train_vae(device, vae_minutes, batch // 8, steps, seed)
    for part in (vae, clip, t5, transformer):
        print(f"{type(part).__name__}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters", flush=True)
    artist, sizes = Artist(device, seed + 1, JITTER), dict.fromkeys((b.height, b.width) for b in BUCKETS)
    counts = (pool if size == (128, 128) else int(pool * RARE) for size in sizes)
    lessons = {size: Lessons.of(vae, prompts, artist, n, *size) for size, n in zip(sizes, counts, strict=True)}
    texts = Texts.of(clip, t5, prompts)
    print(f"pictures drawn and encoded after {time.monotonic() - start:.0f} s", flush=True)
    if compiled:
        transformer.compile_repeated_blocks(dynamic=False)
    left = minutes - (time.monotonic() - start) / 60
    train_flow(transformer, texts, lessons, device, left, batch, steps, seed)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.to(memory_format=torch.contiguous_format),
        text_encoder=clip,
        tokenizer=clip_tok,
        text_encoder_2=t5,
        tokenizer_2=t5_tok,
        transformer=transformer,
    )
    save(pipeline, output)
    print(f"done after {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
