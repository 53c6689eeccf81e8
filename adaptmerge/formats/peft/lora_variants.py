"""What each variant of a LoRA makes of the two sides that a module stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from adaptmerge.adapters.families.alora import Alora
from adaptmerge.adapters.families.attention import InAttention
from adaptmerge.adapters.families.bdlora import BlockDiagonal
from adaptmerge.adapters.families.grouped import Grouped
from adaptmerge.adapters.families.initialised import Initialised, since
from adaptmerge.adapters.families.kasa import Kasa
from adaptmerge.adapters.families.qalora import Pooled
from adaptmerge.adapters.families.training_state import WithState
from adaptmerge.adapters.graph import Edit, Kind, Note, Site
from adaptmerge.adapters.stored_edits import Opaque
from adaptmerge.adapters.weight_edits import Add, Dora
from adaptmerge.algebra.factors import Factor
from adaptmerge.algebra.low_rank import low_rank
from adaptmerge.formats.peft.config_problems import MOVED_INITS, variants_in
from adaptmerge.formats.peft.tuner import Malformed, Parts, Reading
from adaptmerge.tensors.refs import TensorRef

PLAIN = frozenset(
    {"lora_A", "lora_B", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"}
    | {"lora_magnitude_vector"}
)
STATE = ("lora_velora_", "lora_monteclora_")
SAYS = "{name} is set: PEFT has this variant for linear layers only, found a layer of kind {layer}"
DOUBLED = "PEFT adds the delta of an nn.MultiheadAttention's out_proj twice, as in training: so it is read"


class SidePair(NamedTuple):
    """Two sides: up (out, r), down (r, in), with its kernel for convolutions; `first` are the same as
    initialised. inner: the out_proj of an attention module."""

    site: Site
    up: TensorRef
    down: TensorRef
    scale: float
    first: tuple[TensorRef, TensorRef] | None = None
    inner: bool = False

    @property
    def linear(self) -> bool:
        return self.site.layer.kind == "linear"


def edit_of(reading: Reading, pair: SidePair, parts: Parts) -> Edit:
    """The edit of a weight. Raises ValueError."""
    name = next(iter(variants_in(reading.config.raw)), "")
    if name not in ("", "use_dora"):
        _check_variant(reading, name, pair)
    extra = set(parts) - PLAIN
    state = {leaf for leaf in extra if leaf.startswith(STATE)}
    known = state | ({"lora_diag"} if name == "kasa_config" else set())
    if name != "arrow_config" and extra - known:
        raise Malformed(
            f"{', '.join(sorted(extra - known))} is stored, which the config names no use of"
        )
    if state and name == "":
        name = "velora_config"
    return READERS[name](reading, pair, parts)


def _check_variant(reading: Reading, name: str, pair: SidePair) -> None:
    if not pair.linear:
        raise Malformed(SAYS.format(name=name, layer=pair.site.layer.kind))
    if pair.first is not None:
        raise Malformed(f"{name} is set: ?init= is for a plain LoRA, leave it out")
    if init := moved_init(reading):
        raise Malformed(f"{name} is set together with init_lora_weights {init!r}: use one of them")


def beside(reading: Reading, site: Site, column: Factor) -> Edit:
    """The edit of a bias, which acts where the weight's does."""
    tokens = reading.config.raw.get("alora_invocation_tokens")
    return Alora(site, column, tuple(tokens)) if tokens else Add(site, column)


def moved_init(reading: Reading) -> str:
    """The initialisation that moved a part of the base into the adapter; "" for the others."""
    init = str(reading.setting("init_lora_weights"))
    return init if init.lower().startswith(MOVED_INITS) else ""


def matched(pair: SidePair) -> SidePair:
    """The pair. Raises Malformed when its ranks differ."""
    if pair.down.shape[0] != pair.up.shape[1]:
        raise unequal(("lora_A", "lora_B"), pair.down.shape, pair.up.shape)
    return pair


def unequal(names: Sequence[str], a: Sequence[int], b: Sequence[int]) -> Malformed:
    """Why two sides do not multiply."""
    return Malformed(
        f"{names[0]} {list(a)} has rank {a[0]} and {names[1]} {list(b)} has rank {b[1]}: "
        "they must be equal"
    )


def _plain(reading: Reading, pair: SidePair, parts: Parts) -> Edit:
    magnitude = parts.get("lora_magnitude_vector")
    if _is_grouped(pair):
        return _grouped(pair, magnitude)
    up, down, first = matched(pair).up, _flat(pair.down), pair.first
    if first is None and _is_moved(reading, pair):
        return _initialised(reading, pair, magnitude)
    factor: Factor = low_rank(up, down, pair.scale)
    if first is not None:
        times = 2 if pair.inner else 1
        factor = since(up, down, (first[0], _flat(first[1])), times * pair.scale)
        _say_loftq(reading)
    elif pair.inner or pair.site.param != "weight":
        _say(reading, Note(Kind.INFO, DOUBLED))
        factor = InAttention(up, down, pair.scale, 2 if pair.inner else 1)
    return Add(pair.site, factor) if magnitude is None else Dora(pair.site, factor, magnitude)


def _flat(down: TensorRef) -> TensorRef:
    return down.reshape(down.shape[0], math.prod(down.shape[1:]))


def _say(reading: Reading, note: Note) -> None:
    if note.what not in {known.what for known in reading.notes}:
        reading.notes.append(note)


def _say_loftq(reading: Reading) -> None:
    if moved_init(reading).lower() == "loftq":
        what = (
            "LoftQ trained on a quantised base with the initial adapter; what moved since is taken to "
            "hold for the base as it is"
        )
        _say(reading, Note(Kind.ASSUMED, what))


def _is_grouped(pair: SidePair) -> bool:
    rank, inner = pair.down.shape[0], pair.up.shape[1]
    return len(pair.down.shape) > 2 and 0 < inner < rank and rank % inner == 0


def _grouped(pair: SidePair, magnitude: TensorRef | None) -> Edit:
    if magnitude is not None or pair.first is not None:
        raise Malformed("a convolution with groups has a plain LoRA only: no DoRA, no ?init=")
    return Grouped(pair.site, pair.up, pair.down, pair.scale)


def _is_moved(reading: Reading, pair: SidePair) -> bool:
    """PEFT initialises other layers than linear ones plainly where LoRA-GA is asked for."""
    init = moved_init(reading)
    return bool(init) and (pair.linear or init != "lora_ga")


def _initialised(reading: Reading, pair: SidePair, magnitude: TensorRef | None) -> Edit:
    """Only what depends on nothing but the base's weight can be computed again."""
    init = moved_init(reading)
    turned = init.lower() == "olora" and reading.config.raw.get("fan_in_fan_out")
    again = init.lower() if init == "pissa" or init.lower() == "olora" else ""
    plain = pair.linear and magnitude is None and pair.site.param == "weight" and not pair.inner
    if not again or turned or not plain:
        raise Malformed(
            f"init_lora_weights is {init!r}, which changed the base in training by what the adapter was "
            "initialised with, and that cannot be computed from the base here: add ?init=DIR, the folder "
            "of the adapter as it was initialised"
        )
    return Initialised(pair.site, pair.up, pair.down, pair.scale, again)


def _kasa(reading: Reading, pair: SidePair, parts: Parts) -> Edit:
    if "lora_diag" not in parts:
        raise Malformed("kasa_config is set but no lora_diag is stored")
    values, rank = parts["lora_diag"], pair.down.shape[0]
    if values.shape != (rank,):
        raise Malformed(f"lora_diag has shape {list(values.shape)}: expected [{rank}]")
    up, down = matched(pair).up, pair.down
    return Kasa(pair.site, up, values, down, pair.scale)


def _block_diagonal(reading: Reading, pair: SidePair, parts: Parts) -> Edit:
    """The blocks of the side that the config names for this module, by a part of its path."""
    said: Mapping[str, Any] = reading.config.raw["use_bdlora"]
    tables = {"down": "target_modules_bd_a", "up": "target_modules_bd_b"}
    for table in tables.values():
        if not all(isinstance(pattern, str) for pattern in said.get(table) or ()):
            raise Malformed(f"{table} of use_bdlora is {said[table]!r}: expected a list of strings")
    chosen = [
        side
        for side, table in tables.items()
        if any(pattern in pair.site.module for pattern in said.get(table) or ())
    ]
    if len(chosen) > 1:
        raise Malformed("use_bdlora names it for both sides: only one can be block-diagonal")
    blocks = said.get("nblocks", 1)
    if not isinstance(blocks, int) or blocks < 1:
        raise Malformed(
            f"nblocks of use_bdlora is {blocks!r}: expected a whole number of at least 1"
        )
    if not chosen and said.get("match_strict", True):
        raise Malformed("use_bdlora names it for neither side, and match_strict is set")
    if not chosen:
        return _plain(reading, pair, parts)
    return Add(pair.site, BlockDiagonal(pair.up, pair.down, pair.scale, chosen[0], blocks))


def _pooled(reading: Reading, pair: SidePair, parts: Parts) -> Edit:
    """PEFT pools inputs of GPTQ layers only, and forgets the option elsewhere: the base's width tells."""
    group = reading.setting("qalora_group_size")
    if not isinstance(group, int) or group < 1:
        raise Malformed(f"qalora_group_size is {group!r}: expected a whole number of at least 1")
    weight, down = reading.matrix(pair.site.module), matched(pair).down
    if weight is not None and weight.shape[1] == down.shape[1]:
        what = "use_qalora is set, but inputs are not pooled, as PEFT leaves them without GPTQ"
        _say(reading, Note(Kind.ASSUMED, what, site=str(pair.site)))
        return _plain(reading, pair, parts)
    return Add(pair.site, Pooled(pair.up, pair.down, pair.scale, group))


def _activated(reading: Reading, pair: SidePair, parts: Parts) -> Edit:
    tokens = tuple(reading.config.raw["alora_invocation_tokens"])
    up, down = matched(pair).up, pair.down
    return Alora(pair.site, low_rank(up, down, pair.scale), tokens)


def _with_state(reading: Reading, pair: SidePair, parts: Parts) -> Edit:
    """In evaluation both are plain LoRAs."""
    state = tuple((leaf, ref) for leaf, ref in sorted(parts.items()) if leaf.startswith(STATE))
    up, down = matched(pair).up, _flat(pair.down)
    return Add(pair.site, WithState(up, down, pair.scale, state))


def _routed(reading: Reading, pair: SidePair, parts: Parts) -> Edit:
    why = "an Arrow router chooses adapters for every token: there is no delta that could be merged"
    return Opaque(pair.site, "Arrow", why, tuple(parts.values()))


READERS: Mapping[str, Callable[[Reading, SidePair, Parts], Edit]] = {
    "": _plain,
    "use_dora": _plain,
    "alora_invocation_tokens": _activated,
    "arrow_config": _routed,
    "kasa_config": _kasa,
    "monteclora_config": _with_state,
    "use_bdlora": _block_diagonal,
    "use_qalora": _pooled,
    "velora_config": _with_state,
}
