"""`python -m hf_flashinfer_attn` is the command line."""

import sys

from .tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
