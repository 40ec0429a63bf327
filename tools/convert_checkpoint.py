"""Convert checkpoints between Hugging Face and Megatron: see `python tools/convert_checkpoint.py --help`."""

import sys
from pathlib import Path

# The guard is needed: megatron-core's writer starts processes that import this file again.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from ee_megatron.checkpoint.convert import main

    sys.exit(main())
