"""`pull`: a model from the hub, with all that its stages need and nothing else."""

import sys
from pathlib import Path

import click

from protocol.errors import BadRequest
from protocol.model_spec import DEMO, ModelSpec
from protocol.stages import STAGES, Stage


@click.command()
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit. [default: the newest]")
@click.option("--base", metavar="MODEL", help="Of a model that is one file: whose configuration it goes by.")
@click.option("--controlnet", metavar="MODEL", help="A ControlNet besides.")
@click.option("--refiner", metavar="MODEL", help="A refiner besides.")
@click.option("--ip-adapter", metavar="OWNER/NAME/FILE", help="An IP-Adapter besides.")
@click.option(
    "--transformer", metavar="OWNER/NAME/FILE", help="The denoiser's weights in one file, in place of its own."
)
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True,
              help="Weights of this stage alone; several may be given. [default: of all]")  # fmt: skip
def pull(model: str, stages: tuple[Stage, ...], **parts: str | None) -> None:
    """Download MODEL from the hub into the Hugging Face cache, and print its folder.

    Only what the stages need: one variant of the weights, as safetensors. A download that was cut off goes on where it
    ended, and what is there already is left as it is.

    \b
    triptych pull black-forest-labs/FLUX.1-schnell
    triptych pull Tongyi-MAI/Z-Image-Turbo --stage text
    """
    if model == DEMO:
        raise BadRequest("The demo model ships with Triptych.", "There is nothing to be downloaded.")
    if Path(model).expanduser().is_dir():
        raise BadRequest(f"{model!r} is a folder here.", "There is nothing to be downloaded.")
    from workers.models.source import locate

    spec = ModelSpec(name=model, **parts)
    for stage in stages or STAGES:
        print(f"{model}: what {stage} needs …", file=sys.stderr)
        source = locate(spec, stage)
    print(source.folder)
