"""IA3: learned scales of a module's outputs, or of its inputs for feed-forward modules."""

from __future__ import annotations

from adaptmerge.edits import Scale
from adaptmerge.formats.peft.config import PeftConfig
from adaptmerge.formats.peft.keys import Keys
from adaptmerge.formats.peft.lora import saved_edits
from adaptmerge.graph import Edit, Note, Site
from adaptmerge.registry import ReadOptions


def read(keys: Keys, config: PeftConfig, options: ReadOptions) -> tuple[list[Edit], list[Note]]:
    """ia3_l is (out, 1) and scales weight and bias, or (1, in) and scales the input side."""
    notes = keys.notes()
    edits: list[Edit] = saved_edits(keys, config, notes)
    for module, parts in keys.modules.items():
        vector = parts["ia3_l"]
        if vector.shape[0] == 1 and vector.count > 1:
            edits.append(Scale(Site(module), vector.reshape(vector.count), "in"))
            continue
        column = vector.reshape(vector.count)
        edits += [Scale(Site(module), column), Scale(Site(module, "bias"), column)]
    return edits, notes
