"""TRL's GRPOTrainer on an export with gates: it takes the model that it trains for the one that answered."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from ee_megatron.checkpoint.hf_export import export_hf
from ee_megatron.families.hf_directory import HFDirectory
from ee_megatron.policy import PolicySpec
from tests.reference import random_policy
from tests.tiny import tiny_hf

PYTHON = Path(__file__).parents[2] / ".venv-peers" / "trl" / "bin" / "python"
SPEC = PolicySpec(6, (2, 4), rank=2, alpha=4.0)
SCRIPT = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.generation_config.exit_policy = "fixed:2"
generate, seen = model.generate, []

def watched(*args, **kwargs):
    made = generate(*args, **kwargs)
    seen.append([model.training, model.last_exit_depths[:, 1:].unique().tolist()])
    return made

model.generate = watched
rows = Dataset.from_list([{"prompt": "abc"}, {"prompt": "defgh"}])
arguments = GRPOConfig(out, max_steps=2, num_generations=2, per_device_train_batch_size=2, max_completion_length=8,
                       per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=1, use_cpu=True, bf16=False,
                       report_to=[], save_strategy="no", disable_tqdm=True)
trainer = GRPOTrainer(model, lambda completions, **_: [float(len(set(text))) for text in completions], args=arguments,
                      train_dataset=rows, eval_dataset=rows, processing_class=AutoTokenizer.from_pretrained(folder))
trainer.train()
print(json.dumps(seen))
"""


@pytest.mark.skipif(not PYTHON.is_file(), reason="no TRL here; run: make .venv-peers/trl/.made")
@pytest.mark.timeout(600)
def test_grpo_samples_as_deep_as_it_trains_and_evaluates_under_exits(tmp_path: Path) -> None:
    base = tiny_hf("llama", tmp_path / "base")
    model = export_hf(base, (SPEC, random_policy(HFDirectory(base).dims, SPEC)), tmp_path / "gated")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), "-I", "-c", SCRIPT, str(model), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert {training for training, _ in seen} == {True, False}
    assert all(depths == ([6] if training else [2]) for training, depths in seen)
