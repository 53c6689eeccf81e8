"""The shape of the package: import direction, what may not be asked or named where, and sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "adaptmerge"

# Imports go only to earlier lines: packages on one line never import each other.
LAYERS = (
    ("errors", "lazy"),
    ("parallel", "discovery"),
    ("tensors",),
    ("files", "algebra"),
    ("adapters",),
    ("bases",),
    ("formats", "methods", "runtime"),
    ("schemes", "merging"),
    ("rounding", "outputs"),
    ("commands",),
    ("__init__",),  # the public API
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
TOP = {"__init__", "__main__", "errors", "lazy", "parallel", "discovery"}

# also a container, which files/ tells by its first bytes, and of base models
CONTAINERS = {"files": {"gguf"}, "bases": {"gguf"}, "schemes": {"gguf"}}
KIND_BLIND = ("merging", "rounding", "outputs", "commands")
MAX_FUNCTION_LINES, MAX_FILE_LINES = 40, 400


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.fixture(scope="module", autouse=True)
def parsed() -> None:
    """All sources once, before the first test."""
    for path in sources():
        tree(path)


def part_of(path: Path) -> str:
    """The top-level part of the package that a file belongs to: `files`, `fit`, `__init__`, ..."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(PACKAGE.parent).as_posix()}:{getattr(node, 'lineno', 1)}"


def files_of(*parts: str) -> list[Path]:
    return [path for path in sources() if part_of(path) in parts]


def imported_modules(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Every import of this package in a file, as (statement, dotted path inside the package)."""
    package = list(path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE.name:
                yield node, name.partition(".")[2]


def target_part(dotted: str) -> str:
    """The part that an import reaches; a name that is no module comes from the public API."""
    head = dotted.split(".")[0]
    return head if head in RANK or is_module(head) else "__init__"


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (bool(name) and (PACKAGE / name).is_dir())


def may_import(importer: str, target: str) -> bool:
    return importer == target or RANK[target] < RANK[importer]


def test_every_module_has_its_place() -> None:
    unknown = sorted({part_of(path) for path in sources()} - RANK.keys() - {"__main__"})
    assert not unknown, f"give these a line in LAYERS: {unknown}"


def test_nothing_else_lies_at_the_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP


def modules() -> dict[str, Path]:
    """All modules by their dotted path inside the package."""
    found = {}
    for path in sources():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def circles(imports: dict[str, set[str]]) -> dict[str, list[str]]:
    """The modules that import themselves through others, with what leads back."""
    left = dict(imports)
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in leaves:
            del left[name]
    return {name: sorted(targets & left.keys()) for name, targets in left.items()}


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    imports = {
        name: {
            dotted if dotted in known else dotted.rpartition(".")[0]
            for _, dotted in imported_modules(path)
            if dotted != "__version__"
        }
        - {name}
        for name, path in known.items()
    }
    assert not circles(imports)


def test_benchmarks_have_no_circle() -> None:
    imports: dict[str, set[str]] = {}
    for path in (PACKAGE.parent / "bench").glob("*.py"):
        found = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in found for alias in node.names}
        imports[path.stem] = {name.split(".")[1] for name in names if name.startswith("bench.")}
    assert len(imports) > 10
    assert not circles(imports)


def test_imports_go_one_way() -> None:
    wrong = [
        f"{where(path, node)}: {part_of(path)} imports {target_part(dotted)} ({dotted})"
        for path in sources()
        for node, dotted in imported_modules(path)
        if dotted != "__version__"
        and part_of(path) in RANK
        and target_part(dotted) in RANK
        and not may_import(part_of(path), target_part(dotted))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "target", "allowed"),
    [
        ("algebra", "tensors", True),
        ("formats", "formats", True),
        ("cli", "errors", True),
        ("adapters", "bases", False),
        ("formats", "methods", False),
        ("runtime", "commands", False),
        ("files", "cli", False),
    ],
)
def test_the_rule_itself(importer: str, target: str, allowed: bool) -> None:
    assert may_import(importer, target) is allowed


def edit_kinds() -> set[str]:
    """Names of the concrete edit classes."""
    classes = (
        node
        for path in files_of("adapters")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef)
    )
    concrete = (c for c in classes if "Protocol" not in {last(base) for base in c.bases})
    return {node.name for node in concrete if any(map(names_a_kind, node.body))}


def names_a_kind(statement: ast.stmt) -> bool:
    """Whether it is the `kind` that every edit has."""
    return isinstance(statement, ast.AnnAssign) and last(statement.target) == "kind"


def last(node: ast.AST) -> str:
    """The last name of `a.b.C` or `C[T]`."""
    if isinstance(node, ast.Subscript):
        node = node.value
    return getattr(node, "attr", getattr(node, "id", ""))


def kinds_asked(node: ast.AST) -> set[str]:
    """The class names that an isinstance call, a `type(x) is` or a class pattern mentions."""
    if isinstance(node, ast.Call) and last(node.func) in {"isinstance", "issubclass"}:
        return {last(part) for arg in node.args[1:] for part in ast.walk(arg)}
    if isinstance(node, ast.MatchClass):
        return {last(node.cls)}
    if isinstance(node, ast.Compare) and isinstance(node.left, ast.Call):
        is_type = last(node.left.func) == "type"
        return {last(part) for part in node.comparators} if is_type else set()
    return set()


def test_stages_do_not_ask_for_the_kind_of_an_edit() -> None:
    kinds = edit_kinds()
    asked = [
        f"{where(path, node)}: {sorted(kinds_asked(node) & kinds)}"
        for path in files_of(*KIND_BLIND)
        for node in ast.walk(tree(path))
        if kinds_asked(node) & kinds
    ]
    assert not asked, "\n".join(asked)


def docstrings(module: ast.Module) -> set[int]:
    """Ids of the constants that are docstrings or other bare strings."""
    bare = (node.value for node in ast.walk(module) if isinstance(node, ast.Expr))
    return {id(value) for value in bare if isinstance(value, ast.Constant)}


def strings(path: Path) -> Iterator[ast.Constant]:
    skipped = docstrings(tree(path))
    for node in ast.walk(tree(path)):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and id(node) not in skipped:
            assert isinstance(node, ast.Constant)
            yield node


def format_names() -> set[str]:
    """The modules of `formats` that declare a format."""
    return {
        path.parent.name if path.stem == "__init__" else path.stem
        for path in files_of("formats")
        for node in tree(path).body
        if isinstance(node, ast.Assign) and any(last(n) == "FORMAT" for n in node.targets)
    }


def test_one_module_decomposes() -> None:
    """Elsewhere values that are not finite would end in an error of torch's."""
    failing = {
        "svd",
        "svdvals",
        "eigh",
        "eigvalsh",
        "eig",
        "solve",
        "inv",
        "cholesky",
        "svd_lowrank",
    }
    calls = [
        where(path, node)
        for path in sources()
        if path.name != "decompose.py"
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr in failing
        and ast.unparse(node.value) in ("torch", "torch.linalg")
    ]
    assert not calls, f"adaptmerge.algebra.decompose has these: {calls}"


def test_format_names() -> None:
    assert format_names() >= {"peft", "gguf", "adapterhub", "native"}


def test_only_formats_name_formats() -> None:
    names = format_names()
    named = [
        f"{where(path, node)}: {node.value!r}"
        for path in sources()
        if part_of(path) != "formats"
        for node in strings(path)
        if str(node.value).lower() in names - CONTAINERS.get(part_of(path), set())
    ]
    assert not named, "\n".join(named)


def is_made_of_a_site(node: ast.AST) -> bool:
    """Whether it joins a site, or parts of one, and a kind of edit; or puts a site together from parts."""
    if isinstance(node, ast.Call) and last(node.func) == "Site":
        return {"module", "param"} <= {
            arg.attr for arg in node.args if isinstance(arg, ast.Attribute)
        }
    if isinstance(node, ast.JoinedStr):
        inside = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
        is_sentence = ": " in ast.unparse(node)
    else:
        inside, is_sentence = node.elts if isinstance(node, ast.Tuple) else [], False
    names = {last(part) for part in inside}
    return "kind" in names and bool(names & {"site", "module", "param"}) and not is_sentence


def test_what_edits_are_known_by_is_made_in_one_place() -> None:
    homes = {"adapters/graph.py", "outputs/report.py"}  # a report's line states the parts
    parts = ("adapters", *KIND_BLIND, "cli", "runtime")
    made = [
        f"{where(path, node)}: {ast.unparse(node)[:80]}"
        for path in [*files_of(*parts), PACKAGE / "formats" / "native.py"]
        if path.relative_to(PACKAGE).as_posix() not in homes
        for node in ast.walk(tree(path))
        if is_made_of_a_site(node)
    ]
    assert not made, f"graph.Key and graph.key_of have these: {made}"


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("found[group.site, group.kind]", True),
        ("(edit.site.module, edit.site.param, edit.kind)", True),
        ("f'{site} ({kind})'", True),
        ("Site(line.module, line.param)", True),
        ("(key.site, edit)", False),
        ("f'{line.site}: kind is {line.kind!r}'", False),
        ("Site(module, param)", False),
        ("Site(line.module)", False),
    ],
)
def test_the_rule_on_keys_itself(code: str, wrong: bool) -> None:
    assert any(map(is_made_of_a_site, ast.walk(ast.parse(code)))) is wrong


def test_only_the_command_line_exits() -> None:
    exits = [
        where(path, node)
        for path in sources()
        if part_of(path) not in {"cli", "__main__"}
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Name | ast.Attribute)
        and (
            last(node) in {"SystemExit", "_exit"}
            or (last(node) == "exit" and ast.unparse(node) == "sys.exit")
        )
    ]
    assert not exits, "\n".join(exits)


def functions() -> Iterator[tuple[str, int]]:
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{where(path, node)} {node.name}", node.end_lineno - node.lineno + 1


def test_functions_are_short() -> None:
    sizes = dict(functions())
    assert len(sizes) > 2000
    assert not {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES}
    middling = [name for name, size in sizes.items() if size > MAX_FUNCTION_LINES / 2]
    assert len(middling) <= 0.1 * len(sizes), f"{len(middling)} of {len(sizes)} are long"


def test_files_are_short() -> None:
    sizes = {where(path, tree(path)): path.read_text("utf-8").count("\n") for path in sources()}
    long = {name: size for name, size in sizes.items() if size > MAX_FILE_LINES}
    assert not long


def test_mypy_is_told_to_ignore_little() -> None:
    marked = [line for path in sources() for line in path.read_text("utf-8").splitlines()]
    ignored = [line for line in marked if "# type: ignore" in line]
    assert len(ignored) <= 30
    assert all(line.count("#") > 1 for line in ignored), "say why mypy cannot see it"


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "misc"}
    assert not [path for path in sources() if drawers & {path.stem, path.parent.name}]


def test_command_line_imports_nothing_heavy() -> None:
    if not is_module("cli"):
        pytest.skip("there is no command line yet")
    heavy = ["torch", "transformers", "numpy", "peft", "gguf", "bitsandbytes"]
    code = f"import sys, adaptmerge.cli; print(*(m for m in {heavy} if m in sys.modules))"
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
