"""Trains stage 1, degradation removal: a network that turns a degraded image into a clean, smooth one."""

import sys

from diffbir.model.training.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "configs/train/mini/stage1.yaml"))
