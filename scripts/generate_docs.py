"""Reference pages made of the code: commands from click, settings from their fields.

python -m scripts.generate_docs            write docs/commands.md and docs/configuration.md
python -m scripts.generate_docs --check    fail if they are not as they would be written
"""

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from orchestrator.cli import COMMANDS, LazyGroup, cli
from orchestrator.cli.stack_options import PARTS_OF_STACK, flags_of, help_of
from orchestrator.settings import HostConfig, HttpSettings, JobSettings, RaySettings, Settings, StackConfig, StageConfig

DOCS = Path(__file__).parents[1] / "docs"
MADE = "<!-- Made by `python -m scripts.generate_docs`; change the code, not this page. -->\n"


def commands() -> str:
    """Each command with its options."""
    assert isinstance(cli, LazyGroup)
    lines = ["# Commands", "", MADE]
    lines += ["Data goes to stdout, progress and messages to stderr. `NO_COLOR` is honoured.", ""]
    lines += ["| command | what |", "|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {row[2]} |" for name, row in COMMANDS.items()]
    with click.Context(cli, info_name="triptych") as context:
        for name in COMMANDS:
            command = cli.get_command(context, name)
            assert command is not None
            lines += ["", f"## {name}", "", *of_command(command, click.Context(command, context, name))]
    return "\n".join(lines) + "\n"


def of_command(command: click.Command, context: click.Context) -> list[str]:
    if isinstance(command, click.Group):
        lines = [text_of(command)]
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            lines += [
                "",
                f"### {context.info_name} {name}",
                "",
                *of_command(below, click.Context(below, context, name)),
            ]
        return lines
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [text_of(command), "", "```console", f"triptych {path_of(context)} {usage}", "```"]
    options = [p for p in command.get_params(context) if isinstance(p, click.Option) and not p.hidden]
    rows = [record for option in options if (record := option.get_help_record(context))]
    return [*lines, "", "| option | what |", "|---|---|", *(f"| `{cell(a)}` | {cell(b)} |" for a, b in rows)]


def path_of(context: click.Context) -> str:
    above = context.parent
    names = f"{path_of(above)} " if above and above.info_name != "triptych" else ""
    return f"{names}{context.info_name}"


def text_of(command: click.Command) -> str:
    """A command's help; what click prints as it is becomes a block of code."""
    paragraphs = (command.help or "").replace("\f", "").split("\n\n")
    found: list[str] = []
    for paragraph in paragraphs:
        if paragraph.strip().startswith("\b"):
            body = [
                line[2:] if line.startswith("  ") else line for line in paragraph.split("\b", 1)[1].splitlines() if line
            ]
            found.append("\n".join(["```console", *body, "```"]))
        else:
            found.append(" ".join(paragraph.split()))
    return "\n\n".join(found)


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def configuration() -> str:
    """Each setting with its key, flag, values and default."""
    lines = ["# Configuration", "", MADE]
    lines += [
        "Keys of the TOML file that `triptych up --config FILE` reads, and flags of `up`, `run` and `plan`. Flags win",
        "over `TRIPTYCH_UP_…` variables, which win over the file, which wins over the defaults.",
        "",
    ]
    apart = {name for part in PARTS_OF_STACK for name in part.model_fields}
    lines += ["## The stack", "", *table(StackConfig, lambda name: name not in apart)]
    lines += ["", "## A stage", "", "In `[stages.text]`, `[stages.denoise]` and `[stages.vae]`.", ""]
    lines += table(StageConfig, lambda name: True)
    lines += [
        "",
        "## Another host",
        "",
        "In `[hosts.NAME]`, NAME being that of its key; what is not said is as the plan says.",
    ]
    lines += ["", "| key | what |", "|---|---|"]
    lines += [f"| `{name}` | {cell(field.description or '')} |" for name, field in HostConfig.model_fields.items()]
    lines += ["", "## Jobs, and what is kept", "", *table(JobSettings, lambda name: True)]
    lines += ["", "## Hosts of a Ray cluster", "", *table(RaySettings, lambda name: True)]
    lines += ["", "## HTTP", "", *table(HttpSettings, lambda name: True), "", "Words for quality, in a file:", ""]
    lines += ["```toml", "[http_qualities.low]", "steps = 0.5  # times the model's own", "```"]
    return "\n".join(lines) + "\n"


def table(settings: type[Settings], wanted: Any) -> list[str]:
    rows = ["| key | flag | what |", "|---|---|---|"]
    for name, field, flag in flags_of(settings):
        if wanted(name):
            metavar = f" {flag.metavar}" if flag.metavar else ""
            rows.append(
                f"| `{name}` | `{cell(flag.option + metavar)}` | {cell(help_of(field, flag) + values_of(field))} |"
            )
    return rows


def values_of(field: FieldInfo) -> str:
    if get_origin(field.annotation) is None:
        return ""
    choices = [str(choice) for choice in get_args(field.annotation) if isinstance(choice, str)]
    return f" One of {', '.join(choices)}." if choices else ""


def main() -> None:
    pages = {"commands.md": commands(), "configuration.md": configuration()}
    if "--check" in sys.argv:
        stale = [name for name, text in pages.items() if (DOCS / name).read_text() != text]
        if stale:
            sys.exit(f"{', '.join(stale)} is not what the code says: run python -m scripts.generate_docs")
        return
    for name, text in pages.items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
