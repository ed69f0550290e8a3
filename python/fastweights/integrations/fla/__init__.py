"""flash-linear-attention: `patch` lets its layers run on a CPU; `ops`, `modules` need no fla.

`ops` and `modules` have fla's functions under fla's names, on our ops.
"""

from fastweights.integrations.fla.patching import patch, patched, stats, unpatch

__all__ = ["patch", "patched", "stats", "unpatch"]
