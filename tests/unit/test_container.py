"""The container file, which no test builds: its sources are there, its versions are those that the package allows."""

from __future__ import annotations

import re
import shlex
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "container"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [(word.upper(), rest) for line in lines if line for word, _, rest in [line.partition(" ")]]


def pins() -> dict[str, str]:
    lines = [line for line in (FOLDER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_file_is_made_of_known_instructions_in_an_order_that_builds() -> None:
    words = [word for word, _ in instructions()]
    assert set(words) <= {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert words[:2] == ["ARG", "FROM"] and words.index("COPY") > words.index("WORKDIR")
    # What an argument of the build is used for comes after it is named.
    for name in ("TORCH_INDEX", "TORCH"):
        declared = next(
            i for i, (word, rest) in enumerate(instructions()) if word == "ARG" and rest.startswith(f"{name}=")
        )
        used = [
            i for i, (word, rest) in enumerate(instructions()) if word == "RUN" and re.search(rf"\$\{{?{name}\b", rest)
        ]
        assert used and min(used) > declared


def test_every_copied_source_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for word, rest in instructions() if word == "COPY" for source in shlex.split(rest)[:-1]]
    assert {"ee_megatron", "configs", "setup.py", "docs/container/constraints.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), source


def test_every_copied_file_that_the_build_reads_is_copied() -> None:
    copied = {source for word, rest in instructions() if word == "COPY" for source in shlex.split(rest)[:-1]}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {build["readme"], *build["license-files"], "pyproject.toml", "setup.py"} <= copied


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"]])
def test_every_dependency_is_pinned_within_its_range(text: str) -> None:
    requirement = Requirement(text)
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_the_python_is_one_that_the_package_takes() -> None:
    (version,) = [rest.removeprefix("PYTHON=") for word, rest in instructions() if rest.startswith("PYTHON=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)


def test_no_index_and_no_build_of_torch_is_prescribed() -> None:
    for file in ("Dockerfile", "constraints.txt"):
        text = (FOLDER / file).read_text()
        assert "://" not in text and not re.search(r"==[^\n]*\+", text)
