"""The public names and signatures are a committed text, so that a change of them shows in a diff.

To accept a change: python tests/test_public_api.py
"""

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest

SNAPSHOT = Path(__file__).with_name("public_api.txt")
MODULES = (
    "fastweights",
    "fastweights.adapters",
    "fastweights.functional",
    "fastweights.integrations.fla",
    "fastweights.integrations.fla.modules",
    "fastweights.integrations.fla.ops",
    "fastweights.integrations.peft",
    "fastweights.integrations.transformers",
    "fastweights.nn",
    "fastweights.optim",
    "fastweights.quantization.formats",
    "fastweights.reference",
    "fastweights.testing",
    "fastweights.training",
)


def signature(thing):
    if isinstance(thing, type) and issubclass(thing, tuple) and hasattr(thing, "_fields"):
        return f"({', '.join(thing._fields)})"
    if dataclasses.is_dataclass(thing):
        return f"({', '.join(field.name for field in dataclasses.fields(thing))})"
    if not callable(thing):
        return ""
    parameters = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(thing).parameters.values()
        if not p.name.startswith("_")
    ]
    return str(inspect.Signature(parameters))


def lines():
    for name in MODULES:
        module = importlib.import_module(name)
        for public in sorted(module.__all__):
            yield f"{name}.{public}{signature(getattr(module, public))}"


def test_matches_the_snapshot():
    assert SNAPSHOT.read_text().splitlines() == list(lines()), __doc__


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_documented(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    for public in module.__all__:
        assert inspect.getdoc(getattr(module, public)), f"{name}.{public}"


def test_every_op_is_in_the_flat_indexes():
    import fastweights.functional
    import fastweights.reference
    from fastweights.testing import all_specs

    for spec in all_specs():
        assert getattr(fastweights.functional, spec.name) is spec.function
        assert getattr(fastweights.reference, spec.name) is spec.reference


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n")
