"""Documentation that cannot promise what is not there: examples run, links lead somewhere, options
exist."""

import doctest
import importlib
import pkgutil

import pytest

import jaxgrpo

# A module with an example, by the letters that begin one.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(jaxgrpo.__path__, "jaxgrpo.")
    if ">>> " in importlib.util.find_spec(module.name).loader.get_source(module.name)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_are_found():
    assert {"jaxgrpo.grpo", "jaxgrpo.rewards.json_schema", "jaxgrpo.evaluate"} <= set(MODULES)
