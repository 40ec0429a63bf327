"""Run by vLLM's own interpreter: exit policy and model that each export is served with, or what vLLM says against it.

settings.py '[[PATH, {argument: value}, {environment: value}], ...]'
"""

from __future__ import annotations

import json
import os
import sys


def main(cases: str) -> None:
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    version = vllm.__version__
    found: list = []
    for path, arguments, environment in json.loads(cases):
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
        os.environ.update(environment)
        vllm.__version__ = environment.get("VERSION", version)
        try:
            config = EngineArgs(model=path, **arguments).create_engine_config()
            found.append([config.model_config.hf_config.exit_policy, config.model_config.architecture])
        except Exception as error:
            found.append(str(error))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
