"""The bytes that commands write, as the sha256 of every file.

Commands that only copy, join, permute and scale write the same bytes on every machine: their hashes are in
goldens.json, and a test holds them. The others multiply matrices, which processors round differently; they
are compared on one machine, before and after a change that should not change them:

    python tests/goldens.py record build/before.json
    python tests/goldens.py check build/before.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from console import run

ROOT = Path(__file__).resolve().parent.parent
RECORDED = Path(__file__).with_suffix(".json")
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 400
WORKERS = (1, 4)

# The files of these are the same on every machine, but for reports and cards, which have norms.
PORTABLE = {
    "native": "convert LORA --to native -o OUT",
    "native-file": "convert VERA --to native -o OUT.safetensors",
    "peft-again": "convert OUT/../native --to peft -o OUT",
    "half": "convert LORA --dtype fp16 -o OUT",
    "gguf": "convert LORA --base BASE -o OUT.gguf",
    "adapterhub": "convert HUB/vera --to native -o OUT",
    "gated": "convert HUB/../llama/lora_gating --to native -o OUT",
    "stacked": "combine a=LORA:0.5 b=OTHER:0.25 --method cat -o OUT",
    "heads": "combine LANGUAGE KIND --method cat --heads concat -o OUT",
    "heads-apart": "combine LANGUAGE KIND --method cat --heads separate -o OUT",
    "scales": "combine IA3 IA3 --method ia3-linear -o OUT",
    "prompts": "combine PROMPT:0.5 PROMPT:0.5 -o OUT",
    "copied": "fuse BASE LNTUNING --dtype bf16 -o OUT",
}
# These multiply, so that a processor has its say.
COMPUTED = {
    "svd": "combine a=LORA:0.7 b=OTHER:0.3 --rank 6 -o OUT",
    "energy": "combine LORA OTHER PERL --energy 0.9 --ranks per-site --method svd -o OUT",
    "linear": "combine LORA OTHER RSLORA --base BASE --dtype fp16 -o OUT",
    "dora": "combine DORA:0.5 PERL:0.5 --base BASE -o OUT",
    "families": "combine LOHA:0.5 OFT:0.5 --base BASE --as lora --rank 8 -o OUT",
    "vera": "combine VERA VERA --as vera -o OUT",
    "experts": "convert LOKR --base BASE --as lora --rank 4 -o OUT",
    "recipe": "run OUT/../recipe.yaml -o OUT",
    "bf16": "fuse BASE a=LORA:0.5 b=IA3:0.5 --dtype bf16 -o OUT",
    "adaptive": "fuse BASE DORA --dtype bf16 --rounding adaptive -o OUT",
    "stochastic": "fuse BASE LORA --dtype bf16 --rounding stochastic -o OUT",
    "out-again": "fuse OUT/../bf16 a=LORA:-0.5 -o OUT",
    "nf4-anew": "fuse BASE LORA --quant nf4,double -o OUT",
    "nf4": "fuse OUT/../nf4-anew OTHER -o OUT",
    "nf4-kept": "fuse OUT/../nf4-anew PERL --scales keep --max-loss 9 -o OUT",
    "nf4-calibrated": "fuse OUT/../nf4-anew OTHER --calibration OUT/../text.txt -o OUT",
    "dequantised": "fuse OUT/../nf4-anew OTHER --quant bf16 -o OUT",
    "grown": "fuse BASE LORA --quant nf4 --max-growth 20% -o OUT",
    "int8": "fuse BASE OTHER --quant int8-channel -o OUT",
    "moments": "calibrate BASE OUT/../text.txt --tokens 2048 -o OUT.safetensors",
    "extract": "extract BASE OUT/../bf16 --rank 8 -o OUT",
    "extract-energy": "extract BASE OUT/../copied --energy 0.99 --dtype fp32 -o OUT",
}
COMMANDS = {**PORTABLE, **COMPUTED}


def places() -> dict[str, str]:
    """What the words of the commands stand for."""
    tiny, hub = ROOT / "fixtures" / "tinyllama", ROOT / "fixtures" / "adapterhub"
    found = {
        "BASE": tiny / "base",
        "LORA": tiny / "lora-r8-shakespeare",
        "OTHER": tiny / "lora-r8-cheaders",
        "PERL": tiny / "lora-r8-perl",
        "RSLORA": tiny / "lora-r16-rslora-qv-perl",
        "DORA": tiny / "lora-r4-dora-embed-cheaders",
        "IA3": tiny / "ia3-shakespeare",
        "VERA": tiny / "vera-r64-shakespeare",
        "LOHA": tiny / "loha-r4-shakespeare",
        "LOKR": tiny / "lokr-r4-perl",
        "OFT": tiny / "oft-b16-cheaders",
        "PROMPT": tiny / "prompt-8-cheaders",
        "LNTUNING": tiny / "lntuning-cheaders",
        "HUB": hub / "bert",
        "LANGUAGE": ROOT / "fixtures" / "classifiers" / "language",
        "KIND": ROOT / "fixtures" / "classifiers" / "kind",
    }
    return {word: str(path) for word, path in found.items()}


def words_of(command: str, output: Path) -> list[str]:
    """The arguments of a command that writes to `output`."""
    known = places()
    return [_placed(word, known, output) for word in command.split()]


def _placed(word: str, known: Mapping[str, str], output: Path) -> str:
    name, equals, rest = word.rpartition("=") if word[:2] in ("a=", "b=") else ("", "", word)
    place, colon, weight = rest.partition(":")
    head, slash, tail = place.partition("/")
    if head.startswith("OUT"):
        inside = str(output.parent / tail.removeprefix("../")) if tail else f"{output}{head[3:]}"
        return f"{name}{equals}{inside}{colon}{weight}"
    return f"{name}{equals}{known.get(head, head)}{slash}{tail}{colon}{weight}"


def prepare(folder: Path) -> None:
    """The files that commands read beside the fixtures."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    tiny = ROOT / "fixtures" / "tinyllama"
    recipe = f"""inputs:
  - {{name: prose, source: {tiny / "lora-r8-shakespeare"}}}
  - {{name: code, source: {tiny / "lora-r8-cheaders"}}}
weights: {{prose: 0.7, code: 0.3}}
sites:
  - match: "*.mlp.*"
    weights: {{code: [1.0, 0.4]}}
rank: 8
"""
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")


def hashes_of(folder: Path, commands: Mapping[str, str], jobs: int) -> dict[str, str]:
    """The sha256 of every file that the commands write below a folder, by its path there."""
    prepare(folder)
    for name, command in commands.items():
        takes_jobs = command.split()[0] not in ("calibrate", "run")
        more = ["--jobs", str(jobs)] if takes_jobs else []
        outcome = run(*words_of(command, folder / name), *more)
        assert outcome.code == 0, f"{name}: {command}\n{outcome.stderr}"
    made = [path for name in commands for path in written(folder, name)]
    return {path.relative_to(folder).as_posix(): sha256(path, folder) for path in made}


def written(folder: Path, name: str) -> list[Path]:
    """The files of one output."""
    top = [folder / name, *folder.glob(f"{name}.*")]
    return sorted(path for path in {*top, *(folder / name).rglob("*")} if path.is_file())


def sha256(path: Path, folder: Path) -> str:
    """The hash of a file, of which text must not say where it was made."""
    data = path.read_bytes()
    if path.suffix in (".json", ".md"):
        data = data.replace(str(folder).encode(), b"TMP").replace(str(ROOT).encode(), b"ROOT")
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Records or checks what all commands write on this machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    asked = parser.parse_args()
    found = {}
    for jobs in WORKERS:
        with tempfile.TemporaryDirectory() as folder:
            made = hashes_of(Path(folder), COMMANDS, jobs)
        found[str(jobs)] = made
    if asked.what == "record":
        asked.file.parent.mkdir(parents=True, exist_ok=True)
        asked.file.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
        print(f"recorded {sum(map(len, found.values()))} files")
        return
    before = json.loads(asked.file.read_text(encoding="utf-8"))
    wrong = [
        f"{jobs} workers: {name}"
        for jobs in before
        for name in sorted({*before[jobs], *found[jobs]})
        if before[jobs].get(name) != found[jobs].get(name)
    ]
    print("\n".join(wrong) or f"all {sum(map(len, found.values()))} files are the same")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
