"""From logits to the next token: greedy, temperature, top-k and top-p (Holtzman et al., 2019).

Every row of a batch draws from its own generator, so that what a prompt samples depends on the seed
and on its place in the batch and never on its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The nucleus of a language model is nearly always inside its first thousand tokens, and finding
# those costs a tenth of a full sort of the vocabulary.
_NUCLEUS_GUESS = 1024


class Sampler:
    """Draws one token per row.

    Args:
        rows: number of rows B of the logits that will come.
        temperature: logits are divided by it; 0 takes the largest logit (greedy). Default 0.
        top_k: keep the k largest logits only. None keeps all.
        top_p: keep the smallest set of largest probabilities whose sum reaches `top_p`, 0 < top_p
            <= 1. None keeps all. With `top_k` it applies to the probabilities among the k kept.
        seed: of the rows' generators (row r uses a seed derived from `seed` and r). None draws one
            from torch's generator, so that `torch.manual_seed` decides.

    Raises:
        ValueError: a temperature, top_k or top_p out of its range.
    """

    def __init__(
        self,
        rows: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"generate: expected temperature >= 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: expected top_k >= 1, got {top_k}")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"generate: expected 0 < top_p <= 1, got {top_p}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._generators: list[torch.Generator] = []
        if temperature > 0:
            base = int(torch.randint(2**62, ())) if seed is None else seed
            self._generators = [
                torch.Generator().manual_seed((base + 0x9E3779B97F4A7C15 * r) % 2**63)
                for r in range(rows)
            ]

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [B, V] of any float dtype to token ids [B], int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        return torch.stack(
            [self._draw(row, g) for row, g in zip(logits, self._generators, strict=True)]
        )

    def _draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        candidates, probabilities = self._candidates(logits)
        u = torch.rand((), generator=generator, dtype=torch.float64)
        cumulative = probabilities.double().cumsum(-1)
        i = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
        i = i.clamp_max(len(cumulative) - 1)
        return i if candidates is None else candidates[i]

    def _candidates(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """Kept token ids, likeliest first, and their weights; ids None: all, in order."""
        if self.top_k is not None:
            values, ids = logits.topk(min(self.top_k, len(logits)))
            p = values.softmax(-1)
            return (ids, p) if self.top_p is None else _nucleus(ids, p, self.top_p)
        p = logits.softmax(-1)
        if self.top_p is None:
            return None, p
        head, ids = p.topk(min(_NUCLEUS_GUESS, len(p)))
        if head.sum() < self.top_p:
            head, ids = p.sort(descending=True)
        return _nucleus(ids, head, self.top_p)


def _nucleus(ids: Tensor, p: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The shortest prefix of descending `p` whose sum reaches top_p; never empty."""
    before = p.cumsum(-1) - p
    kept = int((before < top_p).sum().clamp_min(1))
    return ids[:kept], p[:kept]
