"""Convert checkpoints between Hugging Face and Megatron: see `python tools/convert_checkpoint.py --help`."""

import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    # megatron-core names at import every accelerator library that it does without.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    from ee_megatron.convert import main

    sys.exit(main())
