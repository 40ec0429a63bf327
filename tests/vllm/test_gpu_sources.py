"""What a GPU's model runner has of what the plug-in takes from it, by its source: the wheel for CPUs ships it, and
overrides parts of it. And the key under which vLLM keeps what it compiles."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm_setup import LAYERS, by_vllm, make_model

from ee_megatron.policy import PolicySpec
from ee_megatron.rollout.vllm.engine import EngineSettings

PLUGIN = Path(__file__).parents[2] / "ee_megatron" / "rollout" / "vllm"
# What the plug-in replaces, where a GPU's runner assigns it, and to what. A new place may undo the replacement.
ASSIGNED = {
    ("__init__", "sampler"): ["Sampler"],
    ("load_model", "model"): [
        "BreakableCUDAGraphWrapper", "CUDAGraphWrapper", "UBatchWrapper", "UBatchWrapper", "model_loader.load_model",
        "self.load_lora_model",
    ],
    ("shutdown", "model"): ["None"],
}  # fmt: skip
WRAPPERS = {name for name in ASSIGNED["load_model", "model"] if name.endswith("Wrapper")}


@pytest.fixture(scope="module")
def sources(vllm_python: str) -> Path:
    (found,) = Path(vllm_python).parents[1].glob("lib/python*/site-packages/vllm")
    return found


def class_in(file: Path, name: str) -> ast.ClassDef:
    (found,) = [
        node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return found


def functions(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}


def stores(node: ast.AST) -> Iterator[tuple[str, str, ast.expr | None]]:
    """(owner, attribute, value) of each assignment to an attribute."""
    for one in ast.walk(node):
        targets = one.targets if isinstance(one, ast.Assign) else [one.target] if isinstance(one, ast.AnnAssign) else []
        for target in (part for each in targets for part in ast.walk(each)):
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                yield ast.unparse(target.value), target.attr, one.value  # type: ignore[union-attr]


def taken(owners: set[str]) -> set[str]:
    """Attributes that the plug-in reads of or sets on what goes by one of these names."""
    trees = [ast.parse(file.read_text()) for file in PLUGIN.glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value) in owners}


def test_a_gpus_runner_has_what_the_plug_in_takes(sources: Path):
    runner = class_in(sources / "v1/worker/gpu_model_runner.py", "GPUModelRunner")
    own = {attribute for owner, attribute, _ in stores(functions(runner)["__init__"]) if owner == "self"}
    asked = taken({"runner", "self.runner", "self.model_runner"})
    assert {"_model_forward", "sample_tokens", "sampler", "input_batch", "get_model"} <= asked
    assert asked <= own | functions(runner).keys(), asked - own - functions(runner).keys()
    worker = class_in(sources / "v1/worker/gpu_worker.py", "Worker")
    assert "load_model" in functions(worker) and "model_runner" in {name for _, name, _ in stores(worker)}


def test_nothing_else_assigns_what_the_plug_in_replaces(sources: Path):
    file = sources / "v1/worker/gpu_model_runner.py"
    runner, found = class_in(file, "GPUModelRunner"), dict[tuple[str, str], list[str]]()
    for name, function in functions(runner).items():
        for owner, attribute, value in stores(function):
            if owner == "self" and attribute in ("model", "sampler", "_model_forward", "sample_tokens"):
                assert value is not None
                maker = next((one.func for one in ast.walk(value) if isinstance(one, ast.Call)), value)
                found.setdefault((name, attribute), []).append(ast.unparse(maker))
    assert {place: sorted(makers) for place, makers in found.items()} == ASSIGNED
    # `get_model` is to know every wrapper.
    known = {node.id for node in ast.walk(functions(runner)["get_model"]) if isinstance(node, ast.Name)}
    assert known >= WRAPPERS
    others = [
        (file.name, owner, name)
        for file in sources.rglob("*.py")
        for owner, name, _ in stores(ast.parse(file.read_text()))
        if owner.split(".")[-1] in ("runner", "model_runner") and name in ("model", "sampler")
    ]
    assert not others


def test_what_was_compiled_for_other_exits_is_not_found(vllm_python: str, tmp_path: Path):
    """A graph has its exits' depths in it: one of other exits would exit there, and nobody would know."""
    path = make_model("llama", tmp_path / "model")
    specs = [
        PolicySpec(LAYERS, (1, 3, 4), rank=4),
        PolicySpec(LAYERS, (1, 3, 5), rank=4),
        PolicySpec(LAYERS, (1, 3), rank=4),
        PolicySpec(LAYERS, (1, 3, 4), rank=4, gate_width=3),
        PolicySpec(LAYERS, (1, 3, 4), rank=4, gate_input="raw"),
        PolicySpec(LAYERS, (1, 3, 4), rank=8),
    ]
    others = (("max_model_len", 256),)
    job = [EngineSettings(str(path), spec, torch.float32, compile=True, others=others) for spec in specs]
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    keys = by_vllm(vllm_python, tmp_path, "cache_keys", str(tmp_path / "job"))
    assert len(set(keys[:5])) == 5
    # Adapters are merged into the base: the same graph.
    assert keys[5] == keys[0]
