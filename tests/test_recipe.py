from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adaptmerge.algebra.fit import Budget
from adaptmerge.commands.combine import Options, combine
from adaptmerge.commands.recipe import Recipe, check_locked, json_schema, load_recipe
from adaptmerge.errors import AdaptmergeError, InputError, UsageError
from adaptmerge.files.listing import sha256_of
from adaptmerge.formats.inputs import open_inputs
from adaptmerge.merging.weights import SiteRule

ROOT = Path(__file__).resolve().parent.parent
SHAKESPEARE = ROOT / "fixtures" / "tinyllama" / "lora-r8-shakespeare"


def recipe(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "recipe.yaml")


def refusal(folder: Path, text: str, kind: type[AdaptmergeError] = UsageError) -> list[str]:
    """The problems of a recipe, without the folder, in which the inputs a, b and xx lie."""
    for name in ("a", "b", "xx"):
        (folder / name).mkdir(exist_ok=True)
    with pytest.raises(kind) as caught:
        recipe(folder, text)
    assert type(caught.value) is kind
    return [line.replace(f"{folder}/", "") for line in caught.value.problems]


def example() -> str:
    text = (ROOT / "docs" / "recipes.md").read_text()
    block: str
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    return block


@pytest.fixture
def example_recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    return recipe(tmp_path, example())


def test_the_example_of_the_docs_runs(example_recipe: Recipe, tmp_path: Path) -> None:
    specs, output = example_recipe.specs(), example_recipe.output()
    assert output == tmp_path / "merged"
    check_locked(example_recipe, open_inputs(specs))
    report = combine(specs, output, example_recipe.options())
    assert report.options["weights"] == {"prose": 0.7, "code": 0.3}
    assert report.totals.truncation <= 0.05
    weights = {line.site.partition("layers.")[2]: line.weights for line in report.sites}
    assert weights["0.mlp.down_proj"] == {"prose": 1.0}
    assert weights["1.mlp.down_proj"] == {"prose": 0.7, "code": 0.5}
    assert weights["0.self_attn.q_proj"] == {"prose": 1.0, "code": 0.3}
    assert weights["0.self_attn.v_proj"] == {"prose": 0.7, "code": 0.3}
    assert {path.name for path in output.iterdir()} >= {"adapter_config.json", "adaptmerge.json"}


def test_the_example_fits_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    yaml = pytest.importorskip("yaml")
    jsonschema.validate(yaml.safe_load(example()), json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"inputs": ["a"], "mehtod": "linear"}, json_schema())


def test_the_published_schema_is_up_to_date() -> None:
    published = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
    assert published == json_schema(), "write json_schema() to docs/recipe.schema.json"


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    keys = [*json_schema()["properties"]]
    for table in json_schema()["$defs"].values():
        keys += table["properties"]
    assert not [key for key in keys if f"`{key}`" not in text]


def test_importing_recipes_imports_no_parser() -> None:
    code = "import sys, adaptmerge.commands.recipe; print({'pydantic', 'yaml', 'torch'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.strip() == "set()", ran.stderr


def test_all_keys_reach_the_options(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    found = recipe(
        tmp_path,
        """
inputs: ["sql=a?alpha=16", {source: b, weight: 1e-3, alpha: 8}]
method: svd
sum: true
rank: 4
energy: 0.9
max_error: 0.1
per_site: true
ranks: per-site
dtype: bf16
to: peft
base: base
heads: sql
allow: [base, nonfinite]
strict: true
sites:
  - {match: q_proj, kind: add, weights: {sql: [1, 2, 3], b: 0.5}}
  - {match: "re:v_proj$", weights: {b: -1}}
""",
    )
    assert found.options() == Options(
        method="svd",
        total=True,
        rules=(
            SiteRule("q_proj", {"sql": (1.0, 2.0, 3.0), "b": 0.5}, "add"),
            SiteRule("re:v_proj$", {"b": -1.0}),
        ),
        budget=Budget(4, 0.9, 0.1, True),
        dtype="bf16",
        target="peft",
        ranks="per-site",
        heads="sql",
        base=str(tmp_path / "base"),
        allow=frozenset({"base", "nonfinite"}),
        strict=True,
    )
    assert [(s.name, s.weight, s.alpha) for s in found.specs()] == [
        ("sql", None, 16.0),
        ("b", 0.001, 8.0),
    ]
    assert found.output() is None


def test_defaults_are_those_of_the_command_line(tmp_path: Path) -> None:
    assert recipe(tmp_path, "inputs: [x]").options() == Options()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("", [None, None]),
        ("weights: [2, -0.5]", [2.0, -0.5]),
        ("weights: {b: 1, a: 0}", [0.0, 1.0]),
        ("weights: ema:0.9", [None, None]),
    ],
)
def test_spellings_of_weights(tmp_path: Path, weights: str, expected: list[float | None]) -> None:
    found = recipe(tmp_path, f"inputs: [xx/a, xx/b]\n{weights}")
    assert [spec.weight for spec in found.specs()] == expected
    assert found.options().weights == ("ema:0.9" if "ema" in weights else None)


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    for made in (folder / "org" / "here", folder / "a=b", elsewhere / "org" / "there"):
        made.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    text = "inputs: [org/here, org/hub@main//sub, org/there, a=b, ./x.safetensors:2, .]\noutput: o"
    found = recipe(folder, text)
    assert [spec.source for spec in found.specs()] == [
        str(folder / "org" / "here"),
        "org/hub@main//sub",
        str(folder / "org" / "there"),  # never what happens to be in the working folder
        str(folder / "a=b"),
        str(folder / "x.safetensors"),
        str(folder),
    ]
    names = [spec.name for spec in found.specs()]
    assert names == ["here", "sub", "there", "a=b", "x", "recipes"]
    assert found.output() == folder / "o"


def test_all_problems_at_once_with_line_and_key(tmp_path: Path) -> None:
    text = """\
inputs:
  - a
  - {source: b, wieght: 3, sha256: {f: zz}}
  - source: [1]
mehtod: linear
rank: 0
sites:
  - match: x
    weights: {sql: [1, .nan], chat: no}
  - match: x
"""
    assert refusal(tmp_path, text) == [
        "recipe.yaml:3: inputs[1].sha256.f: expected 64 hexadecimal digits, found 'zz'",
        "recipe.yaml:3: inputs[1].wieght: unknown key: did you mean 'weight'?",
        "recipe.yaml:4: inputs[2].source: expected a valid string, found list",
        "recipe.yaml:5: mehtod: unknown key: did you mean 'method'?",
        "recipe.yaml:6: rank: expected greater than or equal to 1, found 0",
        "recipe.yaml:9: sites[0].weights.chat: expected a number, found False",
        "recipe.yaml:9: sites[0].weights.sql[1]: expected a finite number, found nan",
        "recipe.yaml:10: sites[1].weights: is missing",
    ]


def test_words_and_names_are_suggested(tmp_path: Path) -> None:
    text = """\
inputs: [sql=a, chat=b]
method: liner
dtype: bf61
to: peff
heads: chta
allow: [bas]
weights: {sql: 1, chat: 2, sqll: 3}
sites:
  - match: "re:("
    weights: {sq: 1}
"""
    problems = refusal(tmp_path, text)
    expected = {
        2: "method: no method is named 'liner': did you mean 'linear'?",
        3: "dtype: 'bf61': known: bf16",
        4: "to: no format is named 'peff': did you mean 'peft'?",
        5: "heads: no input is named 'chta': did you mean 'chat'?",
        6: "allow[0]: 'bas': did you mean 'base'?",
        7: "weights.sqll: no input is named 'sqll': did you mean 'sql'?",
        9: "sites[0].match: site rule 're:(' is no regular expression",
        10: "sites[0].weights.sq: no input is named 'sq': did you mean 'sql'?",
    }
    assert len(problems) == len(expected)
    for problem, (line, start) in zip(problems, expected.items(), strict=True):
        assert problem.startswith(f"recipe.yaml:{line}: {start}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("method: linear", "recipe.yaml:1: inputs: is missing"),
        ("inputs: []", "inputs: List should have at least 1 item"),
        ("inputs: [a, b]\nweights: [1]", "recipe.yaml:2: weights: has 1 number for 2 inputs"),
        ("inputs: [a, b]\nweights: {a: 1}", "recipe.yaml:2: weights: gives 'b' no number"),
        ("inputs: [xx:1, b]\nweights: last:1", "recipe.yaml:2: weights: weights are given both"),
        ("inputs: [a, b]\nweights: last:3", "recipe.yaml:2: weights: --weights last:3: there"),
        ("inputs: [n=a, n=b]", "recipe.yaml:1: inputs: two inputs are named 'n'"),
        ("inputs:\n- a?alhpa=3", "recipe.yaml:2: inputs[0]: input 'a?alhpa=3': option 'alhpa'"),
        ("inputs: [xx:nan]", "recipe.yaml:1: inputs[0]: input 'xx:nan': weight"),
        ("inputs: [{source: a, name: no}]", "quote words like no, off and on"),
        ("inputs: [a]\nranks: per_site", "recipe.yaml:2: ranks: expected 'uniform' or 'per-site'"),
        ("inputs: [a]\nrank: true", "recipe.yaml:2: rank: expected a number, found True"),
        ("inputs: [a]\nenergy: 0", "recipe.yaml:2: energy: expected greater than 0, found 0"),
        ("inputs: [a]\nmax_error: 1", "recipe.yaml:2: max_error: expected less than 1, found 1"),
        ("inputs: &x [*x]", "recipe.yaml:1: inputs[0]: expected a valid string, found list"),
    ],
)
def test_values_that_cannot_be_meant(tmp_path: Path, text: str, problem: str) -> None:
    (line,) = refusal(tmp_path, text)
    assert problem in line
    assert line.startswith("recipe.yaml:")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("inputs: [a]\ninputs: [b]", "recipe.yaml:2: the key 'inputs' is also on line 1: keep one"),
        (
            "inputs: [a]\nsites:\n- match: x\n  match: y\n  weights: {a: 1}",
            "recipe.yaml:4: the key 'match' is also on line 3: keep one",
        ),
        ("a: [b\nc: d", "recipe.yaml:2: is not YAML: expected ',' or ']'"),
        ("", "is no recipe: expected a table"),
        ("[a]", "is no recipe: expected a table"),
        ("--- {}\n--- {}", "is not YAML: but found another document"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
        ("{[a]: b}", "is not YAML: found unhashable key"),
        ("[" * 5000, "is nested too deeply"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, problem: str) -> None:
    (line,) = refusal(tmp_path, text, InputError)
    assert problem in line


def test_missing_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match=r"does not exist: did you mean '.*recipe\.yaml'\?"):
        load_recipe(tmp_path / "recpie.yaml")


def locked(tmp_path: Path, **digests: str) -> None:
    source: dict[str, Any] = {"source": str(SHAKESPEARE), "name": "prose"}
    if digests:
        source["sha256"] = {name.replace("__", "."): value for name, value in digests.items()}
    found = recipe(tmp_path, json.dumps({"inputs": [source]}))
    check_locked(found, open_inputs(found.specs()))


def test_locked_inputs(tmp_path: Path) -> None:
    model = sha256_of(SHAKESPEARE / "adapter_model.safetensors")
    config = sha256_of(SHAKESPEARE / "adapter_config.json")
    good = {"adapter_model__safetensors": model, "adapter_config__json": config}
    locked(tmp_path, **{**good, "adapter_config__json": config.upper()})
    with pytest.raises(InputError) as unpinned:
        locked(tmp_path)
    advice = f"is not pinned: add sha256: {{adapter_model.safetensors: {model}}}"
    assert f"input 'prose' {advice}" in str(unpinned.value)
    with pytest.raises(InputError) as changed:
        locked(tmp_path, **{**good, "adapter_model__safetensors": "0" * 64})
    assert changed.value.problems == (
        "input 'prose': adapter_model.safetensors is not the file that was pinned: expected sha256 "
        f"{'0' * 64}, found {model}",
    )
    with pytest.raises(InputError, match="has no file 'weights.bin' that is read"):
        locked(tmp_path, **good, weights__bin="0" * 64)


def test_addresses_of_the_hub_are_sources(tmp_path: Path) -> None:
    text = """
inputs:
  - hf://org/name@v1/sub
  - source: https://huggingface.co/org/other
    weight: 0.5
  - https://example.org/x.safetensors
"""
    sources = [spec.source for spec in recipe(tmp_path, text).specs()]
    assert sources == ["org/name@v1//sub", "org/other", "https://example.org/x.safetensors"]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """Keys, values, names, words, repeated keys and inputs that are not there."""
    text = """
inputs:
  - a
  - nowhere
method: lineer
rank: many
dytpe: bf16
to: peftt
energy: 0.5
energy: 0.6
allow: [bas]
sites:
  - match: "*"
    weights: {c: 1}
"""
    found = refusal(tmp_path, text)
    for line, said in (
        (4, "inputs[1]: nowhere: does not exist"),
        (5, "method: no method is named 'lineer': did you mean 'linear'?"),
        (6, "rank: expected a valid integer"),
        (7, "dytpe: unknown key: did you mean 'dtype'?"),
        (8, "to: no format is named 'peftt': did you mean 'peft'?"),
        (10, "the key 'energy' is also on line 9: keep one"),
        (11, "allow[0]: 'bas': did you mean 'base'?"),
        (14, "sites[0].weights.c: no input is named 'c'"),
    ):
        assert any(text.startswith(f"recipe.yaml:{line}: {said}") for text in found), (line, found)
    assert len(found) == 8


def test_inputs_that_are_wrong_do_not_hide_words_that_are(tmp_path: Path) -> None:
    found = refusal(tmp_path, "inputs: [a, 3]\nmethod: lineer\nrank: many")
    assert [line.partition(": ")[2].partition(":")[0] for line in found] == [
        "inputs[1]",
        "method",
        "rank",
    ]
