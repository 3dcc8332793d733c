"""HTTP server: routes that validate requests and call the runtime.

Modules are imported on first use, so that the process of `everstep.server.offload` starts without
FastAPI and the runtime.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
