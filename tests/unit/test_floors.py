"""Imports go one way: a module may import from floors below its own, never from above and never in a circle.

FLOORS is the project's one statement of that order (top first); CONTRIBUTING.md points here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "ee_megatron"
SOURCE = Path(__file__).parents[2] / PACKAGE

FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("externalise",),
    ("sweeps", "answering", "convert"),
    ("inference",),
    ("training",),
    ("learner", "evaluation", "planning"),
    ("checkpoint", "parallel", "scaling"),
    ("report", "model", "rollout", "tasks"),
    ("config",),
    (
        "types",
        "exit_layout",
        "arguments",
        "interrupts",
        "exits",
        "exit_rules",
        "policy",
        "products",
        "kernels",
        "families",
        "objectives",
        "observe",
        "statistics",
        "transfer",
        "host_memory",
        "tensors",
    ),
)
# Within the ground floor, which has no circle.
SAME_FLOOR = {
    ("exits", "exit_layout"),
    ("exit_rules", "exits"),
    ("objectives", "exits"),
    ("policy", "exits"),
    ("products", "kernels"),
    ("policy", "families"),
    ("policy", "tensors"),
    ("observe", "types"),
}


def module_name(file: Path, root: Path) -> str:
    parts = [*file.relative_to(root.parent).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path, root: Path, with_types: bool = True) -> Iterator[str]:
    """Dotted names below the package that a file imports, relative ones resolved, those inside functions too.

    Without `with_types` imports under TYPE_CHECKING, which never run, are left out.
    """
    tree = ast.parse(file.read_text(), str(file))
    never = [(n.lineno, n.end_lineno or n.lineno) for n in ast.walk(tree) if not with_types and is_type_check(n)]
    package = module_name(file, root).split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or any(a <= node.lineno <= b for a, b in never):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == root.name)


def is_type_check(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def unit(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(root: Path) -> list[str]:
    floor_of = {name: level for level, names in enumerate(FLOORS) for name in names}
    found: list[str] = []
    # A file that is copied into exported models stands alone: it is data, not part of the house.
    for file in sorted(f for f in root.rglob("*.py") if "export_files" not in f.parts):
        source = unit(module_name(file, root))
        if not source:
            continue
        if source not in floor_of:
            found.append(f"{source}: stands on no floor; add it to FLOORS")
            continue
        for name in imported(file, root):
            target = unit(name)
            # The package's version is a constant of its own, below every floor.
            if target in (source, "", "__version__"):
                continue
            if target not in floor_of:
                found.append(f"{file.name} imports {name}, which stands on no floor")
            elif floor_of[target] <= floor_of[source] and (source, target) not in SAME_FLOOR:
                where = "upward" if floor_of[target] < floor_of[source] else "sideways"
                found.append(f"{file.relative_to(root)} ({source}) imports {where}: {name}")
    return found


def cycle(root: Path) -> list[str]:
    """A circle of modules that import one another, at their head or in a function, or []."""
    files = {module_name(f, root): f for f in root.rglob("*.py")}
    graph = {
        name: {resolve(target, files) for target in imported(file, root, with_types=False)} - {name, ""}
        for name, file in files.items()
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if circle := visit(target, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := visit(name, []))), [])


def resolve(name: str, files: dict[str, Path]) -> str:
    """The module that an imported name stands for: itself, or the module that it is taken from."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def plant(root: Path, files: dict[str, str]) -> Path:
    house = root / PACKAGE
    for name, text in files.items():
        file = house / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    (house / "__init__.py").touch()
    return house


def test_every_import_goes_down() -> None:
    assert sum(1 for _ in SOURCE.rglob("*.py")) > 10
    assert violations(SOURCE) == []


def test_every_import_within_the_package_finds_something() -> None:
    files = {module_name(f, SOURCE): f for f in SOURCE.rglob("*.py")}
    missing = [
        f"{file.name}: {name}"
        for file in files.values()
        for name in imported(file, SOURCE)
        if resolve(name, files) not in (name, name.rpartition(".")[0])
    ]
    assert missing == []


def test_no_modules_import_in_a_circle() -> None:
    assert cycle(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("rollout/decoder.py", "from ..training import launch", "upward: ee_megatron.training.launch"),
        ("rollout/decoder.py", "import ee_megatron.learner.engine", "upward: ee_megatron.learner.engine"),
        ("tasks/base.py", "def f():\n    from ..report.page import write_report", "sideways: ee_megatron.report"),
        ("model/gpt.py", "from ee_megatron.rollout import decoder", "sideways: ee_megatron.rollout.decoder"),
        ("types.py", "from . import exits", "sideways: ee_megatron.exits"),
        ("attic/old.py", "", "attic: stands on no floor"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, text: str, expected: str) -> None:
    house = plant(tmp_path, {file: text, "exits.py": ""})
    assert any(expected in line for line in violations(house)), violations(house)


def test_imports_downward_are_let_through(tmp_path: Path) -> None:
    files = {
        "training/launch.py": "from ..config.schema import RunConfig\nfrom .. import policy",
        "policy.py": "from .exits import x",
    }
    assert violations(plant(tmp_path, files)) == []


@pytest.mark.parametrize("back", ["from .a import x", "def f():\n    from . import a"])
def test_a_planted_circle_is_found(tmp_path: Path, back: str) -> None:
    house = plant(tmp_path, {"model/a.py": "from . import b", "model/b.py": back})
    assert cycle(house) == ["ee_megatron.model.a", "ee_megatron.model.b", "ee_megatron.model.a"]


def test_an_import_for_types_alone_makes_no_circle(tmp_path: Path) -> None:
    back = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x"
    assert cycle(plant(tmp_path, {"model/a.py": "from . import b", "model/b.py": back})) == []


def runs_without(names: tuple[str, ...], imports: str) -> None:
    """In a process of its own, where these packages can't be imported."""
    code = f"import sys\nfor name in {names}:\n    sys.modules[name] = None\nimport {imports}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_vllms_process_needs_nothing_that_its_environment_lacks() -> None:
    """The package is there without its dependencies (Makefile): vLLM pins other versions of them."""
    missing = ("hydra", "omegaconf", "megatron", "deepspeed", "datasets", "submitit", "ray")
    runs_without(missing, "ee_megatron.rollout.pool.vllm_process")


def test_stages_that_only_ask_the_pool_do_without_megatron() -> None:
    """It takes as long to import as everything else together."""
    runs_without(("megatron", "deepspeed"), "ee_megatron.training.traces, ee_megatron.training.evaluate")
