"""Stage before stage 0: convert a Megatron checkpoint of a pretraining run to a Hugging Face directory.

The checkpoint's training figures are written beside it, so that a sweep over checkpoints has them in its table.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.derive import model_dir, read_dims
from ..config.identity import stage_dir, to_yaml
from ..config.schema import RunConfig
from ..observe.rundir import RunDirectory
from .ranks import listener

if TYPE_CHECKING:
    from ..checkpoint.megatron_read import MegatronTensors

FIGURES = "imported.json"
"""In the stage's directory: {"iteration", "tokens"}, updates and tokens that the weights were trained for; a figure
that the checkpoint lacks is left out."""


def import_model(cfg: RunConfig) -> Path:
    """Run or resume the stage: the same bytes as `convert` writes. Returns the model's directory.

    Raises what `open_source` does, and OSError: disk full.
    """
    from ..checkpoint.hf_export import export_hf
    from ..checkpoint.megatron_settings import trained_for
    from ..checkpoint.policy_files import no_policy

    source, path = open_source(cfg), stage_dir(cfg, "import-checkpoint")
    model = path / "model"
    with listener.at_once(), RunDirectory(path) as directory:
        directory.write_atomic("config.yaml", to_yaml(cfg))
        if not model.is_dir():
            origin = {"checkpoint": cfg.model.checkpoint}
            export_hf(source, no_policy(source.dims.num_layers), model, gates="drop", resume=True, origin=origin)
        directory.write_atomic(FIGURES, json.dumps(trained_for(source.reader.folder)) + "\n")
        directory.finish("import-checkpoint", f"{cfg.model.checkpoint}\n")
    return model


def open_source(cfg: RunConfig) -> MegatronTensors:
    """Open the checkpoint at model.checkpoint, tensors by their Hugging Face names; no weights are read yet.

    Raises FileNotFoundError or ValueError, one line: none named, no such checkpoint, one of another shape than
    in model.path's config.json, own gates or adapters, no tokenizer at model.path.
    """
    if not cfg.model.checkpoint:
        raise ValueError("model.checkpoint: not set; give the Megatron checkpoint that is to be imported")
    # megatron-core warns on import about missing optional parts; that would hide the errors.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    from ..checkpoint.megatron_read import ForeignMegatron, MegatronDirectory
    from ..checkpoint.policy_files import policy_beside
    from ..checkpoint.sources import is_megatron
    from ..checkpoint.store import TOKENIZER_FILES

    given, path = model_dir(cfg), Path(cfg.model.checkpoint)
    if not any((given / name).is_file() for name in TOKENIZER_FILES if name.startswith("tokenizer.")):
        raise FileNotFoundError(
            f"model.path={cfg.model.path}: no tokenizer there; model.checkpoint has weights alone, so give a directory "
            "with config.json and tokenizer"
        )
    if not is_megatron(path):
        try:
            source: MegatronTensors = ForeignMegatron(path, given)
        except ValueError as error:
            # The converter's flag is a setting here.
            raise ValueError(f"model.checkpoint={path}: {str(error).replace('--config', 'model.path')}") from None
    else:
        source = MegatronDirectory(path)
        if source.dims != read_dims(cfg):
            raise ValueError(f"model.checkpoint={path}: another shape than {given / 'config.json'} says; give its own")
        if policy_beside(source)[0].exit_depths:
            raise ValueError(
                f"model.checkpoint={path}: has its own gates; give the model that they were trained on as "
                "model.path and the policy as init_policy"
            )
    source.tokenizer = given
    return source
