"""adaptmerge calibrate: what flows into the layers of a base while it reads a text."""

from __future__ import annotations

from pathlib import Path

import click

from adaptmerge.cli.options import json_option
from adaptmerge.cli.terminal import print_json, progress

EPILOG = """\b
BASE is a folder of a transformers model with its tokenizer, quantised or not,
a GGUF model, or a hub id; TEXT a file in UTF-8.

\b
Examples:
  adaptmerge calibrate ./llama-nf4 text.txt -o moments.safetensors
  adaptmerge fuse ./llama-nf4 ./adapter --calibration moments.safetensors
"""


@click.command(epilog=EPILOG, short_help="Measure the inputs of a base's layers, for fuse.")
@click.argument("base")
@click.argument("text")
@click.option(
    "-o", "--output", default="moments.safetensors", show_default=True, help="A safetensors file."
)
@click.option(
    "--tokens", default=16384, show_default=True, help="Read at most, from all over TEXT."
)
@click.option(
    "--rank", default=32, show_default=True, help="Directions kept of each layer's inputs."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@json_option
def calibrate(
    base: str,
    text: str,
    output: str,
    tokens: int,
    rank: int,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Measure what flows into the layers of BASE while it reads TEXT, for fuse --calibration."""
    from adaptmerge.commands import calibrate as library

    options = library.Calibration(tokens, rank, device, force)
    with progress("reading") as advance:
        found = library.calibrate(base, Path(text), Path(output), options, advance)
    if as_json:
        print_json({"path": output, **found._asdict()})
        return
    click.echo(f"wrote {output}: inputs of {found.modules} layers over {found.tokens:,} tokens")
