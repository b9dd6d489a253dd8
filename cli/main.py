"""The door: the table of subcommands, exit codes, and how errors look.

Only Typer is imported here; the module of a subcommand is imported when that subcommand runs.
A new subcommand is `cli/<name>.py` with one function, and one line in `COMMANDS`.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# name: (module, function, the line in `assay --help`)
COMMANDS = {
    "train": ("cli.train", "train", "Train one run, a sweep, or a whole experiment."),
    "eval": ("cli.eval", "eval_", "Score a model, checkpoint or endpoint on a task or suite."),
    "judge": ("cli.judge", "judge", "Rubrics and pairwise judging (CDRRM); benchmarks of judges."),
    "synth-data": ("cli.synth_data", "synth_data", "Synthesise tool-calling conversations from triples (ToolForge)."),
    "score-transfer": ("cli.score_transfer", "score_transfer", "Predict which domains a fine-tune will change (STS)."),
    "report": ("cli.report", "report", "Tables with intervals, plots and a sample browser from recorded runs."),
    "ls": ("cli.ls", "ls", "List methods, tasks, models, objectives, experiments, engines, suites."),
    "memory": ("cli.memory", "memory", "List what a graph memory has learned; merge, save, export and draw it."),
    "playground": ("cli.playground", "playground", "Serve the tools of task=local_life over HTTP."),
    "doctor": ("cli.doctor", "doctor", "Check this machine and its installation."),
    "validate": ("cli.validate", "validate", "Check configuration files, also your own, against the contract."),
}

INTERRUPTED = "Interrupted. The same line again goes on from the last checkpoint."

HELP = """A laboratory for LLM post-training methods: one line per experiment, honest tables on disk.

\b
Examples:
  assay train method=ha_dw task=arithmetic seed=1
  assay train experiment=demo
  assay report demo
  assay ls methods

Each subcommand has its own --help with examples. Exit codes: 0 done, 1 the run failed,
2 wrong usage or configuration, 130 interrupted and resumable."""


class Door(TyperGroup):
    """A command group that imports a subcommand's module only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[cmd_name]
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name=cmd_name)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(app)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from methods.errors import nearest

            known = ", ".join(COMMANDS)
            ctx.fail(f"there is no command '{args[0]}'; {nearest(args[0], COMMANDS) or f'commands: {known}'}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            # The pool of runs passes on which signal it was: KeyboardInterrupt(15) after SIGTERM.
            signum = stop.args[0] if stop.args and isinstance(stop.args[0], int) else 2
            typer.echo(INTERRUPTED, err=True)
            raise typer.Exit(128 + signum) from None
        except BrokenPipeError:  # the reader has seen enough, as in `assay report | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            if type(error).__module__.startswith(("typer", "click")):
                raise  # usage errors and exits are Typer's to print
            if ctx.params.get("debug"):
                traceback.print_exc()
            text, code = describe(error)
            typer.echo(f"assay: error: {text}", err=True)
            raise typer.Exit(code) from None


def describe(error: Exception) -> tuple[str, int]:
    """The paragraph for the user and the exit code. An error that is not ours is a bug and says where it arose."""
    from methods.errors import AssayError

    if isinstance(error, AssayError):
        return str(error), error.exit_code
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    reason = " ".join(str(error).split())
    return f"{type(error).__name__}{where}: {reason} (the same line with --debug shows the whole traceback)", 1


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("assay"))
        raise typer.Exit()


app = typer.Typer(cls=Door, help=HELP, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback(help=HELP)
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere in the line.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(argv: list[str] | None = None) -> None:
    """Run one command line. Raises SystemExit with the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    # `--debug` belongs to every subcommand; Typer would accept it only in front of the subcommand's name.
    if "--debug" in words:
        words = ["--debug", *(w for w in words if w != "--debug")]
    typer.main.get_command(app).main(args=words, prog_name="assay")
