"""`loras`: the LoRAs that jobs can name."""

import json
import sys
from pathlib import Path

import click

from orchestrator.cli.options import json_option, quiet_option, state_folder, state_option
from orchestrator.cli.table import print_lines, print_table
from protocol.client.client import Client
from protocol.units import format_bytes


@click.command()
@click.option("-m", "--model", metavar="NAME", help="Of one of several models. [default: the first one]")
@json_option
@quiet_option
@state_option
def loras(model: str | None, as_json: bool, quiet: bool, state: Path | None) -> None:
    """List the stack's LoRAs: what they were made for, and the words that they were trained with.

    \b
    triptych submit "a red circle" --lora NAME@0.8
    """
    with Client(state_folder(state)) as client:
        found = client.loras(model)
    if as_json:
        print(json.dumps([lora.model_dump(mode="json") for lora in found]))
    elif quiet:
        print_lines([lora.name for lora in found])
    else:
        rows = [
            [lora.name, lora.base or "?", str(lora.rank or "?"), format_bytes(lora.bytes), lora.triggers]
            for lora in found
        ]
        print_table(("name", "made for", "rank", "size", "words"), rows, wide=4)
        if not found:
            print("No LoRAs have a name here. Give a folder of them: triptych up --loras DIR", file=sys.stderr)
