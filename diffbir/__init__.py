"""Everything is imported by this name: `diffbir.model`, `diffbir.dataset`, `diffbir.utils`.

Installed, those folders lie inside this one. In a checkout they lie beside it, at the top level of the tree; the
package's path then holds the checkout's root too.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
if not (Path(__file__).parent / "model").is_dir():
    __path__.append(str(_CHECKOUT))
