"""What a bug report needs."""

from __future__ import annotations

__all__ = ["show_config"]


def show_config() -> None:
    """Print versions, build, CPU level and threads: paste it into a bug report.

    Example:
        >>> import fastweights as fw
        >>> fw.show_config()  # doctest: +ELLIPSIS
        fastweights ...
    """
    from fastweights.testing.machine import facts

    for name, value in facts().items():
        print(f"{name:12} {value}")
