"""VeRA: two vectors per site around matrices A and B that all sites share."""

from __future__ import annotations

from dataclasses import replace

from adaptmerge.edits import Add, vera
from adaptmerge.files.refs import TensorRef
from adaptmerge.formats.peft.config import PeftConfig
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.formats.peft.lora import saved_edits
from adaptmerge.graph import Edit, Kind, Note, Site
from adaptmerge.registry import ReadOptions


def read(keys: Keys, config: PeftConfig, options: ReadOptions) -> tuple[list[Edit], list[Note]]:
    """Each site takes the first rows of B and the first columns of A, as PEFT slices them."""
    notes = keys.notes()
    down, up = _shared(keys, "vera_A"), _shared(keys, "vera_B")
    if down is None or up is None:
        keys.problems.append(
            "vera_A and vera_B are not stored (save_projection was off): adapters whose projections "
            "must be regenerated are not read yet"
        )
        keys.modules.clear()
        return [], notes
    if options.base is None:
        notes.append(
            Note(
                Kind.ASSUMED,
                f"input widths are not stored: all modules are taken to have {down.shape[1]}; "
                "with --base the real ones are used",
            )
        )
    edits: list[Edit] = saved_edits(keys, config, notes)
    for module, parts in keys.modules.items():
        out = parts["vera_lambda_b"].count
        width = _width(config, options, module, down)
        factor = vera(
            up.slice(0, 0, out),
            parts["vera_lambda_b"],
            down.slice(1, 0, width),
            parts["vera_lambda_d"],
        )
        edits.append(Add(Site(module), factor))
    return edits, notes


def _shared(keys: Keys, name: str) -> TensorRef | None:
    ref = keys.take(f"base_model.{name}") or keys.take(name)
    return None if ref is None else replace(ref, shared=True)


def _width(config: PeftConfig, options: ReadOptions, module: str, down: TensorRef) -> int:
    """The input width of a module, which the file does not say: the base's, or all of A."""
    weight = options.base.parameter(Site(module)) if options.base else None
    return down.shape[1] if weight is None else weight.shape[1]
