"""Command line of the training scripts."""

import argparse
import logging
import os
import warnings

from diffbir.utils.cli import entry_point

log = logging.getLogger(__name__)


@entry_point
def main(description: str, default_config: str, argv: list[str] | None = None) -> None:
    """Command line of a training script."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Overrides: any key of the YAML as key=value, e.g. data.params.batch_size=8 lr=1e-4. "
        "resume=auto goes on from the newest checkpoint of run_dir, resume=FILE from that one.",
    )
    parser.add_argument("--config", default=default_config, help="YAML of the run (default: %(default)s)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="two batches through training, validation, pictures and a checkpoint; says what the whole run will take",
    )
    parser.add_argument(
        "--allow-pipes", action="store_true", help="lets pipe: sources of the YAML run their shell commands"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML, merged last")
    args = parser.parse_args(argv)
    from pytorch_lightning.utilities import rank_zero_only  # these load torch, and help or a wrong flag needs none

    from diffbir.dataset.fetch import ALLOW_PIPES
    from diffbir.model.training.dry_run import dry_run
    from diffbir.model.training.run import train
    from diffbir.utils.config import load_config

    logging.basicConfig(level=logging.WARNING if rank_zero_only.rank else logging.INFO, format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for expected in (
        "You're resuming from a checkpoint that ended before",  # the data module goes on where the run stopped
        r"Found \d+ module\(s\) in eval mode",  # the frozen ones
        "It is recommended to use `self.log.*sync_dist",  # every rank validates the whole set
    ):
        warnings.filterwarnings("ignore", expected)
    os.environ[ALLOW_PIPES] = "1" if args.allow_pipes else "0"
    if args.dry_run:
        dry_run(args.config, args.overrides)
    else:
        config = load_config(args.config, args.overrides)
        trainer = train(config)
        log.info("done after step %d: weights for inference are in %s/weights", trainer.global_step, config.run_dir)
