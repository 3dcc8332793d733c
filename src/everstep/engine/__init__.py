"""Engine: base models, LoRA, losses, the optimizer and sampling. State in, state out.

The engine does not know HTTP, databases or the locations of checkpoints. Modules that need torch
are imported on first use, so that a service can use `everstep.engine.validation` without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
