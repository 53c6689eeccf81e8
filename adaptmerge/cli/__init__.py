"""The command line: the only place that prints or exits.

Exit codes: 0 done, 1 an error, 2 wrong usage, 3 a verification or comparison that did not pass,
130 interrupted.
"""

from __future__ import annotations

from typing import Any

import click

from adaptmerge import __version__
from adaptmerge.cli import (
    calibrate,
    combine,
    convert,
    diff,
    explain,
    extract,
    fuse,
    inspect,
    recipe,
    tables,
    verify,
)
from adaptmerge.cli.completion import with_completion
from adaptmerge.cli.last_resort import arguments_of, foreseen, unforeseen
from adaptmerge.cli.terminal import escape_what_has_no_character, print_problems, report_error
from adaptmerge.errors import AdaptmergeError, did_you_mean
from adaptmerge.lazy import without_logs

EPILOG = """\b
Examples:
  adaptmerge combine sql.safetensors chat.safetensors -o merged
  adaptmerge combine sql=./a:0.7 chat=org/name@main:0.3 --rank 16
  adaptmerge verify merged --base ./llama

\b
Exit codes: 0 done, 1 error, 2 usage, 3 verification failed, 130 interrupted.
Shell completion: eval "$(_ADAPTMERGE_COMPLETE=bash_source adaptmerge)"
"""


INTERRUPTED = 130  # what shells say of a program that SIGINT ended
INTO_ONE = "did you mean 'combine' (adapters into one) or 'fuse' (adapters into their base)?"
NEAR = {  # what other tools call it
    **dict.fromkeys(("merge", "join", "mix", "merge-and-unload", "merge_and_unload"), INTO_ONE),
    **dict.fromkeys(("bake", "fold", "apply"), "did you mean 'fuse'?"),
    **dict.fromkeys(("show", "info", "list", "ls", "describe"), "did you mean 'inspect'?"),
    **dict.fromkeys(("check", "test", "validate"), "did you mean 'verify'?"),
    **dict.fromkeys(("compare", "cmp"), "did you mean 'diff'?"),
    **dict.fromkeys(("export", "transform"), "did you mean 'convert'?"),
}
AS_JSON, GIVEN = "adaptmerge.as_json", "adaptmerge.given"  # keys in click's context


class Commands(click.Group):
    """A group that suggests the command that was meant and turns our errors into exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[AS_JSON], ctx.meta[GIVEN] = "--json" in args, list(args)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            hint = NEAR.get(args[0]) or did_you_mean(args[0], list(self.commands))
            raise click.UsageError(f"No such command {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        as_json: bool = ctx.meta[AS_JSON]
        try:
            with without_logs():
                return super().invoke(ctx)
        except AdaptmergeError as problem:
            report_error(problem, as_json=as_json)
            ctx.exit(problem.exit_code)
        except click.UsageError as problem:
            if as_json:
                print_problems([problem.format_message()])
            raise
        except Exception as problem:
            if foreseen(problem):
                raise
            inputs = arguments_of(self, ctx, ctx.meta[GIVEN])
            report_error(unforeseen(problem, inputs), as_json=as_json)
            ctx.exit(1)
        except KeyboardInterrupt:
            report_error(AdaptmergeError("interrupted: nothing was written"), as_json=as_json)
            ctx.exit(INTERRUPTED)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="adaptmerge")
def main() -> None:
    """Merge, convert and verify adapter checkpoints (LoRA and its kin)."""
    escape_what_has_no_character()


for command in (
    combine.combine,
    fuse.fuse,
    calibrate.calibrate,
    recipe.run,
    convert.convert,
    extract.extract,
    inspect.inspect,
    explain.explain,
    verify.verify,
    diff.diff,
    tables.formats,
    tables.methods,
):
    main.add_command(with_completion(command))
