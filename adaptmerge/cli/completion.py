"""What a shell completes: paths where sources and outputs stand, and the words that options know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from adaptmerge.errors import AdaptmergeError

Items = list[CompletionItem]
Completer = Callable[[click.Context, str], Items]


class Completed(click.types.StringParamType):
    """Text of which a shell can complete something."""

    def __init__(self, complete: Completer) -> None:
        self.complete = complete

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        return self.complete(ctx, incomplete)


def path(ctx: click.Context, incomplete: str) -> Items:
    """Files and folders, which the shell finds itself."""
    return [CompletionItem(incomplete, type="file")]


def source(ctx: click.Context, incomplete: str) -> Items:
    """A path, also one after NAME=, which shells other than bash take for one word."""
    name, equals, rest = incomplete.partition("=")
    folder = Path(rest).parent if not rest.endswith("/") else Path(rest)
    if not equals or Path(name).parent != Path() or not folder.is_dir():
        return path(ctx, incomplete)
    shown = rest[: rest.rfind("/") + 1]
    found = sorted(folder.iterdir())
    ends = {f"{shown}{p.name}" + ("/" if p.is_dir() else ""): p for p in found}
    return [CompletionItem(f"{name}={text}") for text in ends if text.startswith(rest)]


def words(known: Callable[[], Mapping[str, str] | Iterable[str]]) -> Completer:
    """The known words that begin so, with what is said of each."""

    def complete(ctx: click.Context, incomplete: str) -> Items:
        found = known()
        said = found if isinstance(found, Mapping) else dict.fromkeys(found, "")
        fitting = (word for word in said if word.startswith(incomplete))
        return [CompletionItem(word, help=said[word] or None) for word in fitting]

    return complete


def _allowable(ctx: click.Context, incomplete: str) -> Items:
    """What this command can be allowed, also after others and a comma."""
    from adaptmerge.commands import combine, fuse

    known = fuse.ALLOWABLE if ctx.info_name == "fuse" else combine.ALLOWABLE
    before, comma, last = incomplete.rpartition(",")
    free = (word for word in known if word not in before.split(","))
    return [CompletionItem(before + comma + word) for word in free if word.startswith(last)]


def _methods() -> Mapping[str, str]:
    from adaptmerge.methods.registry import methods

    return {name: found.summary for name, found in methods().items()}


def _forms() -> Iterable[str]:
    from adaptmerge.methods.registry import methods

    return sorted(set(chain.from_iterable(found.forms for found in methods().values())))


def _targets() -> Mapping[str, str]:
    from adaptmerge.outputs.target import writable

    return {found.name: found.title for found in writable()}


def _versions() -> Iterable[str]:
    from adaptmerge.outputs.target import writable

    return [version for found in writable() for version in found.versions]


def _dtypes() -> Iterable[str]:
    from adaptmerge.tensors.dtypes import SPELLINGS

    return SPELLINGS


def _heads() -> Iterable[str]:
    from adaptmerge.merging.heads.policies import WORDS

    return WORDS


def _layouts() -> Iterable[str]:
    from adaptmerge.adapters.experts import LAYOUTS

    return LAYOUTS


def _roundings() -> Iterable[str]:
    from adaptmerge.rounding.error_feedback import ROUNDINGS
    from adaptmerge.rounding.floats import AUTO

    return (AUTO, *ROUNDINGS)


def _quants() -> Iterable[str]:
    from adaptmerge.commands.fuse.options import SAME, WIDE
    from adaptmerge.schemes.scheme import quantisers

    return (SAME, *WIDE, *quantisers())


def _scales() -> Iterable[str]:
    from adaptmerge.rounding.scales import SCALES

    return SCALES


def _trained_on() -> Iterable[str]:
    from adaptmerge.commands.fuse.on_base.provenance import TRAINED_ON

    return TRAINED_ON


def _sites(ctx: click.Context, incomplete: str) -> Items:
    """The sites of the output that is named before."""
    from adaptmerge.commands.fuse.report import is_fused, load_fuse_report
    from adaptmerge.outputs.report import load_report

    output = ctx.params.get("output")
    if not isinstance(output, Path):
        return []
    try:
        lines = load_fuse_report(output).sites if is_fused(output) else load_report(output).sites
    except AdaptmergeError:
        return []
    found = dict.fromkeys(line.site for line in lines)
    return [CompletionItem(site) for site in found if site.startswith(incomplete)]


SOURCES = ("inputs", "input_", "adapters", "a", "b", "base", "tuned", "original")
COMPLETERS: Mapping[str, Completer] = {
    **dict.fromkeys(SOURCES, source),
    **dict.fromkeys(("output", "text", "calibration"), path),
    "method": words(_methods),
    "target": words(_targets),
    "dtype": words(_dtypes),
    "form": words(_forms),
    "version": words(_versions),
    "experts": words(_layouts),
    "heads": words(_heads),
    "allow": _allowable,
    "rounding": words(_roundings),
    "quant": words(_quants),
    "scales": words(_scales),
    "trained_on": words(_trained_on),
    "ranks": words(lambda: ("uniform", "per-site")),
    "weights": words(lambda: ("ema:", "last:")),
    "device": words(lambda: ("auto", "cpu", "cuda", "mps")),
    "executor": words(lambda: ("local", "ray")),
    "embeddings": words(lambda: ("lora", "full", "skip")),
    "vectors": words(lambda: ("full", "skip")),
    "site": _sites,
}


def with_completion(command: click.Command) -> click.Command:
    """The command, of whose texts a shell completes what it can."""
    for param in command.params:
        if param.name in COMPLETERS and isinstance(param.type, click.types.StringParamType):
            param.type = Completed(COMPLETERS[param.name])
    return command
