"""What vLLM has to know of an early-exit model before it makes an engine: its configuration, and its settings."""

from __future__ import annotations

import os
from typing import Any

import vllm
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from ...families import VLLM
from . import architecture, check_version
from .request_metadata import FIELD, rule_for

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


class EarlyExitConfig(PretrainedConfig):
    """config.json of an export with embedded gates -> its base's configuration, with the exits in it. Raises ValueError
    for one that can't be served."""

    model_type = "early_exit"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:  # type: ignore[override]
        check_version(vllm.__version__)
        base, depths = config_dict.get("base_model_type"), config_dict.get("exit_depths")
        if base not in VLLM or not depths:
            raise ValueError(
                f"config.json: base_model_type {base!r} with exit_depths {depths!r}; expected an early-exit export of "
                f"{', '.join(VLLM)}; make one with: ee-megatron convert export --gates embed"
            )
        # The modelling code that lies beside it is for transformers.
        fields = {name: value for name, value in config_dict.items() if name != "auto_map"}
        fields |= {"model_type": base, "architectures": [architecture(VLLM[base])]}
        return CONFIG_MAPPING[base].from_dict(fields, **options)


class EarlyExitSettings:
    """vLLM calls these where it makes its configuration: in the process of the HTTP server, or of whoever drives it."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing; vLLM expects it."""

    @staticmethod
    def verify_and_update_config(config: Any) -> None:
        """Raises ValueError for what exits can't be combined with."""
        check_version(vllm.__version__)
        check_settings(config)
        os.environ[RUNNER] = "0"
        config.scheduler_config.async_scheduling = False
        config.scheduler_config.scheduler_cls = f"{__package__}.scheduler.ExitScheduler"
        config.parallel_config.worker_cls = f"{__package__}.worker.ExitWorker"
        model = config.model_config
        # Only exports have a default; whoever drives rollouts says all of every request.
        default = getattr(model.hf_config, FIELD, None)
        if default is None:
            return
        # As transformers decides with the code that the export carries.
        model.hf_config.exit_policy = model.try_get_generation_config().get(FIELD) or default
        rule_for(config, None)
        from .serving import install

        install()


def check_settings(config: Any) -> None:
    parallel, scheduler = config.parallel_config, config.scheduler_config
    refused = {
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--speculative-config": config.speculative_config is not None,
        "--enable-lora": config.lora_config is not None,
        "--async-scheduling": scheduler.async_scheduling,
        "--scheduler-cls": scheduler.scheduler_cls is not None,
        "--worker-cls": parallel.worker_cls != "auto",
        "--enable-return-routed-experts": config.aux_output_config.enabled,
        f"{RUNNER}=1": os.environ.get(RUNNER) == "1",
    }
    if options := [name for name, is_set in refused.items() if is_set]:
        raise ValueError(f"an early-exit model is not served with {options[0]}; leave it out")


def register() -> None:
    AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig, exist_ok=True)
    for family in VLLM.values():
        MODELS_CONFIG_MAP[architecture(family)] = EarlyExitSettings
