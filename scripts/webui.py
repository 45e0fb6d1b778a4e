"""Opens a page for restoring photos in a browser: `diffbir web`, from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.web.command import main

if __name__ == "__main__":
    sys.exit(main())
