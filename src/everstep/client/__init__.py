"""The client: the official SDK's surface for any service that speaks the protocol."""

# isort: off
import everstep.client._httpx_import  # noqa: F401  before any other module imports it

# isort: on
from everstep.client._downloads.checkpoint import download_checkpoint
from everstep.client._operations.loss_handle import LossHandle, PerDatumLossFn
from everstep.client._transport.errors import DownloadError, RequestFailedError, TinkerError
from everstep.client._transport.futures import APIFuture
from everstep.client._transport.request_events import RequestEvent
from everstep.client.rest_client import AdminClient, RestClient
from everstep.client.sampling_client import SamplingClient
from everstep.client.service_client import ServiceClient
from everstep.client.training_client import TrainingClient

__all__ = [
    "APIFuture",
    "AdminClient",
    "DownloadError",
    "LossHandle",
    "PerDatumLossFn",
    "RequestEvent",
    "RequestFailedError",
    "RestClient",
    "SamplingClient",
    "ServiceClient",
    "TinkerError",
    "TrainingClient",
    "download_checkpoint",
]
