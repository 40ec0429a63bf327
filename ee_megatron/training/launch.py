"""Start stages: in this process, on several ranks, or as one rank of a Slurm step."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from ..config.cluster import JobShape, job_shape, require_ray_tokens, seats
from ..config.derive import actor_share, ranks, start_timeout
from ..config.device import asks_for_gpus, gpu_files, hides_all, pick_device, require_compiler
from ..config.identity import outdated, stage_dir, stage_order
from ..config.schema import RunConfig, VllmConfig
from ..exit_rules import Threshold
from ..families.hf_directory import HFDirectory
from ..planning.command import allocation, launch_command
from . import stages
from .ranks import (
    PARTING_S,
    WITH_PARENT,
    Forked,
    Stopped,
    adopt_rank,
    follow_parent,
    free_port,
    is_rank,
    listener,
    run_ranks,
)

MODULES = {
    "import-checkpoint": "import_checkpoint.import_model",
    "pretrain": "pretrain.pretrain",
    "teacher": "teacher.train_teacher",
    "traces": "teacher.make_traces",
    "calibrate": "calibrate.calibrate",
    "rl": "reinforce.reinforce",
    "evaluate": "evaluate.evaluate",
}
"""Each stage's function, imported when it is run; called with the settings and the paths from `stages.inputs`."""
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DEEPSPEED_LOG_LEVEL": "error",
    "DS_LOG_LEVEL": "error",
    # A spinning OpenMP thread takes the core that another rank or actor needs; passive waiting costs nothing alone.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def run_stage(stage: str, cfg: RunConfig, overrides: list[str]) -> None:
    """Run one stage to its end; skip it if it has finished with the same settings.

    A learning stage with several ranks is started as so many processes, unless this already is one of them (RANK, or
    SLURM_PROCID in a step of several tasks); raises SystemExit with the code of the rank that failed. In a Slurm step a
    stage that stops on request ends the process with `ranks.STOPPED`.
    """
    adopt_rank(os.environ)
    bound_memory(os.environ)
    if "SLURM_STEP_ID" in os.environ or (WITH_PARENT in os.environ and ranks(cfg) == 1):
        # Elsewhere TERM comes from a launcher that wants its ranks to end, not to finish their step.
        listener.listen()
    follow_parent()
    if stages.is_done(cfg, stage):
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{stage}: finished before, in {stage_dir(cfg, stage)}")
        return
    stages.check_inputs(cfg, stage)
    here = ranks(cfg) if stage in stages.LEARNS else 1
    require_device(cfg, [stage], int(os.environ.get("LOCAL_WORLD_SIZE", here)))
    if "RANK" not in os.environ:
        if before := outdated(cfg, stage):
            changed = f"{stage}: the data or code of the task has changed since {before} was made"
            print(f"{changed}; now {stage_dir(cfg, stage)}")
        forks = here > 1 and may_fork(cfg)
        stages.ready_model(cfg, stage)
        if here > 1:
            _on_ranks(stage, cfg, overrides, here, forks)
            return
    try:
        _run_here(stage, cfg)
    except Stopped as stop:
        print(f"{stage}: {stop}", file=sys.stderr)
        stop.leave()


def require_device(cfg: RunConfig, wanted: Sequence[str], count: int) -> None:
    """Raises ValueError unless this node has what these stages compute on: a GPU for each of `count` processes, if any,
    and what compiles kernels for it."""
    if pick_device(cfg, count) == "cpu":
        return
    if {*wanted} & {*stages.LEARNS}:
        require_compiler(sys.executable, f"device={cfg.device}")
    if cfg.rollout.backend == "vllm" and any(job_shape(cfg, stage).rollout_nodes for stage in wanted):
        require_compiler((cfg.rollout.vllm or VllmConfig()).python, "rollout.backend=vllm")


def may_fork(cfg: RunConfig) -> bool:
    """Whether stages and ranks may be forked from this process, which has then imported what they need.

    Not with GPUs: CUDA doesn't survive a fork. Nor if this process may have computed on several threads: a child would
    wait forever for OpenMP threads that it doesn't have.
    """
    torch = sys.modules.get("torch")
    if cfg.device != "cpu" or (torch is not None and torch.get_num_threads() > 1):
        return False
    import_ahead()
    return True


def import_ahead() -> None:
    """Import in this process what stages need on a CPU. Afterwards it computes on one thread (`may_fork`)."""
    quiet_libraries()
    import torch

    from ..learner.engine import import_deepspeed

    torch.set_num_threads(1)
    _import_megatron()
    import_deepspeed(on_cpu=True)
    from . import calibrate, evaluate, reinforce, teacher  # noqa: F401

    # Imported modules are never garbage, and a collection in a child would copy all their pages.
    gc.collect()
    gc.freeze()


def _import_megatron() -> None:
    from ..parallel.cpu_shims import lean_imports

    with lean_imports():
        import megatron.core.models.gpt.gpt_model  # noqa: F401


def _run_here(stage: str, cfg: RunConfig) -> None:
    quiet_libraries()
    if stage in stages.LEARNS:
        _import_megatron()
    if stage == "pretrain":
        # For ranks that torchrun started, no parent has drawn the model.
        stages.ready_model(cfg, stage)
    module, _, function = MODULES[stage].partition(".")
    getattr(importlib.import_module(f".{module}", __package__), function)(cfg, *stages.inputs(cfg, stage))


def quiet_libraries() -> None:
    """Silence libraries' warnings and messages on import; real errors are exceptions and still arrive."""
    import warnings

    warnings.filterwarnings("ignore")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def bound_memory(environment: MutableMapping[str, str]) -> None:
    """Set variables that keep batches of changing shapes from using ever more memory. torch reads them on import;
    values that are already set stay."""
    # Such batches fragment CUDA's fixed memory segments, but not expandable ones. Newer torch has a second name for the
    # variable, which the older one would override.
    if "PYTORCH_ALLOC_CONF" not in environment:
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # On a CPU torch makes a kernel for every shape of a product and caches a thousand of them: a rank grew by 50 MiB an
    # update. One batch needs far fewer.
    environment.setdefault("LRU_CACHE_CAPACITY", "64")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def _on_ranks(stage: str, cfg: RunConfig, overrides: list[str], world: int, forks: bool) -> None:
    command = [stage, *overrides] if forks else [sys.executable, "-m", "ee_megatron.cli", stage, *overrides]
    # Ranks share the cores; more than one thread each would be slower.
    environment = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        # Batches of changing shapes fragment every arena that glibc opens for a thread.
        "MALLOC_ARENA_MAX": "2",
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    sys.stdout.flush()
    code = run_ranks(command, world, stage_dir(cfg, stage) / "ranks", environment, forks)
    if code:
        raise SystemExit(code)


def run_method(cfg: RunConfig, overrides: list[str]) -> None:
    """Run every stage in order, each in its own processes, then export the model and write the report."""
    follow_parent()
    from ..config.derive import read_dims
    from ..config.validate import validate

    validate(cfg, read_dims(cfg))
    if not all(stages.is_done(cfg, stage) for stage in stage_order(cfg)):
        require_device(cfg, stage_order(cfg), ranks(cfg))
    stages.check_given(cfg)
    from ..report.results import report_path

    evaluated = stages.is_done(cfg, "evaluate")
    if not evaluated:
        print(f"report: {report_path(cfg)}, written anew after every stage", flush=True)
    forks = not evaluated and may_fork(cfg)
    for stage in stage_order(cfg):
        if stages.is_done(cfg, stage):
            print(f"{stage}: finished before, in {stage_dir(cfg, stage)}")
            continue
        _report_so_far(cfg)
        code = _run_child([stage, *overrides], forks)
        if code:
            raise SystemExit(code)
    exported = export(cfg, shlex.join(["ee-megatron", "run", *overrides]))
    from ..report.page import report_run

    page = report_run(cfg)
    if evaluated:
        # Else the stage has just printed it.
        print((stage_dir(cfg, "evaluate") / "table.txt").read_text())
    print(f"exported model: {exported}\nreport: {page}")


def _report_so_far(cfg: RunConfig) -> None:
    """Write the report of the stages that are done, if any. Training continues even if that fails."""
    from ..report.page import report_run

    coming = [stage for stage in stage_order(cfg) if not stages.is_done(cfg, stage)]
    if len(coming) == len(stage_order(cfg)):
        return
    try:
        report_run(cfg, coming)
    except (OSError, ValueError) as error:
        print(f"report: not written this time ({error})", file=sys.stderr)


def _run_child(arguments: list[str], forks: bool) -> int:
    """Run this package's command line in a child -> its exit code. The child is stopped when this process dies; Ctrl-C
    reaches it too, and it then ends by itself with a message."""
    environment = {**os.environ, WITH_PARENT: str(os.getpid())}
    command = [sys.executable, "-m", "ee_megatron.cli", *arguments]
    child = Forked(arguments, environment) if forks else subprocess.Popen(command, env=environment)
    try:
        return child.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PARTING_S)
        child.kill()
        return 130
    finally:
        child.wait()


def export(cfg: RunConfig, command: str = "") -> Path:
    """Export the reinforced model as a Hugging Face directory whose `generate` exits early, at the chosen threshold.

    Its name follows the RL stage, but the threshold comes from the evaluation: an existing export from another
    evaluation or policy, by its manifest, is replaced, but not a model card that a user wrote. `command`: for the card.
    """
    quiet_libraries()
    from ..checkpoint.hf_export import export_hf
    from ..checkpoint.model_card import CARD, Provenance
    from ..checkpoint.store import MANIFEST, read_manifest
    from ..policy import read_policy_json

    out = stage_dir(cfg, "rl").with_name(stage_dir(cfg, "rl").name.replace("rl-", "export-"))
    base, reinforced, evaluation = stages.base_model(cfg), stages.reinforced(cfg), stage_dir(cfg, "evaluate")
    results = json.loads((evaluation / "results.json").read_text())
    policy = Threshold(float(results["meta"].get("threshold_reinforced", 0.5))).to_json()
    known = read_policy_json(reinforced)
    origin = {"evaluation": evaluation.name, "exit_policy": policy, "policy": known.sha256, "base": known.base}
    card, users = out / CARD, b""
    if out.is_dir():
        manifest = read_manifest(out) if (out / MANIFEST).is_file() else {}
        if manifest.get("origin") == origin:
            return out
        if card.is_file() and hashlib.sha256(card.read_bytes()).hexdigest() != manifest.get("card"):
            users = card.read_bytes()
        print(f"{out}: made from another evaluation or policy; it is made again from {evaluation.name}")
        shutil.rmtree(out)
    made = Provenance(command, evaluation / "results.json", "reinforced")
    export_hf(base, reinforced, out, "merge", "embed", exit_policy=policy, origin=origin, made=made)
    if users:
        card.write_bytes(users)
    return out


# -- a stage as a Slurm job -------------------------------------------------------------------------------------------


def describe_job(cfg: RunConfig, stage: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The values that slurm/common.sh reads at the start of a job. Checks first that the stage's inputs are there and
    that the allocation (SLURM_* in `environment`, if there is one) is large enough.

    Raises ValueError or FileNotFoundError.
    """
    shape = job_shape(cfg, stage)
    check_allocation(shape, environment, " ".join(allocation(cfg, stage)))
    weights, done = 0, stages.is_done(cfg, stage)
    if not done:
        stages.check_inputs(cfg, stage)
        if shape.rollout_nodes:
            require_ray_tokens()
        if asks_for_gpus(cfg) and shape.rollout_nodes and not shape.gpus_per_node:
            raise ValueError(
                f"device={cfg.device} with cluster.gpus_per_node=0: actors get the GPUs that the settings name; give "
                "cluster.gpus_per_node=<GPUs of a node>, or set device=cpu"
            )
        # This step sees what those of the ranks and of Ray will see of their nodes, which are alike.
        require_device(cfg, [stage], shape.gpus_per_node or shape.ranks_per_node)
        weights = HFDirectory(stages.ready_model(cfg, stage)).size()
    cpu = cfg.device == "cpu" or not shape.gpus_per_node
    devices = range(shape.first_device, shape.gpus_per_node)
    share = actor_share(cfg.rollout)
    # On GPUs an actor takes one core of Ray's accounts besides its share of a device: as many as devices have room for.
    cores = math.ceil(shape.actors_per_node * share) if cpu else seats(len(devices), share)
    job = {
        "nodes": str(shape.nodes),
        "learner_nodes": str(shape.learner_nodes),
        "ranks": str(shape.ranks),
        "ranks_per_node": str(shape.ranks_per_node),
        "rollout_nodes": str(shape.rollout_nodes),
        "ray_cpus": str(cores),
        "ray_gpus": "" if cpu else ",".join(map(str, devices)),
        "start_timeout_s": str(math.ceil(start_timeout(cfg.rollout, weights))),
        "directory": str(stage_dir(cfg, stage).resolve()),
        "requeue_limit": str(cfg.job.requeue_limit),
        "done": "yes" if done else "no",
    }
    if not job["directory"].isprintable():
        raise ValueError(
            f"directory={job['directory']!r}: expected printable characters only; the job's script reads it as a line"
        )
    return job


def check_allocation(shape: JobShape, environment: Mapping[str, str], flags: str) -> None:
    """Raises ValueError if the job has fewer nodes, or its nodes fewer GPUs, than `shape` needs."""
    if "SLURM_JOB_NUM_NODES" not in environment:
        return
    nodes, gpus = int(environment["SLURM_JOB_NUM_NODES"]), int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if nodes < shape.nodes or gpus < shape.gpus_per_node:
        raise ValueError(
            f"this job has {nodes} node(s) with {gpus} GPU(s) each, the settings need {shape.nodes} with "
            f"{shape.gpus_per_node}: submit with sbatch {flags}, or change cluster.nodes and cluster.gpus_per_node"
        )


def check_place(cfg: RunConfig, wanted: Sequence[str], overrides: list[str], environment: Mapping[str, str]) -> None:
    """Raises ValueError on a login node if these stages need more nodes or GPUs than this machine has: they have to be
    submitted as jobs."""
    if "SLURM_JOB_ID" in environment or is_rank(environment) or not shutil.which("sbatch"):
        return
    shapes = [job_shape(cfg, stage) for stage in wanted]
    nodes, gpus = max(shape.nodes for shape in shapes), max(shape.gpus_per_node for shape in shapes)
    if gpus and hides_all(environment.get("CUDA_VISIBLE_DEVICES")):
        # Hidden GPUs have an error of their own (`pick_device`).
        return
    here = len(gpu_files())
    if nodes > 1 or gpus > here:
        commands = "; ".join(launch_command(cfg, stage, overrides) for stage in wanted)
        raise ValueError(
            f"the settings need {nodes} node(s) with {gpus} GPU(s) each, this machine has {here}, outside a Slurm job: "
            f"submit {commands}; to run here, set cluster.nodes=1 cluster.rollout_nodes=0 cluster.gpus_per_node=0"
        )
