"""Options that several commands share, and how they become the library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from adaptmerge.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])

SITE = "A site is one weight matrix (or bias) of the base model that adapters change."


def _apply(options: list[Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document only.")
base_option = click.option("--base", metavar="DIR", help="The base model (folder or hub id).")
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."
)

heads_option = click.option(
    "--heads",
    multiple=True,
    metavar="POLICY",
    help="Heads that differ: error, NAME (that input's, with its tokens), average, concat, separate or "
    "drop; MODULE=POLICY for one head; repeatable.",
)

merging_options = _apply(
    [
        click.option(
            "--method", default="linear", show_default=True, help="See adaptmerge methods."
        ),
        click.option("--weights", help="0.7,0.3 | ema:0.9 | last:5; default 1/N each."),
        click.option("--sum", "total", is_flag=True, help="Weight 1 for each instead of 1/N."),
        click.option(
            "--site",
            "rules",
            multiple=True,
            metavar="RULE",
            help="PATTERN[@KIND]:NAME=W,... for matching sites; repeatable, later wins.",
        ),
    ]
)

budget_options = _apply(
    [
        click.option("--rank", type=int, help="At most this rank per site."),
        click.option(
            "--energy", type=float, help="Keep this share of the squared norm, e.g. 0.99."
        ),
        click.option("--max-error", type=float, help="Lose at most this share of the norm."),
        click.option(
            "--per-site", is_flag=True, help="Hold --energy and --max-error at every site alone."
        ),
    ]
)

writing_options = _apply(
    [
        click.option(
            "--to", "target", metavar="FORMAT", help="Output format (adaptmerge formats)."
        ),
        click.option(
            "--as",
            "form",
            metavar="FAMILY",
            help="lora: every delta as plain LoRA; needs --base where it does.",
        ),
        click.option("--dtype", help="bf16, fp16 or fp32; default: the inputs' own."),
        click.option(
            "--ranks",
            default="uniform",
            show_default=True,
            help="uniform: one rank, zero padded; per-site: patterns.",
        ),
        click.option(
            "--peft-version",
            "version",
            metavar="VERSION",
            help="Write for this release of PEFT, e.g. 0.13; default: the newest known.",
        ),
        click.option(
            "--experts",
            metavar="LAYOUT",
            help="fused (as transformers 5) or per-expert; default: as the inputs.",
        ),
        base_option,
        click.option(
            "--allow",
            metavar="WHAT,...",
            default="",
            help="Go on in spite of: base, nonfinite, approximate, labels.",
        ),
        click.option("--strict", is_flag=True, help="Treat every assumption and loss as an error."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
        click.option("--jobs", type=click.IntRange(1), help="Sites worked on at once."),
        click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
        json_option,
    ]
)

extract_options = _apply(
    [
        click.option(
            "--embeddings",
            default="lora",
            show_default=True,
            metavar="HOW",
            help="Embeddings and the head over their tokens: lora, full or skip.",
        ),
        click.option(
            "--vectors",
            default="full",
            show_default=True,
            metavar="HOW",
            help="Norms, biases and other vectors: full or skip.",
        ),
        click.option(
            "--experts",
            metavar="LAYOUT",
            help="fused (as transformers 5; default) or per-expert.",
        ),
        click.option(
            "--to", "target", metavar="FORMAT", help="Output format (adaptmerge formats)."
        ),
        click.option("--dtype", help="bf16, fp16 or fp32; default: the checkpoints' own."),
        click.option(
            "--ranks",
            default="per-site",
            show_default=True,
            help="uniform: one rank, zero padded; per-site: patterns.",
        ),
        click.option(
            "--peft-version",
            "version",
            metavar="VERSION",
            help="Write for this release of PEFT, e.g. 0.13; default: the newest known.",
        ),
        click.option("--strict", is_flag=True, help="Treat every assumption and loss as an error."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
        click.option("--jobs", type=click.IntRange(1), help="Sites worked on at once."),
        click.option("--dry-run", is_flag=True, help="List what differs and write nothing."),
        json_option,
    ]
)


def budget_of(given: dict[str, Any]) -> Any:
    """The Budget of the budget options, taken out of `given`."""
    from adaptmerge.algebra.fit import Budget

    names = ("rank", "energy", "max_error", "per_site")
    return Budget(**{name: given.pop(name) for name in names})


def allowed(text: str) -> frozenset[str]:
    """The names in a comma-separated --allow."""
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def percentage(option: str, text: str) -> float:
    """A percentage such as "5%" as a share."""
    try:
        return float(text.removesuffix("%")) / 100
    except ValueError:
        raise UsageError(f"{option} {text}: expected a percentage such as 5%") from None


def named_paths(pairs: tuple[str, ...], option: str) -> dict[str, str]:
    """NAME=PATH pairs as a mapping."""
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise click.UsageError(f"{option} {pair!r}: expected NAME=PATH")
        found[name] = path
    return found
