"""The docs are true: generated pages are fresh, commands shown are run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import samples
import torch
from conftest import ROOT
from console import check, run, steps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptmerge
from adaptmerge.cli import main
from adaptmerge.formats.registry import formats
from adaptmerge.methods.registry import methods

DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += [ROOT / "fixtures" / "README.md", *sorted(DOCS.rglob("*.md"))]
RUN = [page for page in PAGES if steps(page.read_text(encoding="utf-8"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    assert generator().stale() == [], "run python docs/generate.py"


@pytest.mark.parametrize("page", RUN, ids=names(RUN))
def test_shown_commands_do_what_is_shown(
    page: Path, tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fixtures").symlink_to(fixtures, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    check(page, tmp_path, terminal=True)


def test_readme_and_guide_show_commands() -> None:
    assert {"README.md", "docs/guide.md"} <= set(names(RUN))


def test_every_command_is_in_the_prose() -> None:
    pages = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("guide", "recipes", "methods")))
    shown = "".join(map(text_of, pages))
    assert not [name for name in main.commands if f"adaptmerge {name}" not in shown]


def test_every_option_is_explained() -> None:
    """Not only in the generated reference."""
    pages = "".join(text_of(page) for page in PAGES if page.name != "cli.md")
    options = {opt for c in main.commands.values() for p in c.params for opt in p.opts}
    long = sorted(option for option in options if option.startswith("--"))
    assert not [option for option in long if option not in pages]


@pytest.mark.parametrize("name", sorted(formats()))
def test_every_format_has_its_page(name: str) -> None:
    page = DOCS / "formats" / f"{name}.md"
    assert page.is_file(), f"write docs/formats/{name}.md"
    assert f"formats/{name}.md" in text_of(DOCS / "guide.md")
    assert f"formats/{name}.md" in text_of(ROOT / "README.md")


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_is_documented(name: str) -> None:
    assert f"\n## {name}\n" in text_of(DOCS / "methods.md")


def test_native_page_defines_every_class() -> None:
    from adaptmerge.formats.native import nodes

    pages = ("native.md", "native-families.md")
    page = "".join(text_of(DOCS / "formats" / name) for name in pages)
    assert not [name for name in nodes() if name != "DType" and f"`{name}`" not in page]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", CODE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_internal_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(CODE.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_every_page_is_linked_from_somewhere() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in LINK.findall(text_of(page))
        if not re.match(r"[a-z]+:", link)
    }
    assert not [page for page in DOCS.rglob("*.md") if page.resolve() not in linked]


def test_changelog_has_this_version() -> None:
    assert f"\n## [{adaptmerge.__version__}]" in text_of(ROOT / "CHANGELOG.md")


def python_in(page: Path) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)
    return str(block)


Install = Callable[[str, str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs the module shown on a page, as a distribution with an entry point."""

    def installed(page: str, name: str, constant: str) -> None:
        group = f"adaptmerge.{constant.lower()}s"
        assert f'[project.entry-points."{group}"]' in text_of(DOCS / page)
        entry = tmp_path / "site" / f"{name}-1.dist-info" / "entry_points.txt"
        entry.parent.mkdir(parents=True)
        entry.write_text(f"[{group}]\n{name} = {name}:{constant}\n", encoding="utf-8")
        (tmp_path / "site" / f"{name}.py").write_text(python_in(DOCS / page), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
        forget_what_is_installed()

    monkeypatch.chdir(tmp_path)
    yield installed
    monkeypatch.undo()
    forget_what_is_installed()


def forget_what_is_installed() -> None:
    formats.cache_clear()
    methods.cache_clear()


def done(*arguments: str) -> str:
    """What a command that succeeds prints."""
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout


def test_the_python_page_does_what_it_says(
    tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    (tmp_path / "fixtures").symlink_to(fixtures, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text_of(DOCS / "python.md"), re.DOTALL)
    assert len(blocks) > 5
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "python.md", "exec"), names)


def test_the_python_page_names_all_that_is_public() -> None:
    page = text_of(DOCS / "python.md")
    shown = set(re.findall(r"\w+", page))
    assert not [name for name in adaptmerge.__all__ if name not in shown]


def test_the_method_in_the_docs_works(install: Install, fixtures: Path, tmp_path: Path) -> None:
    install("adding-a-method.md", "rescaled", "METHOD")
    assert re.search(r"^rescaled ", done("methods"), re.MULTILINE)
    Path("tiny").symlink_to(fixtures / "tinyllama", target_is_directory=True)
    paths = [Path("tiny", name) for name in ("lora-r8-shakespeare", "lora-r8-perl")]
    weights = [0.7, -0.2]
    inputs = [f"{path}:{weight}" for path, weight in zip(paths, weights, strict=True)]
    done("combine", *inputs, "--method", "rescaled", "-o", "merged")
    found, plain = samples.deltas(tmp_path / "merged"), samples.weighted_sum(paths, weights)
    c = (0.7 + 0.2) / math.sqrt(0.7**2 + 0.2**2)
    wanted = {module: c * delta for module, delta in plain.items()}
    assert samples.distance(found, wanted) < 1e-6 * samples.size(wanted)
    assert samples.distance(found, plain) > 0.1 * samples.size(plain), "it does what linear does"
    assert re.search(r"^weights +pass ", done("verify", "merged"), re.MULTILINE)


def pairs_of(sides: Mapping[str, samples.Sides]) -> dict[str, torch.Tensor]:
    """The tensors of the format that docs/adding-a-format.md shows."""
    ups = {f"{module}.up": b for module, (_, b) in sides.items()}
    return ups | {f"{module}.down": a.T.contiguous() for module, (a, _) in sides.items()}


def test_the_format_in_the_docs_works(install: Install, tmp_path: Path) -> None:
    install("adding-a-format.md", "pairs", "FORMAT")
    assert re.search(r"^pairs +read, write ", done("formats"), re.MULTILINE)
    sides = samples.random_sides(1)
    stored = pairs_of(sides)
    save_file(stored, "one.safetensors", metadata={"pairs_scale": "0.75"})
    done("convert", "one.safetensors", "--to", "peft", "-o", "peft")
    wanted = {module: 0.75 * (b.double() @ a.double()) for module, (a, b) in sides.items()}
    assert samples.size(wanted) > 1
    assert samples.distance(samples.deltas(tmp_path / "peft"), wanted) < 1e-6 * samples.size(wanted)
    done("convert", "peft", "--to", "pairs", "-o", "back")
    assert samples.same_bits(load_file("back/pairs.safetensors"), stored)
    with safe_open("back/pairs.safetensors", "pt") as back:
        assert back.metadata()["pairs_scale"] == "0.75"


def test_the_format_in_the_docs_names_all_problems(install: Install) -> None:
    install("adding-a-format.md", "pairs", "FORMAT")
    one, two = samples.MODULES
    stored = pairs_of(samples.random_sides(1))
    stored[f"{one}.side"] = stored.pop(f"{one}.down")
    stored[f"{two}.up"] = stored[f"{two}.up"].T.contiguous()
    save_file(stored, "bad.safetensors", metadata={"pairs_scale": "large"})
    outcome = run("inspect", "bad.safetensors")
    assert outcome.code == 1
    for problem in (
        "pairs_scale is 'large': expected a number",
        f"{one}: expected an up (out, r) and a down (in, r) of one r",
        f"{two}: expected an up (out, r) and a down (in, r) of one r",
        f"tensor '{one}.side' is neither up nor down of a module",
    ):
        assert problem in outcome.stderr


@pytest.mark.parametrize("page", ["adding-a-method.md", "adding-a-format.md"])
def test_importing_what_the_docs_show_is_light(page: str, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(python_in(DOCS / page), encoding="utf-8")
    code = "import sys, shown; print(*{'torch', 'numpy'} & set(sys.modules))"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert found.stdout.split() == []


def test_python_in_the_guide_works(
    tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = python_in(DOCS / "guide.md")
    for name, source in (("sql", "lora-r8-shakespeare"), ("chat", "lora-r8-perl")):
        (tmp_path / name).symlink_to(fixtures / "tinyllama" / source, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "guide.md", "exec"), {"__name__": "guide"})
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
