"""Add up the JUnit files of several pytest runs, print one line, and fail if any case failed or none passed.

python tests/summary.py LABEL FILE...
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple


class Counts(NamedTuple):
    passed: int
    failed: int
    skipped: int


def read(path: Path) -> Counts:
    """The counts of one run; a run that left no readable file is one failure."""
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return Counts(0, 1, 0)
    tests, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return Counts(tests - failures - errors - skipped, failures + errors, skipped)


def main(label: str, *files: str) -> int:
    passed, failed, skipped = (sum(column) for column in zip(*(read(Path(file)) for file in files), strict=True))
    print(f"{label}: {passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
