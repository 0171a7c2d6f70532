"""How property-based tests look for cases: the same ones in each run of the suite, half of them in the short one.

With TRIPTYCH_SEARCH=50 in the environment, other ones each time, and 50 times as many.
"""

import os

from hypothesis import Phase, settings

SEARCH = int(os.environ.get("TRIPTYCH_SEARCH", "0"))
WHOLE = "TRIPTYCH_WHOLE" in os.environ  # as scripts/test --all sets it


def examples(count: int) -> settings:
    phases = [Phase.explicit, Phase.generate, *([] if SEARCH else [Phase.shrink])]
    count = count * SEARCH or (count if WHOLE else -(-count // 2))
    return settings(
        max_examples=count, derandomize=not SEARCH, database=None, deadline=None, print_blob=True, phases=phases
    )
