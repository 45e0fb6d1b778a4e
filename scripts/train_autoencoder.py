"""Trains the autoencoder that stage 2 works in. Only needed where no published one is used."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.model.training.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "configs/train/mini/autoencoder.yaml"))
