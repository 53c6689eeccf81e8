"""Which parameters of two checkpoints of one architecture are the same parameter, by their headers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from adaptmerge.adapters import experts
from adaptmerge.adapters.graph import Layer, Site
from adaptmerge.adapters.module_paths import layer_index, natural_key
from adaptmerge.bases.base import Base
from adaptmerge.errors import InputError
from adaptmerge.tensors.refs import TensorRef

EMBEDDING = re.compile(
    r"(.*_)?embed(ding)?s?(_(tokens|positions|in))?|wte|wpe|shared|relative_attention_bias"
)
# Buffers that checkpoints of older versions hold: masks, positions, frequencies.
BUFFERS = re.compile(r"(.*\.)?((attn|attention)\.(masked_)?bias|position_ids|.*inv_freq)")
ROUTERS = ("gate", "router")  # beside stacked experts these hold a bare matrix


@dataclass(frozen=True, slots=True)
class Pair:
    """One parameter: where it is, and its tensors as the checkpoints hold them, None where one has none;
    holds_tokens: whether its rows are those of the vocabulary."""

    site: Site
    before: TensorRef | None
    after: TensorRef | None
    holds_tokens: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tuned parameter, or where there is none of the base's."""
        found = self.after if self.after is not None else self.before
        return () if found is None else found.shape

    @property
    def is_vocabulary(self) -> bool:
        """Whether it is of an embedding or of the head over its tokens."""
        return self.holds_tokens or self.site.layer.kind == "embedding"

    @property
    def is_matrix(self) -> bool:
        """Whether a low-rank delta of it has a place."""
        shape = self.shape
        return len(shape) == 2 or (len(shape) > 2 and self.site.layer.kind in ("conv", "experts"))

    @property
    def is_resized(self) -> bool:
        """Whether the two hold different numbers of tokens."""
        if self.before is None or self.after is None or not self.is_vocabulary:
            return False
        before, after = self.before.shape, self.after.shape
        return before != after and before[1:] == after[1:]


def pairs_of(base: Base, tuned: Base, layout: str) -> list[Pair]:
    """All parameters of both, in natural order. layout: of experts, "fused" or "per-expert"."""
    found: dict[Site, Pair] = {}
    for model in (base, tuned):
        for site in (*_sites(model, tuned, layout), *_tied_sites(model, layout)):
            if site not in found:
                before, after = base.parameter(site), tuned.parameter(site)
                found[site] = Pair(site, before, after, tuned.holds_tokens(site.module))
    twice = _stored_inside(tuned)
    kept = [pair for pair in found.values() if f"{pair.site.module}.{pair.site.param}" not in twice]
    return sorted(kept, key=lambda pair: natural_key(str(pair.site)))


def _tied_sites(model: Base, layout: str) -> list[Site]:
    """What a model ties to something that it stores, which is a parameter of its own for an adapter."""
    names = [name for group in model.tied for name in group if name not in model.tensors]
    sites = []
    for name in names:
        module, _, param = name.rpartition(".")
        ref = model.parameter(Site(module, param))
        if ref is not None:
            sites.append(_site(module, param, ref.shape, layout, model))
    return sites


def _stored_inside(model: Base) -> set[str]:
    """Vectors that are also those of a layer with a matrix, where adapters keep them."""
    found = set()
    for group in model.tied:
        modules = {name: name.rpartition(".")[0] for name in group if name.endswith(".bias")}
        layers = [n for n, m in modules.items() if model.parameter(Site(m)) is not None]
        found |= set(modules) - {*layers} if layers else set()
    return found


def _sites(model: Base, tuned: Base, layout: str) -> Iterator[Site]:
    for name, ref in model.tensors.items():
        module, _, param = name.rpartition(".")
        if not ref.dtype.is_float or BUFFERS.fullmatch(name):
            continue
        one = experts.matrix_of(module) if param == "weight" else None
        if one is not None and layout == experts.FUSED:
            stack = Layer("experts", stacked=model.expert_count)
            yield replace(one.fused, layer=stack)
        elif param in experts.STACKED and len(ref.shape) == 3:
            yield from _apart(Site(module, param), ref.shape[0], model, layout)
        else:
            yield _site(_spelled(module, model, tuned, layout), param, ref.shape, layout, model)


def _apart(site: Site, count: int, model: Base, layout: str) -> Iterator[Site]:
    """The matrices of a stacked parameter."""
    layer = Layer("experts", stacked=count)
    for expert in range(count):
        one = replace(site, layer=layer, expert=expert)
        if layout == experts.FUSED:
            yield one
            continue
        if model.expert_style is None:
            sentence = (
                "its experts have no known spelling one by one: leave out --experts per-expert"
            )
            raise InputError(sentence, where=str(model.path))
        for part in experts.STACKED[site.param]:
            yield Site(experts.module_of(one, part, model.expert_style))


def _spelled(module: str, model: Base, tuned: Base, layout: str) -> str:
    """The path with the prefix that one of the two has, and the block of experts as the layout has it."""
    other = tuned.locate(module)
    if other is not None and other.endswith(f".{module}"):
        module = other
    style = model.expert_style
    if style is None or not style.block:
        return module
    names = (style.block, style.fused_block)
    old, new = names if layout == experts.FUSED else names[::-1]
    return re.sub(rf"(?<=\.){old}(?=\.|$)", new, module)


def _site(module: str, param: str, shape: tuple[int, ...], layout: str, model: Base) -> Site:
    owner, _, leaf = module.rpartition(".")
    if len(shape) < 2:
        return Site(module, param)
    stacked = layout == experts.FUSED and model.locate(f"{owner}.experts") is not None
    if param != "weight" or (stacked and leaf in ROUTERS):
        return Site(module, param, Layer("parameter"))
    if len(shape) > 2:
        return Site(module, param, Layer("conv", kernel=shape[2:]))
    is_embedding = EMBEDDING.fullmatch(leaf) and module != model.head
    return Site(module, param, Layer("embedding") if is_embedding else Layer())


def problems_of(pairs: list[Pair]) -> list[str]:
    """What says that the two are no models of one architecture."""
    found = []
    for pair in pairs:
        before, after = pair.before, pair.after
        found += [
            f"{_name(pair)} is {ref.dtype} in the {model}: expected floating-point numbers"
            for model, ref in (("base", before), ("tuned model", after))
            if ref is not None and not ref.dtype.is_float
        ]
        if before is not None and after is not None and before.shape != after.shape:
            if not pair.is_resized:
                found.append(
                    f"{_name(pair)} is {list(before.shape)} in the base and {list(after.shape)} in "
                    "the tuned model: are they of one architecture?"
                )
        elif before is None and layer_index(pair.site.module) is not None:
            found.append(f"{_name(pair)} is in the tuned model only: are they of one architecture?")
    return found


def _name(pair: Pair) -> str:
    return f"{pair.site.module}.{pair.site.param}".lstrip(".")
