"""Every module, flat: `fastweights.nn.<Module>`."""

__all__: list[str] = []
