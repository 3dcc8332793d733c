"""``everstep checkpoint copy`` and ``save-as``."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli import filters
from everstep.cli.completion import CheckpointPath
from everstep.cli.target import Service, Target, with_target

Ttl = Annotated[
    str | None,
    typer.Option("--ttl", metavar="SPAN", help="It expires after that, as 7d; else never."),
]


@with_target
def copy(
    target: Target,
    path: CheckpointPath,
    project: Annotated[
        str, typer.Option(metavar="ID", envvar="TINKER_PROJECT_ID", help="Where the copy goes.")
    ],
    ttl: Ttl = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Weights access token, for another account's."),
    ] = None,
) -> None:
    """Copy a checkpoint into a project, as a run of its own; no bytes are copied."""
    from everstep.cli import listing

    seconds = None if ttl is None else filters.read_span(ttl)
    with target.service() as service:
        if token is None:
            listing.one(service.rest, path)
        with service.optional("copies"):
            made = service.rest.copy_weights(
                path, project, ttl_seconds=seconds, weights_access_token=token
            ).result()
    _tell(target, path, made)


@with_target
def save_as(
    target: Target,
    path: CheckpointPath,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    ttl: Ttl = None,
) -> None:
    """Save a checkpoint once more, under another name, in a run of its own.

    Everstep copies it, bytes and all that belongs to it. At another service it is loaded and saved
    again, with the optimizer's state where it has one.
    """
    from everstep.cli import listing
    from everstep.wire.paths import validate_name

    validate_name(name)
    seconds = None if ttl is None else filters.read_span(ttl)
    with target.service() as service:
        known = listing.one(service.rest, path)
        if service.everstep is not None:
            made = _copied(service, path, name, seconds)
        else:
            made = _saved_again(service, path, name, seconds, known.user_metadata)
    _tell(target, path, made)


def _copied(service: Service, path: str, name: str, ttl: int | None) -> str:
    from everstep.client._futures import submit
    from everstep.wire.requests import CopyWeightsRequest
    from everstep.wire.responses import CopyWeightsResponse

    asked = CopyWeightsRequest(
        source_path=path,
        session_id=submit(service.client.holder.id()).result(),
        model_seq_id=service.client.holder.next_id("model"),
        ttl_seconds=ttl,
        name=name,
    )
    return service.ask("/copy_weights", asked, CopyWeightsResponse).tinker_path


def _saved_again(
    service: Service, path: str, name: str, ttl: int | None, metadata: dict[str, str] | None
) -> str:
    from everstep.wire.paths import CheckpointKind, parse_path

    if parse_path(path).kind is CheckpointKind.TRAINING:
        run = service.client.create_training_client_from_state_with_optimizer(path).result()
        return run.save_state(name, ttl_seconds=ttl, user_metadata=metadata).result().path
    run = service.client.create_training_client_from_state(path).result()
    saved = run.save_weights_for_sampler(name, ttl_seconds=ttl, user_metadata=metadata)
    return saved.result().path


def _tell(target: Target, source: str, made: str) -> None:
    from everstep.cli import output

    if target.as_json:
        output.print_json({"source_path": source, "tinker_path": made})
    else:
        print(made)
