"""The runtime: brings ledger, vault and engine together. Names are loaded when they are first used.

server ──▶ Runtime ──▶ admission ──▶ ledger          accepted durably, then answered
              │
              └─▶ execution ──▶ workers ═══ socket ═══▶ worker ──▶ engine, vault
                 (order, recovery) (supervision)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
