"""Import the compiled part and explain what to do when that fails."""

import torch

try:
    from fastweights import _C
except ImportError as error:
    raise ImportError(
        f"fastweights: its compiled module does not load beside torch {torch.__version__} "
        f"(torch >= 2.10 is needed): {error}. Reinstall with: "
        "pip install --no-build-isolation --force-reinstall --no-deps fastweights"
    ) from error

__all__ = ["_C"]
