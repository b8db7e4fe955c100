"""The page of `cropr view` as a hosted one (Hugging Face Spaces, or any container)."""

import os
import sys
from pathlib import Path

from cropr_command.__main__ import main

MODEL = os.environ.get("MODEL", "vit_tiny_patch16_224")
QUERIES = Path(__file__).with_name("queries.safetensors")  # of cropr calibrate; optional
PHOTOS = Path(__file__).with_name("photos")

if __name__ == "__main__":
    queries = ["--queries", str(QUERIES)] if QUERIES.exists() else []
    sys.exit(main(["view", MODEL, str(PHOTOS), *queries, "--host", "0.0.0.0", "--port", "7860"]))
