"""The plain-torch definition of every op, flat: `fastweights.reference.<op>`."""

__all__: list[str] = []
