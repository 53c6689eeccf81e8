"""An output that was damaged, in whatever way, fails; what is harmless is listed, with the reason."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import corruptions
import pytest
from console import run
from corruptions import Damage
from fuse.models import llama_base
from fuse.tiny import Tiny
from peft_cases import CASES
from tiers import repeats

from adaptmerge.commands.verify import FAIL, PASS, Questions, verify
from adaptmerge.errors import AdaptmergeError

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
DEAR = ("dora", "nf4")  # outputs that take long to verify
SAMPLE = 3  # damages of each kind that every run looks at

# What no check needs to see, by what is damaged.
HARMLESS = {
    r"^byte \d+ of (README.md|LICENSE)": "prose, which people write in; the check of files says so",
    r"adaptmerge.json versions/.* #": "says what wrote it",
    r"adaptmerge.json command #": "says who asked for it",
    r"adaptmerge.json inputs/\d+/source #": "where the input lay; --input says where it is",
    r"adaptmerge.json inputs/\d+/(revision|task|alpha|init|adapter) #0": "an input that is named anew",
    r"adaptmerge.json base/(name|source|licences) #": "what the base was called; its fingerprint decides",
    r"adaptmerge.json output/ranks": "how ranks are stored, which is seen in what is stored",
    r"adaptmerge.json options/(embeddings|vectors|executor)": "what was asked, not what was made",
    r"adaptmerge.json options/allow": "what was allowed, where nothing needed it",
    r"adaptmerge.json options/budget/(energy|per_site) #": "what bounds nothing here",
    r"adaptmerge.json sites/\d+/(adapter|expert|kinds_in) dropped": "stands for none, as it says",
    r"adaptmerge.json notes/\d+/(site|input) dropped": "stands for none, as it says",
    r"adaptmerge.json adapters/\w+/floor dropped": "stands for none, as it says",
    r"adaptmerge.json method dropped": "stands for linear, as it says",
    r"adaptmerge.json options/(keep_tied|max_loss|seed) #": "what decided nothing here",
    r"^fused adaptmerge.json (notes|sites/\d+/moved)": "not computed again, as the check says",
    r"adaptmerge.json report #": "another version of the report",
}


@dataclass(frozen=True)
class Output:
    """A valid output, the question that proves it, and its files of settings."""

    folder: Path
    questions: Questions
    settings: tuple[str, ...] = ("adapter_config.json",)
    damages: dict[str, list[tuple[str, Damage]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.damages["bytes"] = list(corruptions.of_bytes(self.folder))
        self.damages["values"] = list(corruptions.of_values(self.folder))
        self.damages["settings"] = [
            found for file in self.settings for found in corruptions.of_settings(self.folder, file)
        ]
        self.damages["headers"] = list(corruptions.of_headers(self.folder))
        kind = "fused " if "config.json" in self.settings else ""
        figures = corruptions.of_settings(self.folder, corruptions.REPORT)
        self.damages["figures"] = [(f"{kind}{name}", damage) for name, damage in figures]


KINDS = ("bytes", "values", "settings", "headers", "figures")
SEALED = ("values", "settings", "headers")  # looked at again where the report has the new sha256
OUTPUTS = ("linear", "svd", "dora", "convert", "heads", "bf16", "nf4", "extract")


@pytest.fixture(scope="module")
def outputs(
    fixtures: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Output]]:
    folder = tmp_path_factory.mktemp("whole")
    llama_base(folder / "base")
    CASES["plain"].build(folder / "a", 1)
    places = {
        "LORA": tiny("lora-r8-shakespeare"),
        "OTHER": tiny("lora-r8-cheaders"),
        "DORA": tiny("lora-r4-dora-embed-cheaders"),
        "TINY": tiny("base"),
        "LANGUAGE": fixtures / "classifiers" / "language",
        "KIND": fixtures / "classifiers" / "kind",
        "BASE": folder / "base",
        "A": folder / "a",
        "TUNED": folder / "bf16",
    }
    commands = {
        "linear": "combine a=LORA:0.7 b=OTHER:0.3",
        "svd": "combine a=LORA:0.7 b=OTHER:0.3 --method svd --rank 6 --ranks per-site",
        "dora": "combine a=DORA:0.5 b=OTHER:0.5 --base TINY",
        "convert": "convert a=LORA --dtype fp16",
        "heads": "combine a=LANGUAGE:0.5 b=KIND:0.5 --method cat --heads concat",
        "bf16": "fuse BASE a=A --rounding nearest --allow loss",
        "nf4": "fuse BASE a=A --quant nf4 --allow loss",
        "extract": "extract BASE TUNED --rank 3",
    }

    @cache
    def made(name: str) -> Output:
        if name == "extract":
            made("bf16")
        words = [_placed(word, places) for word in commands[name].split()]
        outcome = run(*words, "-o", str(folder / name))
        assert outcome.code == 0, outcome.stderr
        named = re.findall(r"\b([ab])=(\w+)", commands[name])
        inputs = {key: str(places[place]) for key, place in named}
        base = {"dora": "TINY", "bf16": "BASE", "nf4": "BASE", "extract": "BASE"}.get(name)
        if name == "extract":
            inputs = {"tuned": str(places["TUNED"])}
        questions = Questions(None if base is None else str(places[base]), inputs, "cpu")
        settings = ("config.json",) if name in ("bf16", "nf4") else ("adapter_config.json",)
        found = Output(folder / name, questions, settings)
        assert verify(found.folder, questions).status == PASS
        return found

    yield made


def _placed(word: str, places: dict[str, Path]) -> str:
    name, equals, rest = word.rpartition("=")
    place, colon, weight = rest.partition(":")
    return f"{name}{equals}{places.get(place, place)}{colon}{weight}"


def missed(output: Output, damages: list[tuple[str, Damage]], folder: Path, *, seal: bool) -> str:
    """The damages that pass, and are not listed."""
    found = []
    for number, (name, damage) in enumerate(damages):
        if any(re.search(pattern, name) for pattern in HARMLESS):
            continue
        copy = Path(shutil.copytree(output.folder, folder / str(number)))
        damage(copy)
        if seal:
            corruptions.reseal(copy)
        if not fails(copy, output.questions):
            found.append(name)
        shutil.rmtree(copy)
    return ", ".join(found)


def fails(folder: Path, questions: Questions) -> bool:
    try:
        return verify(folder, questions).status == FAIL
    except AdaptmergeError:
        return True


def sample(damages: list[tuple[str, Damage]]) -> list[tuple[str, Damage]]:
    """Some of them, evenly spread."""
    return damages[:: max(1, len(damages) // SAMPLE)][:SAMPLE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [repeats(n) if n in DEAR else n for n in OUTPUTS])
def test_some_damages_fail(
    name: str, kind: str, outputs: Callable[[str], Output], tmp_path: Path
) -> None:
    output = outputs(name)
    chosen = sample(output.damages[kind])
    assert not missed(output, chosen, tmp_path / "as it is", seal=False)
    if kind in SEALED:
        assert not missed(output, chosen, tmp_path / "sealed", seal=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_damage_fails(
    name: str, kind: str, outputs: Callable[[str], Output], tmp_path: Path
) -> None:
    """As it is, by the checksum of the file; what is in it also where the report has the new one."""
    output = outputs(name)
    damages = output.damages[kind]
    assert not missed(output, damages, tmp_path / "as it is", seal=False)
    if kind in SEALED:
        assert not missed(output, damages, tmp_path / "sealed", seal=True)
