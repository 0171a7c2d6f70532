"""The `triptych` command. Each command's module is imported only when it runs, so that --help is quick."""

import contextlib
import errno
import importlib
import io
import os
import sys
from typing import Any

import click

from protocol.errors import Interrupted, TriptychError
from protocol.visible import visible

LONG_NAME = 80  # characters of a file's name that an error shows
COMMANDS = {  # name → (module, attribute, what `triptych --help` says)
    "run": ("orchestrator.cli.run", "run", "Make pictures without a stack: start one, use it, stop it."),
    "up": ("orchestrator.cli.up", "up", "Start a stack and keep it running, in the foreground."),
    "down": ("orchestrator.cli.down", "down", "Stop the running stack."),
    "submit": ("orchestrator.cli.submit", "submit", "Submit prompts to the running stack and wait for the pictures."),
    "jobs": ("orchestrator.cli.jobs", "jobs", "List jobs."),
    "show": ("orchestrator.cli.jobs", "show", "Show everything about jobs."),
    "wait": ("orchestrator.cli.submit", "wait", "Wait for jobs and write their pictures."),
    "cancel": ("orchestrator.cli.jobs", "cancel", "Cancel jobs."),
    "retry": ("orchestrator.cli.submit", "retry", "Run failed or cancelled jobs again, or make a PNG's picture again."),
    "workers": ("orchestrator.cli.stack", "workers", "Show the workers of the running stack."),
    "top": ("orchestrator.cli.top", "top", "Show what the stack does, until Ctrl-C."),
    "restart": ("orchestrator.cli.stack", "restart", "Restart a stage's workers."),
    "models": ("orchestrator.cli.models", "models", "List the stack's models; load and unload them."),
    "loras": ("orchestrator.cli.loras", "loras", "List the LoRAs that jobs can name."),
    "hosts": ("orchestrator.cli.hosts", "hosts", "List the stack's other hosts; cordon and drain them."),
    "join": ("orchestrator.cli.join", "join", "Let this machine's GPUs work for a stack on another one."),
    "drain": ("orchestrator.cli.stack", "drain", "Give a stage's workers nothing more to do."),
    "scale": ("orchestrator.cli.stack", "scale", "Change how many workers a stage has."),
    "gc": ("orchestrator.cli.jobs", "gc", "Remove old jobs and their pictures."),
    "keys": ("orchestrator.cli.keys", "keys", "Let clients and workers on other machines in."),
    "logs": ("orchestrator.cli.logs", "logs", "Show the logs of a stack."),
    "plan": ("orchestrator.cli.plan", "plan", "What a stack would do on these GPUs, or on others."),
    "doctor": ("orchestrator.cli.doctor", "doctor", "Check this machine, and say what to run next."),
    "pull": ("workers.pull", "pull", "Download a model from the hub, before a stack needs it."),
    "worker": ("workers.command", "worker", "Run one stage worker: in a stack, or alone for debugging."),
    "completion": ("orchestrator.cli.completion", "completion", "Print the shell completion script."),
}

EPILOG = """\b
Exit codes: 0 done, 2 wrong usage, 3 no stack reachable, 4 model missing or not permitted,
5 does not fit, 6 job failed, 7 state can't be written, 8 state damaged, 124 timeout, 130 interrupted, 129 and
143 hung up and terminated.
Every option can be set as TRIPTYCH_COMMAND_OPTION; TRIPTYCH_STATE names the stack's folder.
"""


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, COMMANDS[name][2]) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], self.list_commands(ctx), 1)
            hint = f" Did you mean {close[0]!r}?" if close else " 'triptych --help' lists the commands."
            raise click.UsageError(error.message + hint, ctx) from error


@click.group(
    cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
@click.version_option(package_name="triptych")
def cli(debug: bool) -> None:
    """Pictures from large diffusion models on the GPUs that you own.

    \b
    Quick start, with the small demo model (it draws colored shapes, for demonstration only):
      triptych run "a large red circle at the top left and a small blue star on a yellow background"
    """


def main() -> None:
    """Entry point: one line and an exit code for each error that a person can mend."""
    debug = "--debug" in sys.argv or os.environ.get("TRIPTYCH_DEBUG", "") not in ("", "0")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a terminal's encoding has no characters for
    code = run_command(debug)
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141 if isinstance(error, BrokenPipeError) else code or 1
        if code != 141:
            say_error(f"The output can't be written: {error.strerror}.")
    sys.exit(code)


def run_command(debug: bool) -> int:
    """Run what the command line says; the exit code."""
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        cli.main(argv, prog_name="triptych", standalone_mode=False, auto_envvar_prefix="TRIPTYCH")
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return 130
    except Interrupted as error:
        print("Interrupted.", file=sys.stderr)
        return 128 + error.number
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        return explain(error)
    return 0


def explain(error: Exception) -> int:
    """Say an error in a line; the exit code."""
    match error:
        case TriptychError():
            say_error(str(error))
            return error.exit_code
        case OSError(filename=str(name), strerror=str(why)):
            say_error(f"{name if len(name) < LONG_NAME else name[:LONG_NAME] + '…'!r}: {why}.")
            return 2 if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EINVAL) else 1
        case OSError():
            say_error(f"{error.strerror or error}.")
        case _:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            say_error(f"{text[:500]} That is a fault of Triptych's; --debug says where.")
    return 1


def say_error(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"Error: {visible(text)}", file=sys.stderr)
