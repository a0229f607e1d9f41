"""What jdkd finds when it checks its kernels itself, as :mod:`jdkd.check` does, a line as soon as each is checked."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from typing import Any

from benchmarks.gpu.jobs import tell


def follow(rows: Iterable[Any], until: float) -> bool:
    """Tells of rows until a time, in seconds since 1970. Returns: whether none is wrong."""
    from jdkd import check

    right = True
    for row in rows:
        print(*check.lines([row]), flush=True)
        if row.is_wrong:
            right = False
            tell(failed=f"{row.op} {row.form} {row.backend} {row.dtype}", why=f"{row.state}, {row.what} {row.error}")
        if time.time() > until:
            print("out of time; the others were not checked")
            break
    return right


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.verdicts", description=__doc__)
    parser.add_argument("--until", type=float, default=float("inf"), help="in seconds since 1970")
    given = parser.parse_args(words)
    from jdkd import check

    return 0 if follow(check.run(), given.until) else 1


if __name__ == "__main__":
    sys.exit(main())
