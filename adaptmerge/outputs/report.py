"""What was made of what, and what it cost: the data behind adaptmerge.json, tables and `explain`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from adaptmerge.adapters.graph import Key, Kind, Note, Place, Site
from adaptmerge.adapters.module_paths import natural_key
from adaptmerge.algebra.fit import Budget
from adaptmerge.errors import AdaptmergeError, InputError
from adaptmerge.files.strict_json import dump, quoted, read_object
from adaptmerge.files.typed import built
from adaptmerge.merging.resolve import WHOLE
from adaptmerge.merging.settle import Settled, SiteStats
from adaptmerge.outputs.said import SaidBase, SaidInput, SaidOptions, SaidOutput

VERSION = 2
UNSEALED = 1  # the version without the sha256 of what was written
FILE = "adaptmerge.json"
EXTRACT = "extract"  # the command whose one input is a model
METADATA_KEY = "adaptmerge"
LOST = 0.10  # share of the norm lost to opposing inputs that is worth a word
ROUNDING = 1e-6  # relative; what float32 itself loses is no site's fault
OVERSHOOT = 1.5  # times the largest input


@dataclass(frozen=True, slots=True)
class SiteLine:
    """One site of a report. Norms are absolute (Frobenius); `error` is relative to the delta.

    kinds_in: the kinds of edit that each input has there. adapter: the only one of the output that has
    the site, where it holds several.
    """

    site: str
    module: str
    param: str
    kind: str
    action: str
    weights: Mapping[str, float]
    ranks_in: Mapping[str, int]
    rank: int | None
    norm: float
    truncation: float
    rounding: float
    error: float
    expert: int | None = None
    kinds_in: Mapping[str, Sequence[str]] = field(default_factory=dict)
    adapter: str = ""
    place: Place = ""

    @property
    def key(self) -> Key:
        """What the edits are known by that it is about."""
        return Key(Site(self.module, self.param, expert=self.expert, place=self.place), self.kind)


@dataclass(frozen=True, slots=True)
class Totals:
    """Over all sites: norms (root of the sum of squares), errors relative to the norm, cosines."""

    norm: float
    truncation: float
    rounding: float
    error: float
    input_norms: Mapping[str, float]
    cosines: Mapping[str, float]
    kept: float


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a reader of the output may ask; `as_json` is the file's content.

    files: the sha256 of every other file that was written, by name; None in reports of earlier versions.
    """

    command: str
    method: str
    format: str
    options: Annotated[Mapping[str, Any], SaidOptions]
    inputs: Sequence[Annotated[Mapping[str, Any], SaidInput]]
    base: Annotated[Mapping[str, Any], SaidBase] | None
    versions: Mapping[str, str]
    totals: Totals
    sites: Sequence[SiteLine]
    notes: Sequence[Note]
    output: Annotated[Mapping[str, Any], SaidOutput]
    files: Mapping[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data, without times and absolute paths, so that equal runs give equal bytes."""
        return {"report": VERSION, **asdict(self)}

    def as_text(self) -> str:
        """The content of the report file."""
        return dump(self.as_json()) + "\n"


def site_lines(settled: Sequence[Settled]) -> list[SiteLine]:
    """The lines of a report, in plan order."""
    return [_line(item) for item in settled]


def _line(item: Settled) -> SiteLine:
    stats, site = item.stats, item.step.site
    return SiteLine(
        site=item.step.label,
        module=site.module,
        param=site.param,
        kind=item.step.edit.kind,
        action=item.step.action,
        weights=dict(zip(stats.names, stats.weights, strict=True)),
        ranks_in=dict(zip(stats.names, stats.ranks, strict=False)),
        rank=stats.rank,
        norm=stats.norm,
        truncation=stats.truncation,
        rounding=stats.rounding,
        error=_share(stats.error, stats.norm),
        expert=site.expert,
        kinds_in={member.adapter: list(member.kinds) for member in item.step.members},
        adapter=item.step.adapter,
        place=site.place,
    )


def totals(settled: Sequence[Settled], inputs: Sequence[str]) -> Totals:
    """The sums over all deltas, with the cosines between inputs over the sites they share; over what is
    stored whole only where there is nothing else."""
    deltas = [item.stats for item in settled if item.step.edit.kind not in WHOLE]
    stats = deltas or [item.stats for item in settled]
    tops = _largest_scales(stats, inputs)
    gram = _summed_gram(stats, tops, weighted=False)
    sizes = {name: math.sqrt(max(gram[name, name], 0.0)) for name in inputs}
    norms = {name: tops[name] * size for name, size in sizes.items()}
    norm = _root_sum(s.norm for s in stats)
    top = max(tops.values(), default=1.0)
    counted = _summed_gram(stats, tops, weighted=True)
    apart = top * math.sqrt(sum(counted[n, n] * (tops[n] / top) ** 2 for n in inputs))
    return Totals(
        norm=norm,
        truncation=_share(_root_sum(s.truncation for s in stats), norm),
        rounding=_share(_root_sum(s.rounding for s in stats), norm),
        error=_share(_root_sum(s.error for s in stats), norm),
        input_norms=norms,
        cosines=_cosines(gram, sizes, inputs),
        kept=_share(norm, apart) if len(inputs) > 1 else 1.0,
    )


def _largest_scales(stats: Sequence[SiteStats], inputs: Sequence[str]) -> dict[str, float]:
    """The largest scale of each input over all sites."""
    found: dict[str, float] = {}
    for s in stats:
        for name, scale in zip(s.names, s.scales, strict=False):
            found[name] = max(found.get(name, 0.0), scale)
    return {name: found.get(name) or 1.0 for name in inputs}


def _summed_gram(
    stats: Sequence[SiteStats], tops: Mapping[str, float], *, weighted: bool
) -> dict[tuple[str, str], float]:
    """Inner products over all sites, of deltas that are divided by the input's largest scale."""
    total = {(a, b): 0.0 for a in tops for b in tops}
    for s in stats:
        shares = [scale / tops[name] for name, scale in zip(s.names, s.scales, strict=False)]
        if weighted:
            shares = [share * w for share, w in zip(shares, s.weights, strict=False)]
        for i, row in enumerate(s.gram):
            for j, value in enumerate(row):
                total[s.names[i], s.names[j]] += shares[i] * shares[j] * value
    return total


def _cosines(
    gram: Mapping[tuple[str, str], float], norms: Mapping[str, float], inputs: Sequence[str]
) -> dict[str, float]:
    pairs = [(a, b) for i, a in enumerate(inputs) for b in inputs[i + 1 :]]
    found = {f"{a} {b}": _share(gram[a, b], norms[a] * norms[b]) for a, b in pairs}
    return {pair: min(1.0, max(-1.0, value)) for pair, value in found.items()}


def sanity_notes(found: Totals) -> list[Note]:
    """Words on a merge that loses much of its inputs, or is much larger than they are."""
    notes = []
    if 0 < found.kept < 1 - LOST:
        lost = f"{100 * (1 - found.kept):.0f} % of the norm is lost: inputs oppose each other"
        notes.append(Note(Kind.INFO, lost))
    largest = max(found.input_norms.values(), default=0.0)
    if len(found.input_norms) > 1 and largest and found.norm > OVERSHOOT * largest:
        notes.append(
            Note(
                Kind.INFO,
                f"weights overshoot: the merge is {found.norm / largest:.1f} x as large as the "
                "largest input",
            )
        )
    return notes


def _root_sum(values: Any) -> float:
    return math.hypot(*values)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def report_path(output: Path) -> Path:
    """Where the report of an output lies: in the folder, or beside the file."""
    return output / FILE if output.is_dir() else output.parent / report_name(output.name)


def report_name(file: str) -> str:
    """The report's file name for a single-file output."""
    return f"{file.rpartition('.')[0] or file}.{FILE}"


def is_report(path: Path) -> bool:
    """Whether a file is a report."""
    try:
        return {"report", "command", "sites"} <= read_object(path).keys()
    except InputError:
        return False


def load_report(output: Path) -> Report:
    """The report of an output. Raises InputError when there is none or it is of another version."""
    path = report_path(output)
    if not output.exists():
        raise InputError(
            "does not exist: give the folder or file that was written", where=str(output)
        )
    if not path.is_file():
        raise InputError(
            f"has no report: expected {path.name}, written with every output; to compare two "
            "adapters without one use 'adaptmerge diff'",
            where=str(output),
        )
    found: Report = parsed(Report, path, "restore it, or write the output again")
    return found


def parsed(kind: type[Any], path: Path, advice: str, hashed: Sequence[str] = ()) -> Any:
    """The report in a file, of one of the kinds of reports, which has the sha256 of the files that are
    `hashed` at least. Raises InputError for anything else."""
    raw = read_object(path)
    version = raw.pop("report", None)
    if version not in (UNSEALED, VERSION):
        sentence = (
            f"is no report of this version (found {quoted(version)}, expected {VERSION}): {advice}"
        )
        raise InputError(sentence, where=str(path))
    files = raw.get("files")
    if version == VERSION and not (isinstance(files, dict) and files.keys() >= set(hashed)):
        what = ", ".join(hashed) or "files"
        raise InputError(f"has no sha256 of {what}: {advice}", where=str(path))
    return built(kind, raw, str(path), otherwise=advice)


def worst_sites(report: Report, count: int = 5) -> list[SiteLine]:
    """The sites with the largest relative error above float32 rounding, worst first."""
    lossy = [line for line in report.sites if line.error > ROUNDING]
    return sorted(lossy, key=lambda line: (-line.error, natural_key(line.site)))[:count]


def check_strict(notes: Sequence[Note], strict: bool) -> None:
    """Raises AdaptmergeError for Notes that are fatal, where that was asked."""
    fatal = [str(note) for note in notes if note.kind in Kind.FATAL_UNDER_STRICT]
    if strict and fatal:
        raise AdaptmergeError(fatal, where="--strict")


def missed_budget(budget: Budget, found: Totals, lines: Sequence[SiteLine]) -> list[Note]:
    """A word where a rank cap leaves a larger error than the other budgets allow."""
    if not budget.spectral or budget.rank is None:
        return []
    lost = found.truncation
    if budget.per_site:
        lost = max((line.truncation / line.norm for line in lines if line.norm), default=0.0)
    allowed = math.sqrt(budget.allowed_loss)
    if lost <= allowed * (1 + 1e-6):
        return []
    what = (
        f"--rank {budget.rank} leaves a truncation error of {lost:.3g}, asked for was {allowed:.3g}"
    )
    return [Note(Kind.APPROXIMATED, what)]
