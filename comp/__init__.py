"""comp: the workbench of one text competition.

In a notebook: `from comp import load; load("runs/large").predict(frame)`, or `load_bundle(folder)` for all its runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comp.ship.infer import LoadedRun, load
    from comp.ship.rerun import LoadedBundle, load_bundle

__version__ = "0.1.0"
__all__ = ["LoadedBundle", "LoadedRun", "__version__", "load", "load_bundle"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import comp` and `comp --help` do not pay for torch.
    if name in ("load", "LoadedRun"):
        from comp.ship import infer

        return getattr(infer, name)
    if name in ("load_bundle", "LoadedBundle"):
        from comp.ship import rerun

        return getattr(rerun, name)
    raise AttributeError(f"module 'comp' has no attribute '{name}'")
