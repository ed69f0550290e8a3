"""Every op, flat: `fastweights.functional.<op>`."""

__all__: list[str] = []
