"""python -m tests.fuzz --cases 10000 --jobs 2: damaged and hostile files for every command.

Fails with the groups of what went wrong, each with the number of a case; --case K shows that one alone,
with the fewest changes that make it fail.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.command import main  # noqa: E402

if __name__ == "__main__":
    main()
