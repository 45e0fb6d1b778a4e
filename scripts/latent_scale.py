"""Prints `val/latent_scale` of a training of the autoencoder as last measured: the `scale_factor` for what follows."""

import argparse
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.utils.cli import UserError, entry_point

TAG = "val/latent_scale"


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the training's run_dir")
    args = parser.parse_args(argv)
    events = EventAccumulator(str(args.run / "logs"))
    events.Reload()
    if TAG not in events.Tags()["scalars"]:
        raise UserError(f"{args.run}/logs holds no {TAG}; give the run_dir of an autoencoder that was validated once")
    print(f"{events.Scalars(TAG)[-1].value:.4f}")


if __name__ == "__main__":
    sys.exit(main())
