"""What jobs ask sbatch for beside nodes: the job scripts' own options, and a site's instead of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

SITE = "EE_SBATCH"
"""Environment variable, set in slurm/site.env: options of every job."""
DEFAULTS = {"cpus-per-task": "8", "mem": "0"}
"""Cores of a task slot, memory of a node (0: all of it), as the #SBATCH lines of slurm/*.sh say."""
# Ways to ask for the same, of which sbatch takes one.
SAME = (
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("cpus-per-task", "cpus-per-gpu"),
    ("gpus-per-node", "gpus-per-task", "gpus", "gres"),
)
SETTINGS = ("nodes", "ntasks", "ntasks-per-node", "array")


def site_options(environment: Mapping[str, str]) -> dict[str, str]:
    """EE_SBATCH as option -> value, "" for one without. Raises ValueError for what a job script could not take: a word
    that is no --option=value, what the settings say, another way to ask for what the scripts' #SBATCH lines ask for."""
    found: dict[str, str] = {}
    text = environment.get(SITE, "")
    try:
        given = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{SITE}: {text!r}: {error}; expected options of sbatch as --option=value") from None
    for word in given:
        key, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ValueError(f"{SITE}: {word!r}: expected options of sbatch as --option=value")
        if key in SETTINGS:
            raise ValueError(f"{SITE}: --{key} follows from the settings (cluster.*); leave it out")
        for group in SAME[:2]:
            if key in group[1:]:
                raise ValueError(f"{SITE}: --{key}: the job scripts say --{group[0]}, beside which sbatch refuses it")
        found[key] = value
    return found


def merged(*given: Mapping[str, str]) -> dict[str, str]:
    """All options; of two ways to ask for the same the later one counts."""
    found: dict[str, str] = {}
    for options in given:
        for key, value in options.items():
            for group in SAME:
                if key in group:
                    found = {k: v for k, v in found.items() if k not in group}
            found[key] = value
    return found


def words(options: Mapping[str, str]) -> list[str]:
    """As on a command line."""
    return [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]
