"""Names that are exported lazily. `lazy_loader` reads them from this stub at run time."""

from .errors import OperationFailed as OperationFailed
from .errors import Rejected as Rejected
from .errors import RuntimeFault as RuntimeFault
from .errors import UnknownFuture as UnknownFuture
from .runtime import Runtime as Runtime
from .settings import Settings as Settings

__all__: list[str]
