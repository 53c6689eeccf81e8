"""What `verify` is compared with: the merge itself, and one forward of the base."""

from __future__ import annotations

from pathlib import Path


def verify(output: str, base: str | None = None, *, layerwise: bool = False) -> None:
    """Verifies on the CPU. A figure of a verification that does not pass would be of something else."""
    from adaptmerge.commands.verify import Questions, Verdict
    from adaptmerge.commands.verify import verify as verdict_on

    questions = Questions(base=base, device="cpu", layerwise=layerwise)
    found: Verdict = verdict_on(Path(output), questions)
    failed = [f"{c.name}: {c.status}, {c.detail}" for c in found.checks if c.status == "fail"]
    if found.status != "pass":
        raise SystemExit(f"{output} is {found.status}: {'; '.join(failed)}")


def forward(base: str) -> None:
    """Loads the base in float32 and runs it once, on the inputs of verify."""
    from adaptmerge import runtime

    inputs = runtime.inputs_for(Path(base))
    runtime.outputs_of(runtime.load_model(Path(base)), inputs)


def forward_layerwise(base: str) -> None:
    """The same with weights that are read when they are used and dropped after it."""
    from adaptmerge import runtime
    from adaptmerge.bases.open import open_base

    inputs = runtime.inputs_for(Path(base))
    runtime.outputs_of(runtime.stream_model(open_base(base)), inputs)
