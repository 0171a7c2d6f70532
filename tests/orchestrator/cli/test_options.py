"""Options of commands that are put together from several sets."""

import click
import pytest

from orchestrator.cli import COMMANDS, LazyGroup, cli


@pytest.mark.parametrize("name", COMMANDS)
def test_no_two_options_of_a_command_have_one_name(name: str) -> None:
    assert isinstance(cli, LazyGroup)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    names = [parameter.name for parameter in command.params]
    assert sorted({*names}) == sorted(names)
