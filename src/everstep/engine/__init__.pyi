"""Names that are exported lazily. `lazy_loader` reads them from this stub at run time."""

from .config import AdamParams as AdamParams
from .config import AdapterConfig as AdapterConfig
from .models.info import ModelInfo as ModelInfo
from .models.load import load_model as load_model
from .models.model import Model as Model
from .optimizer import optim_step as optim_step
from .run_state import Adapter as Adapter
from .run_state import Capture as Capture
from .run_state import RunState as RunState
from .sampling.batch import SamplingBatch as SamplingBatch
from .sampling.spec import SampleSpec as SampleSpec
from .training_pass import PassResult as PassResult
from .training_pass import forward_backward as forward_backward

__all__: list[str]
