"""Copies of checkpoints, within a service."""

from __future__ import annotations

from everstep.cli.common import listing, names, output
from everstep.cli.common.target import Service, Target
from everstep.client._transport.futures import submit
from everstep.wire.messages.requests import CopyWeightsRequest
from everstep.wire.messages.responses import CopyWeightsResponse
from everstep.wire.paths import CheckpointKind, parse_path, validate_name


def copy_checkpoint(
    target: Target, path: str, project: str, ttl: int | None, token: str | None
) -> None:
    """Copy a checkpoint into a project and print the copy's path.

    Args:
        target: the service.
        path: path of the checkpoint.
        project: id of the project.
        ttl: seconds until the copy expires, or None for never.
        token: weights access token, for a checkpoint of another account.

    Raises:
        NotFound: there is no such checkpoint.
        NotOffered: the service can't copy.
    """
    with target.service() as service:
        if token is None:
            path = names.checkpoint_path(service.rest, path)
            listing.checkpoint(service.rest, path)
        with service.optional("copies"):
            copied = service.rest.copy_weights(
                path, project, ttl_seconds=ttl, weights_access_token=token
            ).result()
    _print(target, path, copied)


def save_checkpoint_as(target: Target, path: str, name: str, ttl: int | None) -> None:
    """Copy a checkpoint under another name and print the copy's path.

    Args:
        target: the service.
        path: path of the checkpoint.
        name: name of the copy.
        ttl: seconds until the copy expires, or None for never.

    Raises:
        NotFound: there is no such checkpoint.
    """
    validate_name(name)
    with target.service() as service:
        path = names.checkpoint_path(service.rest, path)
        known = listing.checkpoint(service.rest, path)
        if service.everstep is not None:
            copied = _copy(service, path, name, ttl)
        else:
            copied = _load_and_save(service, path, name, ttl, known.user_metadata)
    _print(target, path, copied)


def _copy(service: Service, path: str, name: str, ttl: int | None) -> str:
    request = CopyWeightsRequest(
        source_path=path,
        session_id=submit(service.client.holder.id()).result(),
        model_seq_id=service.client.holder.next_id("model"),
        ttl_seconds=ttl,
        name=name,
    )
    return service.call("/copy_weights", request, CopyWeightsResponse).tinker_path


def _load_and_save(
    service: Service, path: str, name: str, ttl: int | None, metadata: dict[str, str] | None
) -> str:
    if parse_path(path).kind is CheckpointKind.TRAINING:
        run = service.client.create_training_client_from_state_with_optimizer(path).result()
        return run.save_state(name, ttl_seconds=ttl, user_metadata=metadata).result().path
    run = service.client.create_training_client_from_state(path).result()
    saved = run.save_weights_for_sampler(name, ttl_seconds=ttl, user_metadata=metadata)
    return saved.result().path


def _print(target: Target, source: str, copied: str) -> None:
    if target.as_json:
        output.print_json({"source_path": source, "tinker_path": copied})
    else:
        print(copied)
