"""Tensor keys: prefixes removed, adapter names removed, every key accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from adaptmerge.adapters.graph import Kind, Note
from adaptmerge.adapters.module_paths import unwrapped
from adaptmerge.errors import InputError
from adaptmerge.files.tensor_file import TensorFile
from adaptmerge.tensors.refs import TensorRef

PREFIX = "base_model.model."
SHARED = "base_model"  # before the names of tensors that all modules share
SAVED = re.compile(r"\.modules_to_save(?:\.[^.]+)?\.(?=(weight|bias)$|[^.]+\.(weight|bias)$)")
TOKENS = re.compile(
    r"(?P<module>.*)\.token_adapter(?:\.[^.]+)?\.trainable_tokens_delta(?:\.[^.]+)?$"
)


@dataclass
class Keys:
    """The tensors of a file under plain keys, taken one by one; `finish` fails on what is left."""

    path: str
    refs: dict[str, TensorRef]
    renamed: int
    doubled: int = 0
    copies: int = 0
    problems: list[str] = field(default_factory=list)
    modules: dict[str, dict[str, TensorRef]] = field(default_factory=dict)

    @classmethod
    def of(cls, file: TensorFile, tuner: re.Pattern[str], prefix: str = PREFIX) -> Keys:
        """The keys of `file`, those of modules by the pattern of its tuner. Raises InputError when two
        keys are the same without their prefixes."""
        refs: dict[str, TensorRef] = {}
        problems: list[str] = []
        origins: dict[str, str] = {}
        renamed = doubled = 0
        for key, ref in file.refs.items():
            plain = unwrapped(key)
            renamed += plain != key
            plain = plain.removeprefix(prefix)
            doubled += plain.startswith(PREFIX)
            plain = plain.removeprefix(PREFIX)
            if plain in refs:
                problems.append(
                    f"{origins[plain]!r} and {key!r} name the same tensor once prefixes are "
                    "removed: delete the one that does not belong"
                )
            refs[plain], origins[plain] = ref, key
            problems += _empty(key, ref)
        if problems:
            raise InputError(problems, where=file.path)
        keys = cls(file.path, refs, renamed, doubled)
        keys._collect(tuner)
        keys._drop_copies()
        return keys

    def _collect(self, tuner: re.Pattern[str]) -> None:
        for key in list(self.refs):
            match = tuner.match(key)
            if match and match["module"] != SHARED:
                leaf = match["leaf"] + (".bias" if match["tail"] == "bias" else "")
                parts = self.modules.setdefault(match["module"], {})
                if leaf in parts:
                    self.problems.append(
                        f"{match['module']}: {leaf} is stored for several adapter names: "
                        "split the file first"
                    )
                parts[leaf] = self.refs.pop(key)

    def take(self, key: str) -> TensorRef | None:
        """The tensor of that plain key, taken off the list."""
        return self.refs.pop(key, None)

    def saved(self) -> Iterator[tuple[str, str, TensorRef]]:
        """(module, parameter, tensor) of all that is left: modules saved whole, biases, base copies."""
        for key in sorted(self.refs):
            if not TOKENS.match(key):
                module, _, param = SAVED.sub(".", key).rpartition(".")
                dtype = self.refs[key].dtype
                if dtype.torch_name is None or dtype.name == "C64":
                    del self.refs[key]
                    self.problems.append(f"tensor {key!r} has values of {dtype}: expected numbers")
                elif module and param:
                    yield module, param, self.refs.pop(key)

    def _drop_copies(self) -> None:
        """Takes off what PEFT stores of a head beside the head (bias="all"): the one before training, and
        the trained one again under the name of its wrapper."""
        for key in list(self.refs):
            again = key.replace(".modules_to_save.", ".")
            if ".original_module." in key or (again != key and again in self.refs):
                del self.refs[key]
                self.copies += 1

    def tokens(self) -> Iterator[tuple[str, TensorRef]]:
        """(embedding module, rows) of trainable tokens."""
        for key in sorted(self.refs):
            match = TOKENS.match(key)
            if match:
                yield match["module"], self.refs.pop(key)

    def notes(self) -> list[Note]:
        """What was changed in the names, and what was left out."""
        notes = []
        if self.renamed:
            what = f"wrapper prefixes were removed from {self.renamed} tensor names"
            notes.append(Note(Kind.INFO, what))
        if self.doubled:
            what = (
                f"the prefix {PREFIX} is doubled in {self.doubled} tensor names (PEFT was applied to a "
                "model that had an adapter), so that PEFT loads none of them: read without the second"
            )
            notes.append(Note(Kind.ASSUMED, what))
        if self.copies:
            what = f"{self.copies} tensors are left out: copies of heads that PEFT stores and does not load"
            notes.append(Note(Kind.INFO, what))
        return notes

    def finish(self) -> None:
        """Raises InputError with all problems found and every key that nothing claimed."""
        left = [f"tensor {key!r} belongs to nothing this format knows" for key in sorted(self.refs)]
        if self.problems or left:
            raise InputError([*self.problems, *left], where=self.path)


def _empty(key: str, ref: TensorRef) -> list[str]:
    """A tensor without values; several axes, one of them empty, are a rank or choice of 0 and no damage."""
    if ref.count or len(ref.shape) > 1:
        return []
    return [
        f"tensor {key!r} has shape {list(ref.shape)} and no values: it was saved under DeepSpeed ZeRO-3 "
        "without gathering the parameters; save it again with gathering, or rebuild it with zero_to_fp32"
    ]
