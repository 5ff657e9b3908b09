"""The examples in the docstrings of what the integrations offer."""

import doctest
import importlib

import pytest

pytest.importorskip("transformers")

MODULES = [
    *(f"huggingface.{name}" for name in ("heads", "prompts", "packing", "frozen", "sampling")),
    "plotting",
    "runs.line",
    "estimates",
]


def names_of_the_package():
    """What the package offers, and what its own example has built: the model that its functions' examples use."""
    package = importlib.import_module("popsd_integrations.huggingface")
    names = {name: getattr(package, name) for name in package.__all__}
    test = doctest.DocTestParser().get_doctest(package.__doc__, names, "huggingface", package.__file__, 0)
    result = doctest.DocTestRunner().run(test, clear_globs=False)
    assert result.attempted > 10 and result.failed == 0
    return test.globs


@pytest.mark.parametrize("name", MODULES)
def test_examples_say_what_happens(name):
    module = importlib.import_module(f"popsd_integrations.{name}")
    found = doctest.testmod(module, extraglobs=names_of_the_package())
    assert found.attempted > 0 and found.failed == 0
