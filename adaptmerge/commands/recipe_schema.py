"""The schema of recipes as pydantic models; imported only when a recipe is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

# Union members are told apart by their YAML type, so that an error is about the one that was meant.
# The tags appear in pydantic's error locations and are no keys: the brackets keep them apart.
TABLE, LIST, OTHER = "<table>", "<list>", "<other>"


def _by_type(*tags: str) -> Discriminator:
    types = {TABLE: (dict, BaseModel), LIST: (list,)}

    def tag_of(value: object) -> str:
        return next((tag for tag in tags if isinstance(value, types[tag])), OTHER)

    return Discriminator(tag_of)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, found {value}")
    return value


def _quoted(value: object) -> object:
    if isinstance(value, (int, float)):
        raise ValueError(f"expected a release in quotes, such as '0.13', found {value}")
    return value


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.-]*$")]
Text = Annotated[str, Field(min_length=1)]
Version = Annotated[Text, BeforeValidator(_quoted)]
Numbers = Annotated[list[Number], Field(min_length=1)]
Gradient = Annotated[Annotated[Number, Tag(OTHER)] | Annotated[Numbers, Tag(LIST)], _by_type(LIST)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InputTable(_Table):
    """One input, spelled out."""

    source: Text = Field(description="A folder or file, relative to the recipe, or a hub id")
    name: Name | None = Field(None, description="What weights and rules call it")
    weight: Number | None = Field(None, description="How much it counts")
    alpha: Number | None = Field(None, description="lora_alpha, where no config says it")
    sha256: dict[str, Digest] = Field(
        default_factory=dict, description="File name to digest, checked by run --locked"
    )


class RuleTable(_Table):
    """Weights at some sites; later rules win over earlier ones."""

    match: Text = Field(description="Glob on the module path or its end, or re:REGEX")
    kind: str | None = Field(None, description="Only edits of this kind, e.g. add")
    weights: dict[str, Gradient] = Field(
        min_length=1, description="Input name to a number, or to numbers spread over the layers"
    )


InputItem = Annotated[
    Annotated[InputTable, Tag(TABLE)] | Annotated[Text, Tag(OTHER)], _by_type(TABLE)
]
WeightsItem = Annotated[
    Annotated[dict[str, Number], Tag(TABLE)]
    | Annotated[list[Number], Tag(LIST)]
    | Annotated[Text, Tag(OTHER)],
    _by_type(TABLE, LIST),
]

HeadsItem = Annotated[
    Annotated[dict[str, Text], Tag(TABLE)] | Annotated[Text, Tag(OTHER)], _by_type(TABLE)
]


class RecipeTable(_Table):
    """A merge that adaptmerge run repeats. Relative paths are relative to the recipe's folder."""

    inputs: list[InputItem] = Field(
        min_length=1, description="[NAME=]SOURCE[:WEIGHT][?alpha=32], or the same spelled out"
    )
    method: str = Field("linear", description="See adaptmerge methods")
    weights: WeightsItem | None = Field(
        None, description="ema:0.9, last:5 or numbers; a list in order; or name to number, for all"
    )
    sum: bool = Field(False, description="Without weights, count each input 1 instead of 1/N")
    rank: Annotated[int, BeforeValidator(_no_bool), Field(ge=1)] | None = Field(
        None, description="At most this rank per site"
    )
    energy: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        None, description="Keep this share of the squared norm"
    )
    max_error: Annotated[Number, Field(ge=0, lt=1)] | None = Field(
        None, description="Lose at most this share of the norm"
    )
    per_site: bool = Field(False, description="Apply energy and max_error at every site alone")
    ranks: Literal["uniform", "per-site"] = Field(
        "uniform", description="One rank for all sites, or each its own"
    )
    peft_version: Version | None = Field(None, description="Write for this release of PEFT")
    experts: Literal["fused", "per-expert"] | None = Field(
        None, description="Layout of experts; by default the inputs' own"
    )
    dtype: str | None = Field(None, description="Of the output: bf16, fp16 or fp32")
    to: str | None = Field(None, description="Output format, see adaptmerge formats")
    output: Text | None = Field(None, description="A folder, or a file by its suffix")
    base: Text | None = Field(None, description="Folder or hub id of the base model")
    heads: HeadsItem | None = Field(
        None,
        description="error, average, concat, separate, drop or the input whose heads are kept; or a table "
        "of module to one of these, * for all",
    )
    allow: list[str] = Field(
        default_factory=list, description="Checks to relax: base, nonfinite, labels"
    )
    strict: bool = Field(False, description="Fail on anything assumed, approximated or dropped")
    sites: list[RuleTable] = Field(default_factory=list, description="Weights per site, in order")


def known_keys(loc: tuple[Any, ...]) -> list[str]:
    """The keys allowed in the table that a location of an unknown key is in."""
    tables: dict[Any, type[BaseModel]] = {"inputs": InputTable, "sites": RuleTable}
    table = tables.get(loc[0], RecipeTable) if len(loc) > 1 else RecipeTable
    return list(table.model_fields)
