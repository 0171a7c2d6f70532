"""`completion`: the script that makes a shell complete Triptych's commands and options."""

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of SHELL. For bash: triptych completion bash >> ~/.bashrc"""
    from orchestrator.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(cli, {}, "triptych", "_TRIPTYCH_COMPLETE").source())
