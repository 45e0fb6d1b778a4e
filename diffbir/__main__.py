"""`python -m diffbir`"""

import sys

from diffbir.command import main

sys.exit(main(name="python -m diffbir"))
