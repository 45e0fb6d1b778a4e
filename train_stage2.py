"""Trains stage 2, generation: the branch that steers a latent diffusion model by the output of stage 1."""

import sys

from diffbir.model.training.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "configs/train/mini/stage2.yaml"))
