"""comp: the workbench of one text competition.

In a notebook: `from comp import load; load("runs/large").predict(frame)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comp.ship.infer import LoadedRun, load

__version__ = "0.1.0"
__all__ = ["LoadedRun", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import comp` and `comp --help` do not pay for torch.
    if name in ("load", "LoadedRun"):
        from comp.ship import infer

        return getattr(infer, name)
    raise AttributeError(f"module 'comp' has no attribute '{name}'")
