"""Time jobs that use another LoRA than the job before them: a whole stack with two of them, in turns and not.

    python -m scripts.bench.adapters /tmp/flux --budgets 40,16

The LoRAs have random weights at the model's real shapes, for the attention of each of its blocks. Prompts are known, so
that the denoiser's seconds are the difference. Prints one JSON line a row.
"""

import statistics
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file

from protocol.client.client import Client
from scripts.bench.gpu_stacks import GIB, PROMPT, StackBench, row, watched
from workers.models.skeleton import on_meta
from workers.models.source import read

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
TIMES = 4
GOAL = 0.05  # seconds


def write_loras(model: Path, folder: Path, names: tuple[str, ...], rank: int) -> int:
    """Write LoRAs of a model's denoiser; return the bytes of each."""
    source = read(str(model), model, None)
    component = next(name for name in ("transformer", "unet") if name in source.index)
    denoiser = on_meta(source, component)
    assert denoiser
    generator, size = torch.Generator().manual_seed(1), 0
    for name in names:
        tensors: dict[str, torch.Tensor] = {}
        for path, layer in denoiser.named_modules():
            if isinstance(layer, torch.nn.Linear) and path.endswith(LAYERS):
                for leaf, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                    drawn = torch.randn(shape, generator=generator) * 0.01
                    tensors[f"{component}.{path}.lora_{leaf}.weight"] = drawn.to(torch.bfloat16)
        save_file(tensors, folder / f"{name}.safetensors")
        size = sum(tensor.nbytes for tensor in tensors.values())
    return size


class AdapterBench(StackBench):
    """Stacks on one GPU, whose jobs name LoRAs."""

    def seconds(self, client: Client, lora: str | None) -> float:
        """Return the denoiser's seconds of a job."""
        loras = [lora] if lora else []
        job = client.wait(client.submit(PROMPT, seed=1, loras=loras, **self.recipe).id, 600)
        return next(record.seconds for record in job.records if record.stage == "denoise")

    def pixels(self, client: Client, lora: str) -> bytes:
        job = client.wait(client.submit(PROMPT, seed=2, loras=[lora], **self.recipe).id, 600)
        return bytes(client.raw_pictures(job.id)[1].data)

    def switching(self, budget: int, folder: Path) -> None:
        with watched(self.used) as most, self.stack(budget, "--loras", str(folder)) as client:
            first = {name or "none": self.seconds(client, name) for name in (None, "one", "two", "one", "two")}
            before = self.pixels(client, "one")
            alone = {name: [self.seconds(client, name) for _ in range(TIMES)] for name in (None, "one", "two")}
            turns = [self.seconds(client, name) for _ in range(TIMES) for name in ("one", "two")]
            same = [*alone["one"], *alone["two"]]
            medians = [statistics.median(times[1:]) for times in alone.values()]
            row(what=f"{budget / GIB:g} GiB", none_s=medians[0], one_s=medians[1], two_s=medians[2],
                in_turns_s=statistics.median(turns), first_s=tuple(first.values()),
                a_switch_s=statistics.mean(turns) - statistics.mean(same), goal=GOAL,
                equal=self.pixels(client, "one") == before, driver_GB=most[0] / 1e9)  # fmt: skip


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--budgets", default="40,16", show_default=True, help="GiB")
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--size", default=1024, show_default=True)
@click.option("--steps", default=28, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--logs", type=click.Path(path_type=Path), help="folder to keep the stacks' logs in")
def main(model: Path, budgets: str, device: str, size: int, steps: int, rank: int, logs: Path | None) -> None:
    bench = AdapterBench(model, (0,), device.startswith("cuda"), size, steps, 0.0, np.zeros(0), logs)
    with tempfile.TemporaryDirectory() as folder:
        size_of_one = write_loras(model, Path(folder), ("one", "two"), rank)
        row(what="LoRAs", rank=rank, GB_each=size_of_one / 1e9)
        for gib in budgets.split(","):
            bench.switching(int(float(gib) * GIB), Path(folder))


if __name__ == "__main__":
    main()
