"""adaptmerge fuse: adapters into the weights of a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adaptmerge.cli.options import (
    SITE,
    allowed,
    heads_option,
    json_option,
    merging_options,
    percentage,
)
from adaptmerge.cli.outcome import ARRIVES, ERROR, FLOOR, KEEPS, legend
from adaptmerge.cli.terminal import filled, print_json, progress, show_notes, table
from adaptmerge.errors import AdaptmergeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptmerge.commands.fuse import FuseReport
    from adaptmerge.commands.fuse.forecast import Expected
    from adaptmerge.commands.fuse.pieces.write import Line
    from adaptmerge.commands.fuse.plan import FusePlan

EPILOG = f"""\b
An adapter is [NAME=]SOURCE[:WEIGHT], as for combine; BASE a folder of a
transformers model, one file of its weights, a GGUF model, or a hub id.

{SITE}

\b
Examples:
  adaptmerge fuse ./llama ./adapter -o fused
  adaptmerge fuse ./llama sql=./a:0.7 chat=./b:0.3 --dtype bf16 -o fused
  adaptmerge fuse ./llama ./qlora --trained-on nf4,double -o fused
  adaptmerge fuse ./llama ./adapter --quant nf4 -o fused
  adaptmerge fuse model-Q4_K_M.gguf ./adapter -o fused
  adaptmerge fuse ./llama-nf4 ./adapter --calibration text.txt -o fused
  adaptmerge fuse ./fused ./adapter:-1 -o original-again
  adaptmerge verify fused --base ./llama
"""


@click.command(epilog=EPILOG, short_help="Fuse adapters into a base model's weights.")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True)
@click.option("-o", "--output", default="fused", show_default=True, help="Folder.")
@merging_options
@heads_option
@click.option("--dtype", help="bf16, fp16 or fp32 for all weights; default: each its own.")
@click.option(
    "--rounding",
    default="auto",
    show_default=True,
    help="nearest, stochastic, adaptive (keeps what nearest loses) or auto: adaptive where nearest would "
    "lose over 1 %.",
)
@click.option(
    "--quant",
    default="same",
    show_default=True,
    help="same (as the base is); bf16, fp16, fp32 (a quantised base's weights dequantised); or anew: nf4, "
    "nf4,double, fp4, fp4,double, int8, int4-g128, int8-channel, fp8-channel, gptq-int4-g128.",
)
@click.option(
    "--scales",
    default="solve",
    show_default=True,
    help="Of a quantised base: solve (move scales so that the adapters arrive exactly), only (leave "
    "codes as they are) or keep.",
)
@click.option(
    "--trained-on",
    metavar="WHAT",
    help="original, quantised, nf4, nf4,double, fp4, fp4,double or int8: what the base was while "
    "training.",
)
@click.option(
    "--original",
    metavar="DIR",
    help="With --trained-on original: what a quantised base was made of, to find how it was smoothed.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="A text that the base reads first, or what `adaptmerge calibrate` wrote: errors count by what "
    "flows into a layer.",
)
@click.option("--keep-tied", is_flag=True, help="Refuse to store a tied head apart.")
@click.option(
    "--max-loss",
    default=0.25,
    show_default=True,
    help="Largest error in the inputs that an adapter reads, relative to its change.",
)
@click.option(
    "--max-growth",
    metavar="PERCENT",
    default="0%",
    show_default=True,
    help="How much larger a quantised output may get by layers that stay in 16 bits where they would lose "
    "an adapter.",
)
@click.option("--seed", default=0, show_default=True, help="Of stochastic rounding.")
@click.option(
    "--allow",
    metavar="WHAT,...",
    default="",
    help="Go on in spite of: base, nonfinite, approximate, labels, loss.",
)
@click.option("--strict", is_flag=True, help="Treat every assumption and loss as an error.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--jobs", type=click.IntRange(1), help="Pieces worked on at once.")
@click.option(
    "--executor", default="local", show_default=True, help="local, or ray: a cluster's workers."
)
@click.option("--dry-run", is_flag=True, help="Print how weights will be rounded; write nothing.")
@json_option
def fuse(
    base: str,
    adapters: tuple[str, ...],
    output: str,
    rules: tuple[str, ...],
    allow: str,
    max_growth: str,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Fuse adapters into a base model's weights, streamed, rounding so that they survive."""
    from adaptmerge.commands import fuse as library
    from adaptmerge.formats.inputs import parse_input
    from adaptmerge.merging.weights import parse_rule

    options = library.FuseOptions(
        rules=tuple(parse_rule(rule) for rule in rules),
        allow=allowed(allow),
        max_growth=percentage("--max-growth", max_growth),
        **given,
    )
    specs = [parse_input(text) for text in adapters]
    if dry_run:
        _show_plan(library.plan_fusion(base, specs, options), as_json=as_json)
        return
    try:
        with progress("fusing") as advance:
            report = library.fuse(base, specs, Path(output), options, advance)
    except KeyboardInterrupt:
        sentence = (
            "interrupted: no output was written; the same command goes on with what is finished"
        )
        raise AdaptmergeError(sentence) from None
    if as_json:
        print_json({"path": output, **report.as_json()})
        return
    show_notes(report.notes)
    _show(output, report)


def _show(output: str, report: FuseReport) -> None:
    _show_adapters(report)
    kinds = [site.rounding for site in report.sites]
    rounded = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    click.echo(
        filled(
            f"wrote {output}: {len(report.changed)} tensors changed in {_files(len(report.shards))}; "
            f"rounding {rounded or 'none'}, |error|/|W| {report.noise:.2e}"
        )
    )


def _show_adapters(report: FuseReport) -> None:
    from adaptmerge.commands.fuse.report import percent

    weights, words = report.options["weights"], {"arrives": ARRIVES, "error": ERROR}
    if any(loss.floor is not None for loss in report.adapters.values()):
        words["floor"] = FLOOR
    rows: list[tuple[object, ...]] = []
    for item in report.inputs:
        loss = report.adapters.get(item["name"])
        row = (item["name"], item["format"], weights[item["name"]])
        if loss is None:
            rows.append((*row, *(None for _ in ("norm", "|dW|/|W|", *words))))
            continue
        shares = (loss.gain, loss.sub, loss.floor)[: len(words)]
        rows.append((*row, loss.norm, loss.relative, *map(percent, shares)))
    heads = ["adapter", "format", "weight", "norm", "|dW|/|W|", *words]
    table(heads, rows, right=range(2, len(heads)))
    click.echo(legend(**words))


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _show_plan(plan: FusePlan, *, as_json: bool) -> None:
    from adaptmerge.commands.fuse import predict
    from adaptmerge.commands.fuse.forecast import expected

    lines, running = predict(plan), plan.running
    losses = [expected(line, plan.options.scales, running) for line in lines]
    rows = [
        {
            "site": str(line.matrix.site),
            "tensor": line.tensor,
            "shape": line.matrix.shape,
            "dtype": line.stored_as,
            "weights": {part.adapter: part.weight for part in line.matrix.parts},
            "predicted": list(line.choice.predicted),
            "rounding": line.choice.rounding,
            "expected": [loss._asdict() for loss in found],
        }
        for line, found in zip(lines, losses, strict=True)
    ]
    if as_json:
        print_json({"plan": rows, "notes": [str(n) for n in plan.notes], "bytes": plan.nbytes})
        return
    show_notes(plan.notes)
    _show_lines(lines, losses)
    click.echo(
        f"{len(plan.targets.tensors)} tensors in {_files(len(plan.shards))}, "
        f"{plan.nbytes / 1e6:,.1f} MB; nothing was written"
    )


def _show_lines(lines: Sequence[Line], losses: Sequence[Sequence[Expected]]) -> None:
    words = {"error": f"expected {ERROR}", "floor": FLOOR} if any(losses) else {}
    shown = [
        (
            str(line.matrix.site),
            line.stored_as,
            " ".join(f"{part.weight:.4g}" for part in line.matrix.parts),
            _percents(line.choice.predicted),
            line.choice.rounding,
            *(
                _percents([getattr(one, name) for one in found])
                for name in ("sub", "floor")
                if words
            ),
        )
        for line, found in zip(lines, losses, strict=True)
    ]
    heads = ["site", "dtype", "weights", "nearest keeps", "rounding", *words]
    table(heads, shown, right=(3, 5, 6))
    click.echo(legend(nearest_keeps=KEEPS, **words))


def _percents(shares: Sequence[float | None]) -> str:
    """The shares of all adapters, as in "100 99.7 %"."""
    from adaptmerge.commands.fuse.report import percent

    shown = " ".join(percent(share).removesuffix(" %") for share in shares)
    return f"{shown} %" if any(share is not None for share in shares) else shown
