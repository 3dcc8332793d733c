"""Names of the official SDK for types that are no messages of their own."""

from __future__ import annotations

from everstep.wire.errors import ErrorCategory
from everstep.wire.messages.adapted_modules import CreateModelResponse
from everstep.wire.messages.outputs import ForwardBackwardOutput
from everstep.wire.messages.responses import (
    LoadWeightsResponse,
    OptimStepResponse,
    RequestFailedResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TryAgainResponse,
    UnloadModelResponse,
)
from everstep.wire.messages.tensors import TensorData

ModelID = str
RequestID = str
RequestErrorCategory = ErrorCategory
LossFnInputs = dict[str, TensorData]
LossFnOutput = dict[str, TensorData]
FutureRetrieveResponse = (
    TryAgainResponse
    | ForwardBackwardOutput
    | OptimStepResponse
    | SaveWeightsResponse
    | LoadWeightsResponse
    | SaveWeightsForSamplerResponse
    | SaveWeightsExternalResponse
    | CreateModelResponse
    | UnloadModelResponse
    | RequestFailedResponse
)
