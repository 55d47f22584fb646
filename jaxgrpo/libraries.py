"""Whether the installed libraries are those that this package and JAX ask for.

Imports none of them: of a wrong pair not even the import works.
"""

import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement

from jaxgrpo.findings import Finding, no, ok, skipped

_CHECKED = ("jax", "flax", "optax", "orbax-checkpoint", "transformers")


def check_libraries() -> Iterator[Finding]:
    """A finding for each library, by the ranges in the packages' own metadata."""
    ours = _requirements("jaxgrpo")
    if not ours:
        yield skipped("versions of libraries: jaxgrpo is not installed; pip install . says its own")
    for requirement in [*ours, *_requirements("jax")]:
        name = requirement.name
        pair = name == "jaxlib" or (name.startswith("jax-cuda") and _version(name) is not None)
        if pair or name in _CHECKED:
            yield _check(requirement, "jax" if pair else "jaxgrpo")


def _check(requirement: Requirement, who: str) -> Finding:
    version = _version(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is not None and requirement.specifier.contains(version, prereleases=True):
        return ok(f"{requirement.name} {version}")
    found = "is not installed" if version is None else f"is {version}"
    by = f"jax {_version('jax')}" if who == "jax" else who
    return no(f"{requirement.name} {found}, {by} needs {wanted}: pip install '{wanted}'")


def _requirements(name: str) -> list[Requirement]:
    """What a package always needs, and the CUDA plugins that it can have; each once."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always or requirement.name.startswith("jax-cuda"):
            found.setdefault(requirement.name, requirement)
    return [*found.values()]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
