"""Everything is imported by this name: `diffbir.model`, `diffbir.dataset`, `diffbir.utils`; and `diffbir.Restorer`.

Installed, those folders lie inside this one. In a checkout they lie beside it, at the top level of the tree; the
package's path then holds the checkout's root too.
"""

from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[1]
if not (Path(__file__).parent / "model").is_dir():
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    if name == "Restorer":  # only now, because torch takes long to load
        from diffbir.model.restorer import Restorer

        return Restorer
    raise AttributeError(f"module 'diffbir' has no attribute '{name}'")
