"""Module paths: wrapper prefixes, layer numbers, natural order, and suffixes that match exactly."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

# Wrappers that training code puts around modules and forgets in checkpoint keys.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What versions of transformers call the same modules: from 4.52 on the language model of one that
# sees lies inside "model"; from 5 on the experts of Mixtral and its kin are the "mlp".
DRIFTS = (
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(?=layers\.|embed_tokens$|norm$)"), "model.language_model."),
    (re.compile(r"^model\.language_model\.(?=layers\.|embed_tokens$|norm$)"), "model."),
    (re.compile(r"(?<=\.)block_sparse_moe(?=\.|$)"), "mlp"),
    (re.compile(r"(?<=\.)mlp(?=\.(gate|experts)(\.|$))"), "block_sparse_moe"),
)


def other_versions(path: str) -> list[str]:
    """What a module path is in other versions of transformers; none for most."""
    spelled = (pattern.sub(name, path, count=1) for pattern, name in DRIFTS)
    return [other for other in spelled if other != path]


def unwrapped(path: str) -> str:
    """The module path without the components that training wrappers add."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def layer_index(module: str) -> int | None:
    """The number of the layer a module belongs to: the first all-digit component of its path."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def original(module: str, ranges: Sequence[tuple[int, int]]) -> str:
    """The path, in the base, of a module of a layer that is a copy; itself where it is none."""
    copies = [index for start, stop in ranges for index in range(start, stop)]
    index = layer_index(module)
    if index is None or index >= len(copies):
        return module
    before, _, after = module.partition(f".{index}.")
    return f"{before}.{copies[index]}.{after}"


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """A sort key under which checkpoint-200 comes before checkpoint-1000."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def is_suffix(suffix: str, module: str) -> bool:
    """Whether `suffix` selects `module` as PEFT's target_modules do: equal, or its last components."""
    return module == suffix or module.endswith("." + suffix)


def suffixes(module: str) -> list[str]:
    """All suffixes of a path on component borders, the shortest first."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]


def exact_suffixes(
    modules: Collection[str], others: Iterable[str], complete: Collection[str] | None
) -> list[str]:
    """The fewest, shortest suffixes that select every one of `modules` and nothing else.

    `others` are modules known to exist and not wanted. `complete` are suffixes known to select no
    module outside `modules` and `others`; None says that these two are all the modules there are.
    A full path is always accepted.
    """
    unwanted = {suffix for other in others for suffix in suffixes(other)}

    known = frozenset(complete or ())

    def safe(suffix: str) -> bool:
        if suffix in unwanted:
            return False
        return complete is None or any(part in known for part in suffixes(suffix))

    chosen = (next((s for s in suffixes(module) if safe(s)), module) for module in sorted(modules))
    found = set(chosen)
    shortest = [s for s in found if not any(part in found for part in suffixes(s)[:-1])]
    return sorted(shortest, key=lambda s: (s.count("."), natural_key(s)))


# What embeddings and heads whose rows are the tokens of a vocabulary are called: no labels, and not to be
# stacked. A model's class knows better (`bases/ties.py`); these are for where there is none.
INPUTS = (
    *(
        "embed_tokens",
        "wte",
        "word_embeddings",
        "word_embedding",
        "shared",
        "embed_in",
        "embeddings",
    ),
    *("tok_embeddings", "tokens_embed"),
)
OUTPUTS = (
    *("lm_head", "embed_out", "proj_out", "output_embeddings", "output_projection", "lm_loss"),
    *("vocab_projector", "generator_lm_head"),
)
VOCABULARY = INPUTS + OUTPUTS
