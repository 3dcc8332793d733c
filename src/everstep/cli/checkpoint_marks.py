"""``everstep checkpoint publish|unpublish|set-ttl|tag``: what is changed of saved checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli import filters
from everstep.cli.completion import CheckpointPath, CheckpointPaths
from everstep.cli.errors import WrongUsage
from everstep.cli.target import Target, with_target


@with_target
def publish(target: Target, paths: CheckpointPaths) -> None:
    """Let everyone read checkpoints."""
    from everstep.cli import outcomes

    with target.service() as service:
        change = service.rest.publish_checkpoint_from_tinker_path
        done = outcomes.each(paths, lambda path: change(path).result())
    outcomes.tell(done, "public", target.as_json)


@with_target
def unpublish(target: Target, paths: CheckpointPaths) -> None:
    """Let only their owner read checkpoints."""
    from everstep.cli import outcomes

    with target.service() as service:
        change = service.rest.unpublish_checkpoint_from_tinker_path
        done = outcomes.each(paths, lambda path: change(path).result())
    outcomes.tell(done, "private", target.as_json)


@with_target
def set_ttl(
    target: Target,
    paths: CheckpointPaths,
    ttl: Annotated[
        str | None, typer.Option(metavar="SPAN", help="From now: 7d, 12h, or seconds.")
    ] = None,
    never: Annotated[bool, typer.Option("--never", help="They don't expire any more.")] = False,
) -> None:
    """Have checkpoints expire so long from now, or never."""
    from everstep.cli import outcomes

    if (ttl is None) != never:
        raise WrongUsage("give --ttl SPAN, or --never.")
    seconds = None if ttl is None else filters.read_span(ttl)
    with target.service() as service:
        change = service.rest.set_checkpoint_ttl_from_tinker_path
        done = outcomes.each(paths, lambda path: change(path, seconds).result())
    told = "never expires:" if ttl is None else f"expires in {ttl}:"
    outcomes.tell(done, told, target.as_json)


@with_target
def tag(
    target: Target,
    path: CheckpointPath,
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="What is set.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Taken away; may be repeated.")
    ] = None,
) -> None:
    """Change a saved checkpoint's user_metadata."""
    from everstep.cli import output
    from everstep.wire.inspection import TagCheckpointRequest, TagCheckpointResponse

    pairs = dict(read_pair(each) for each in tags or [])
    if not pairs and not remove:
        raise WrongUsage("give KEY=VALUE, or --remove KEY.")
    asked = TagCheckpointRequest(tinker_path=path, tags=pairs, remove=remove or [])
    with target.service() as service:
        service.only_everstep("changing user_metadata after the save")
        now = service.ask("/everstep/checkpoints/tag", asked, TagCheckpointResponse)
    if target.as_json:
        output.print_json(now.model_dump(mode="json"))
    else:
        output.print_facts(output.own_metadata(now.user_metadata).items())


def read_pair(text: str) -> tuple[str, str]:
    """``KEY=VALUE`` in two; raises `WrongUsage` where it is something else."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise WrongUsage(f"{text!r} is not KEY=VALUE.")
    return key, value
