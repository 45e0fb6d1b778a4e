"""Trains a small unconditional latent UNet: the prior of stage 2 where there is no Stable Diffusion to start from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.model.training.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "configs/train/mini/prior.yaml"))
