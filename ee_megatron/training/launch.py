"""Starting stages: in this process, on ranks of its own (torchrun), or as one rank of a Slurm step."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path

from ..config.derive import ranks
from ..config.device import pick_device
from ..config.identity import outdated, stage_dir, stage_order
from ..config.schema import RunConfig
from ..exit_rules import Threshold
from . import stages
from .preemption import PARTING_S, WITH_PARENT, Stopped, dying_with_me, follow_parent, listener
from .ranks import Forked, Ranks, free_port
from .slurm import adopt_rank


def run_stage(stage: str, cfg: RunConfig, overrides: list[str]) -> None:
    """Run one stage to its end; nothing happens if it has finished before with the same settings.

    A learning stage with several ranks is started as so many processes, unless this already is one of them (RANK, or
    SLURM_PROCID in a step of several tasks); raises SystemExit with the code of the rank that failed. In a Slurm step a
    stage that is told to stop ends the process, with `stopping.STOPPED`.
    """
    adopt_rank(os.environ)
    grow_segments(os.environ)
    bound_caches(os.environ)
    parent = os.environ.pop(WITH_PARENT, "")
    if "SLURM_STEP_ID" in os.environ or (parent and ranks(cfg) == 1):
        # Elsewhere TERM comes from a launcher that wants its ranks to end, not to go on to their next step.
        listener.listen()
    if parent:
        follow_parent(int(parent))
    if stages.is_done(cfg, stage):
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{stage}: finished before, in {stage_dir(cfg, stage)}")
        return
    stages.check_inputs(cfg, stage)
    before = None if "RANK" in os.environ else outdated(cfg, stage)
    if before is not None:
        print(f"{stage}: the data at {cfg.task.path} has changed since {before} was made; now {stage_dir(cfg, stage)}")
    here = ranks(cfg) if stage in stages.LEARNS else 1
    pick_device(cfg, int(os.environ.get("LOCAL_WORLD_SIZE", here)))
    launches = here > 1 and "RANK" not in os.environ
    forks = launches and may_fork(cfg)
    if "RANK" not in os.environ:
        stages.ready_model(cfg, stage)
    if launches:
        _on_ranks(stage, cfg, overrides, here, forks)
        return
    try:
        _run_here(stage, cfg)
    except Stopped as stop:
        print(f"{stage}: {stop}", file=sys.stderr)
        stop.leave()


def may_fork(cfg: RunConfig) -> bool:
    """Whether stages and ranks may be forked off this process, which then has imported what they need.

    Not for GPUs: CUDA doesn't survive a fork. Nor where this process may have computed on several threads: a child
    would wait for ever for OpenMP threads that it doesn't have.
    """
    torch = sys.modules.get("torch")
    if cfg.device != "cpu" or (torch is not None and torch.get_num_threads() > 1):
        return False
    import_ahead()
    return True


def import_ahead() -> None:
    """Import what stages need on a CPU. From then on this process computes on one thread (`may_fork`)."""
    quiet_libraries()
    import torch

    from ..learner.engine import import_deepspeed
    from ..parallel.cpu_shims import lean_imports

    torch.set_num_threads(1)
    with lean_imports():
        import megatron.core.models.gpt.gpt_model  # noqa: F401
    import_deepspeed(on_cpu=True)
    from . import calibrate, evaluate, reinforce, teacher  # noqa: F401

    # What is imported is never garbage: a collection in a child would copy all its pages.
    gc.collect()
    gc.freeze()


def _run_here(stage: str, cfg: RunConfig) -> None:
    quiet_libraries()
    if stage in stages.LEARNS:
        from ..parallel.cpu_shims import lean_imports

        with lean_imports():
            import megatron.core.models.gpt.gpt_model  # noqa: F401
    if stage == "imported":
        from .import_checkpoint import import_model

        import_model(cfg)
    elif stage == "pretrain":
        from .pretrain import pretrain

        pretrain(cfg, stages.ready_model(cfg, stage))
    elif stage == "teacher":
        from .teacher import train_teacher

        train_teacher(cfg, stages.source_model(cfg))
    elif stage == "traces":
        from .teacher import make_traces

        make_traces(cfg, stages.base_model(cfg))
    elif stage == "calibrate":
        from .calibrate import calibrate

        calibrate(cfg, stages.base_model(cfg), stages.traces(cfg))
    elif stage == "rl":
        from .reinforce import reinforce

        reinforce(cfg, stages.base_model(cfg), stages.calibrated(cfg))
    else:
        from .evaluate import evaluate

        evaluate(cfg, stages.base_model(cfg))


def quiet_libraries() -> None:
    """Libraries that speak on import or at every warning; their real errors are exceptions and still arrive."""
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    # A spinning OpenMP thread takes the core that another rank or actor needs; passive waiting costs nothing alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def grow_segments(environment: MutableMapping[str, str]) -> None:
    """Batches of ever new shapes leave holes in fixed segments of CUDA's memory; ones that grow have none. Newer
    torch has a second name for the variable, which the older one would silence: whoever has set either is obeyed."""
    if "PYTORCH_ALLOC_CONF" not in environment:
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def bound_caches(environment: MutableMapping[str, str]) -> None:
    """On a CPU torch makes a kernel for every shape of a product and keeps a thousand of them: by batches of ever new
    shapes a rank grew by 50 MiB an update. As many as one batch needs are enough. Read when torch is imported; whoever
    has set either variable is obeyed."""
    environment.setdefault("LRU_CACHE_CAPACITY", "64")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def _on_ranks(stage: str, cfg: RunConfig, overrides: list[str], world: int, forks: bool) -> None:
    command = [stage, *overrides] if forks else [sys.executable, "-m", "ee_megatron.cli", stage, *overrides]
    # Ranks share the cores; more than one thread each would cost more than it brings.
    environment = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        # Batches of ever new shapes leave holes in every arena that glibc opens for a thread.
        "MALLOC_ARENA_MAX": "2",
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    sys.stdout.flush()
    code = Ranks(command, world, stage_dir(cfg, stage) / "ranks", environment, forks).run()
    if code:
        raise SystemExit(code)


def run_method(cfg: RunConfig, overrides: list[str]) -> None:
    """Every stage in order, each in processes of its own, then the exported model and the report."""
    if parent := os.environ.pop(WITH_PARENT, ""):
        follow_parent(int(parent))
    from ..config.derive import read_dims
    from ..config.validate import validate

    validate(cfg, read_dims(cfg))
    if not all(stages.is_done(cfg, stage) for stage in stage_order(cfg)):
        pick_device(cfg, ranks(cfg))
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
        code = _followed([stage, *overrides], forks, lambda: _report_so_far(cfg))
        if code:
            raise SystemExit(code)
    exported = export(cfg)
    from ..report.page import report_run

    page = report_run(cfg)
    if evaluated:
        # Else the stage has just printed it.
        print((stage_dir(cfg, "evaluate") / "table.txt").read_text())
    print(f"exported model: {exported}\nreport: {page}")


def _report_so_far(cfg: RunConfig) -> None:
    """The report of the stages that are done, if any. Training goes on whatever is wrong with it."""
    from ..report.page import report_run

    coming = [stage for stage in stage_order(cfg) if not stages.is_done(cfg, stage)]
    if len(coming) == len(stage_order(cfg)):
        return
    try:
        report_run(cfg, coming)
    except (OSError, ValueError) as error:
        print(f"report: not written this time ({error})", file=sys.stderr)


def _followed(arguments: list[str], forks: bool, meanwhile: Callable[[], None]) -> int:
    """The exit code of this package's command line in a child that Ctrl-C reaches too, and that says so and ends by
    itself then. `meanwhile` is done while it starts."""
    command = [sys.executable, "-m", "ee_megatron.cli", *arguments]
    child = Forked(arguments, dying_with_me()) if forks else subprocess.Popen(command, env=dying_with_me())
    try:
        meanwhile()
        return child.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PARTING_S)
        child.kill()
        return 130
    finally:
        # Whatever else went wrong meanwhile, the stage is not to be lost for it.
        child.wait()


def export(cfg: RunConfig) -> Path:
    """The reinforced model as a Hugging Face directory whose `generate` exits early, at the chosen threshold.

    Its name is that of the RL stage, but the threshold is the evaluation's: one that was made from other things than
    these settings lead to is made again. Its manifest says what it was made from.
    """
    quiet_libraries()
    from ..checkpoint.hf_export import export_hf
    from ..checkpoint.store import MANIFEST, read_manifest
    from ..policy import read_policy_json

    out = stage_dir(cfg, "rl").with_name(stage_dir(cfg, "rl").name.replace("rl-", "export-"))
    base, reinforced, evaluation = stages.base_model(cfg), stages.reinforced(cfg), stage_dir(cfg, "evaluate")
    results = json.loads((evaluation / "results.json").read_text())
    policy = Threshold(float(results["meta"].get("threshold_reinforced", 0.5))).to_json()
    known = read_policy_json(reinforced)
    origin = {"evaluation": evaluation.name, "exit_policy": policy, "policy": known.sha256, "base": known.base}
    if out.is_dir():
        if (out / MANIFEST).is_file() and read_manifest(out).get("origin") == origin:
            return out
        print(f"{out}: made from another evaluation or policy; it is made again from {evaluation.name}")
        shutil.rmtree(out)
    return export_hf(base, reinforced, out, "merge", "embed", exit_policy=policy, origin=origin)
