"""Restores degraded photos: the command `diffbir`, from a checkout."""

import sys

from diffbir.command import main

if __name__ == "__main__":
    sys.exit(main())
