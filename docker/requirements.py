"""Print what pip is to install for an image, one requirement a line; the code comes later.

An image's dependencies are a layer of their own, which a change of the code leaves as it is. Used
as `python3 requirements.py PYPROJECT EXTRAS [NAME==VERSION ...]`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def requirements(pyproject: Path, extras: Iterable[str], pins: Iterable[str]) -> list[str]:
    """Return the project's requirements with those of some extras and of its build.

    Args:
        pyproject: path of `pyproject.toml`.
        extras: names of extras.
        pins: `NAME==VERSION`, each instead of or besides what the project says of NAME; one with
            no version says nothing.
    """
    with pyproject.open("rb") as stream:
        document = tomllib.load(stream)
    project = document["project"]
    wanted = [*document["build-system"]["requires"], *project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    pinned = {_name(pin): pin for pin in pins if not pin.endswith("==")}
    return [line for line in wanted if _name(line) not in pinned] + list(pinned.values())


def _name(requirement: str) -> str:
    found = _NAME.match(requirement)
    if found is None:
        raise SystemExit(f"requirements.py: {requirement!r} is not a requirement")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def main(arguments: Sequence[str]) -> None:
    """Print the requirements that the command line asks for."""
    pyproject, extras, *pins = arguments
    print(*requirements(Path(pyproject), filter(None, extras.split(",")), pins), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
