"""EchoGen: one transformer that draws an image from a layout and finds the layout in an image.

The parts live in the top-level folders of the repository and are imported as
``echogen.kernels``, ``echogen.engine``, ``echogen.train`` and ``echogen.bench``.
"""

from __future__ import annotations

import os as _os
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Box", "Engine", "Layout", "LayoutError", "LayoutObject", "Sampling", "__version__"]

# An uninstalled checkout has its packages beside this folder, not inside it. CMakeLists.txt stands
# there too and is never installed, so it tells a checkout from a site-packages folder.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.exists(_os.path.join(_root, "CMakeLists.txt")) and _root not in __path__:
    __path__.append(_root)

if TYPE_CHECKING:
    from echogen.engine.engine import Engine
    from echogen.engine.layout import Box, Layout, LayoutError, LayoutObject
    from echogen.engine.sampler import Sampling


def __getattr__(name: str) -> object:
    """Import the public names on first use: ``import echogen`` alone does not load torch."""
    if name == "Engine":
        from echogen.engine.engine import Engine

        return Engine
    if name in ("Box", "Layout", "LayoutError", "LayoutObject"):
        from echogen.engine import layout

        return getattr(layout, name)
    if name == "Sampling":
        from echogen.engine.sampler import Sampling

        return Sampling
    raise AttributeError(f"module 'echogen' has no attribute {name!r}")
