"""Command lines that nobody may get anywhere with, drawn from a grammar of what goes wrong: settings, numbers, paths,
names, options. The same seed draws the same ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from ee_megatron.config.fields import settings
from ee_megatron.config.schema import RunConfig

STAGES = ("run", "pretrain", "teacher", "traces", "calibrate", "rl", "evaluate")
NO_NUMBERS = ("nan", "inf", "-inf", "1e999", "abc", "1,5", "''", "[1]", "null", "{a:1}")
NAMES = (
    "../up", "a/b", ".hidden", "-rf", "a b", "x;touch CANARY", "$(touch CANARY)", "`touch CANARY`", "a\\nb", "é",
    "x" * 101, "''", "a|b", "a&b", "a>b", "CON:", "a*", "%j", "a\"b'", "\\u202e",
)  # fmt: skip
PATHS = ("/nonexistent", "no/such/thing", "", "/dev/null", "/proc/self/mem/x", "\\x00", "~nobody/x", "'a b'")


def draw(count: int, folder: Path, seed: int = 0) -> list[list[str]]:
    """`count` command lines, each with at least one fault. They name the runs below `folder`."""
    dice = random.Random(f"bad inputs/{seed}")
    kinds = (_number, _out_of_range, _name, _path, _key, _sweep, _option, _malformed)
    return [kinds[i % len(kinds)](dice, folder) for i in range(count)]


def _stage(dice: random.Random, folder: Path, *wrong: str) -> list[str]:
    stage = dice.choice(STAGES)
    dry_run = ["--dry-run"] if dice.random() < 0.3 else []
    return [stage, "experiment=demo_cpu", f"runs={folder}/runs", *wrong, *dry_run]


def _keys(test: Callable[[object, object], bool]) -> list[str]:
    return [key for key, value, rules in settings(RunConfig()) if test(value, rules)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(dice: random.Random, folder: Path) -> list[str]:
    key = dice.choice(_keys(lambda value, _: _is_number(value)))
    return _stage(dice, folder, f"{key}={dice.choice(NO_NUMBERS)}")


def _out_of_range(dice: random.Random, folder: Path) -> list[str]:
    ruled = [each for each in settings(RunConfig()) if each[2].choices or {each[2].above, each[2].at_least} != {None}]
    key, value, rules = dice.choice(ruled)
    if rules.choices:
        return _stage(dice, folder, f"{key}={dice.choice(('nonsense', '7', 'x.y'))}")
    wrong = float(rules.above or rules.at_least or 0) - dice.choice((1, 5, 10**6))
    text = int(wrong) if isinstance(value, int) else [wrong] if isinstance(value, list) else wrong
    return _stage(dice, folder, f"{key}={text}")


def _name(dice: random.Random, folder: Path) -> list[str]:
    name = dice.choice(NAMES)
    key = dice.choice(("name", "name", "tracker.project"))
    if dice.random() < 0.3:
        sweep = ["sweep", "experiment=demo_cpu", f"runs={folder}/runs", "rl.depth_penalty.weight=0,1"]
        return [*sweep, f"--name={name}", "--dry-run"]
    return _stage(dice, folder, f"{key}={name}")


def _path(dice: random.Random, folder: Path) -> list[str]:
    path = dice.choice(PATHS)
    command = dice.randrange(6)
    if command == 0:
        return ["report", path or "nothing/here"]
    if command == 1:
        return ["generate", "--prompt", "x", "--model", path]
    if command == 2:
        return ["sweep", dice.choice(("status", "collect")), path or "nothing", f"--runs={folder}"]
    if command == 3:
        return ["slurm-spec", "rl", "experiment=demo_cpu", f"runs={folder}/runs", f"init_policy={path or '/x'}"]
    wrong = dice.choice(("model.path={}", "init_policy={}", "task=dataset task.path={}"))
    return ["run", "experiment=demo_cpu", f"runs={folder}/runs", *wrong.format(path or "/x").split(" ", 1)]


def _key(dice: random.Random, folder: Path) -> list[str]:
    key = dice.choice(_keys(lambda *_: True))
    place = dice.randrange(len(key))
    return _stage(dice, folder, f"{key[:place]}{dice.choice('qzQ')}{key[place:]}=1")


def _sweep(dice: random.Random, folder: Path) -> list[str]:
    wrong = dice.choice((
        ["rl.steps=range(1,1000000000000)"], ["rl.depth_penalty.weight=range(0,1,-1)"],
        ["rl.depth_penalty.weight=range(0,1,1e-300)"], ["rl.depth_penalty.weight=range(0,1e999)"], ["rl.steps=0,-1"],
        ["rl.steps=1:3"], ["rl.lamda=1,2"],
        ["name=a,b"], ["sweep=nothing"], ["sweep=/nonexistent.yaml"], ["budget=0,1"], ["rl.steps=1,1"],
        ["rl.steps=1,2", "--zip", "rl.steps"], ["rl.steps=1,2", "--exclude", "rl.kl_penalty.weight=1"],
        ["rl.steps=1,2", "--max-parallel", "0"], ["rl.steps=1,2", "--max-parallel", "x"],
        ["rl.steps=1,2", "--slurm", "time=1\n#SBATCH --x"], ["rl.steps=1,2", "--slurm", "nothing"],
        ["rl.steps=1,2", "--slurm", "time=soon"], ["rl.steps=1,2", "--last", "nowhere"],
        ["rl.steps=1,2", "init_policy=/nonexistent"], ["seed=1,2", "rl.seed=3"], ["isoflop.x=1", "rl.steps=1,2"],
        ["rl.steps=range(1,1000)", "rl.kl_penalty.weight=range(0,1,0.001)", "rl.seed=range(1,5000)"],
    ))  # fmt: skip
    return ["sweep", "experiment=demo_cpu", f"runs={folder}/runs", *wrong, "--dry-run"]


def _option(dice: random.Random, folder: Path) -> list[str]:
    number = dice.choice(("nan", "inf", "-inf", "abc", "", "1e999"))
    model = ["experiment=demo_cpu", f"runs={folder}/runs"]
    return dice.choice((
        ["generate", *model, "--prompt", "x", f"--temperature={number}"],
        ["generate", *model, "--prompt", "x", "--max-new-tokens=0"],
        ["generate", *model],
        ["serve", *model, f"--grace={number}"],
        ["serve", *model, f"--cache-gib={number}"],
        ["serve", *model, "--port=abc"],
        ["plan", *model, f"--tflops={number}"],
        ["plan", *model, f"--mean-depth={number}"],
        ["plan", *model, f"--memory-gib={number}"],
        ["plan", *model, "--prompt-tokens=" + "9" * 30],
        ["slurm-spec", "nothing", *model],
        ["slurm-spec", *model],
        ["report", "--out"],
        ["report", "one", "name=two"],
        [dice.choice(STAGES), *model, "--nonsense"],
        [dice.choice(("sing", "RUN", "--", ""))],
    ))  # fmt: skip


def _malformed(dice: random.Random, folder: Path) -> list[str]:
    return _stage(
        dice, folder,
        dice.choice((
            "rl.steps", "=1", "rl.steps=[1", "~rl.steps", "rl.steps=1,2", "rl=nonsense", "experiment=nothing",
            "model=nothing", "rl.steps={", "rl.steps=${nothing}", "rl.steps=${oc.env:NO_SUCH_VARIABLE}", "rl=5",
            "rl.steps.more=1", "hydra.run.dir=/tmp", "@x=1", "rl.steps='", "name=${name}", "+x=1", "parallel=null=1",
            "rl.steps=\x1b[2J", "\x00=1",
        )),
    )  # fmt: skip


def complaint(arguments: list[str], code: object, out: str, err: str) -> str:
    """What is wrong with an answer to a bad input; "" if nothing is."""
    lines = err.splitlines()
    if code != 2:
        return f"{arguments}: exit code {code}: {out[-300:]} {err[-600:]}"
    if not lines or len(lines) > 20 or not all(line.startswith("error: ") for line in lines):
        return f"{arguments}: {err[-1500:]!r}"
    if any(len(line) < 20 or not line.isprintable() for line in lines):
        return f"{arguments}: {lines}"
    return ""
