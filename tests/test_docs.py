"""The docs are true: generated pages are fresh, commands shown are run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from console import check, steps

import adaptmerge
from adaptmerge.cli import main
from adaptmerge.formats.registry import formats
from adaptmerge.methods.method import Method
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


def test_the_method_in_the_docs_works(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text_of(DOCS / "adding-a-method.md"), re.DOTALL)
    found: dict[str, object] = {"__name__": "halved"}
    exec(compile(block, "adding-a-method.md", "exec"), found)
    assert isinstance(found["METHOD"], Method)


def test_python_in_the_guide_works(
    tmp_path: Path, fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", text_of(DOCS / "guide.md"), re.DOTALL)
    for name, source in (("sql", "lora-r8-shakespeare"), ("chat", "lora-r8-perl")):
        (tmp_path / name).symlink_to(fixtures / "tinyllama" / source, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "guide.md", "exec"), {"__name__": "guide"})
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
