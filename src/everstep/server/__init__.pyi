"""Names that are exported lazily. `lazy_loader` reads them from this stub at run time."""

from .app import create_app as create_app
from .serve import PortTaken as PortTaken
from .serve import run as run
