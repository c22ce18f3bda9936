"""EchoGen: one transformer that draws an image from a layout and finds the layout in an image.

The parts live in the top-level folders of the repository and are imported as
``echogen.kernels``, ``echogen.engine``, ``echogen.train`` and ``echogen.bench``.
"""

from __future__ import annotations

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
_FROM = {
    "Engine": "engine.engine",
    "Scheduler": "engine.serving.scheduler",
    "Sampling": "engine.decoding.sampler",
    **dict.fromkeys(("Box", "Layout", "LayoutError", "LayoutObject"), "engine.layout"),
}
__all__ = [
    "Box",
    "Engine",
    "Layout",
    "LayoutError",
    "LayoutObject",
    "Sampling",
    "Scheduler",
    "__version__",
]

# An uninstalled checkout has its packages beside this folder, not inside it. CMakeLists.txt is
# there too and is never installed, so it distinguishes a checkout from a site-packages folder.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.exists(_os.path.join(_root, "CMakeLists.txt")) and _root not in __path__:
    __path__.append(_root)

if TYPE_CHECKING:
    from echogen.engine.decoding.sampler import Sampling
    from echogen.engine.engine import Engine
    from echogen.engine.layout import Box, Layout, LayoutError, LayoutObject
    from echogen.engine.serving.scheduler import Scheduler


def __getattr__(name: str) -> object:
    """Import the public names on first use: ``import echogen`` alone does not load torch."""
    if name in _FROM:
        return getattr(_import_module(f"echogen.{_FROM[name]}"), name)
    raise AttributeError(f"module 'echogen' has no attribute {name!r}")
