"""What commands say of completions that got no reward, and their exit code for it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

_NUM_SHOWN = 3


def tell_unscored(problems: Sequence[str | None]) -> int:
    """Say on standard error how many completions have no reward, and why; `problems` has a text or
    None for each completion. Returns the exit code: 1 if no completion has a reward, 0 otherwise.
    """
    reasons = Counter(filter(None, problems))
    if not problems:
        print("there is no completion to score", file=sys.stderr)
    if reasons:
        print(f"{reasons.total()} of {len(problems)} have no reward:", file=sys.stderr)
    for text, count in list(reasons.items())[:_NUM_SHOWN]:
        print(f"  {count} x {text}", file=sys.stderr)
    if len(reasons) > _NUM_SHOWN:
        print(f"  and {len(reasons) - _NUM_SHOWN} other reasons", file=sys.stderr)
    return int(reasons.total() == len(problems))
