"""`ee-megatron STAGE -m key=a,b`: Hydra's multirun, under whatever launcher is chosen (hydra/launcher=submitit_slurm).

Hydra deals out the points and waits for them; each is the plain command in a process of its own. Shared stages, tables
and resuming are the business of `ee-megatron sweep`.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from ..config.load import find_config_dir, for_hydra, is_hydras, load
from ..config.validate import validate
from ..scaling.grid import from_settings
from .stopping import dying_with_me

DIRECTORY = "runs/multirun/${now:%Y-%m-%d_%H-%M-%S}"


def multirun(command: str, settings: list[str]) -> int:
    """Run `command` for every combination of values. Raises ValueError, before anything starts, for a point that is not
    valid, RuntimeError if a point failed."""
    own = [text for text in settings if is_hydras(text)]
    rest = [text for text in settings if not is_hydras(text)]
    grid = from_settings(rest)
    for point in grid.points():
        validate(load(grid.overrides(point)), None)
    import hydra
    from hydra.core.hydra_config import HydraConfig

    def job(_: Any) -> int:
        point = list(HydraConfig.get().overrides.task)
        started = [sys.executable, "-m", "ee_megatron.cli", command, *point]
        code = subprocess.run(started, env=dying_with_me(), check=False).returncode
        if code:
            raise RuntimeError(f"ee-megatron {command} {' '.join(point)}: exit code {code}")
        return code

    # Hydra takes its settings from the command line only.
    defaults = [f"hydra.sweep.dir={DIRECTORY}", "hydra.output_subdir=null"]
    sys.argv = ["ee-megatron", "-m", *defaults, *own, *(for_hydra(text) for text in rest)]
    hydra.main(version_base="1.3", config_path=str(find_config_dir()), config_name="config")(job)()
    return 0
