"""Changes to saved checkpoints: publication, expiry and user_metadata."""

from __future__ import annotations

from collections.abc import Sequence

from everstep.cli.common import filters, names, outcomes, output
from everstep.cli.common.target import Target
from everstep.wire.messages.inspection import TagCheckpointRequest, TagCheckpointResponse


def set_published(target: Target, paths: Sequence[str], public: bool) -> None:
    """Publish or unpublish checkpoints, and print the outcomes.

    Args:
        target: the service.
        paths: paths of the checkpoints.
        public: whether everyone may read them.
    """
    with target.service() as service:
        change = (
            service.rest.publish_checkpoint_from_tinker_path
            if public
            else service.rest.unpublish_checkpoint_from_tinker_path
        )
        done = outcomes.for_each(
            paths, lambda path: change(names.checkpoint_path(service.rest, path)).result()
        )
    outcomes.report(done, "public" if public else "private", target.as_json)


def set_expiry(target: Target, paths: Sequence[str], ttl: str | None) -> None:
    """Set or clear the expiry of checkpoints, and print the outcomes.

    Args:
        target: the service.
        paths: paths of the checkpoints.
        ttl: time span until they expire, or None for never.
    """
    seconds = None if ttl is None else filters.read_span(ttl)
    with target.service() as service:
        change = service.rest.set_checkpoint_ttl_from_tinker_path
        done = outcomes.for_each(
            paths, lambda path: change(names.checkpoint_path(service.rest, path), seconds).result()
        )
    outcomes.report(done, "never expires:" if ttl is None else f"expires in {ttl}:", target.as_json)


def change_tags(target: Target, path: str, tags: dict[str, str], remove: Sequence[str]) -> None:
    """Change the user_metadata of a checkpoint, and print it.

    Args:
        target: the service.
        path: path of the checkpoint.
        tags: entries to set.
        remove: keys of the entries to remove.

    Raises:
        NotOffered: the service is not Everstep.
    """
    with target.service() as service:
        service.require_everstep("changing user_metadata after the save")
        path = names.checkpoint_path(service.rest, path)
        request = TagCheckpointRequest(tinker_path=path, tags=tags, remove=list(remove))
        changed = service.call("/everstep/checkpoints/tag", request, TagCheckpointResponse)
    if target.as_json:
        output.print_json(changed.model_dump(mode="json"))
    else:
        output.print_facts(output.own_metadata(changed.user_metadata).items())
