"""The process of one part: python -m tools.gpu_check.child PART SCRATCH DEVICE.

Exit code 0: it ran to its end, whether its checks passed or not.
"""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path

from ee_megatron.parallel.cpu_shims import lean_imports

from .findings import Findings
from .registry import PARTS


def main() -> None:
    name, scratch, device = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    part = next(part for part in PARTS if part.name == name)
    module, function = part.target.split(":")
    with lean_imports():
        from .shapes import Bench

        run = getattr(importlib.import_module(f".{module}", __package__), function)
    # What has been imported is never garbage; memory is looked at with a collection each time.
    gc.freeze()
    run(Findings(scratch / f"{name}.json", device), Bench(scratch, "cpu" if part.on_cpu else device, device == "cpu"))


if __name__ == "__main__":
    main()
