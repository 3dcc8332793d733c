"""Everstep keeps every training step.

``import everstep as tinker`` runs a script written for the official SDK. Names are loaded when they
are first used, so the import itself is quick and light. The stub beside this file lists them.
"""

import lazy_loader

from everstep._version import __version__

__title__ = "everstep"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__title__", "__version__"]
