"""What pyproject.toml can't say: configs/ stands beside the package in a checkout and inside it in a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "ee_megatron", "configs")
            # Of an earlier build in the same directory nothing stays that is gone by now.
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("configs", target)


setup(cmdclass={"build_py": WithConfigs})
