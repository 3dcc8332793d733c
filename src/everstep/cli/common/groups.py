"""Settings that all groups of commands share."""

from __future__ import annotations

import typer

_WIDTH = 100


def command_group(name: str, summary: str, *, alone: bool = False) -> typer.Typer:
    """Create a group of commands.

    Args:
        name: how it is typed.
        summary: its help, an imperative sentence.
        alone: whether it does something without a command.
    """
    return typer.Typer(
        name=name,
        help=summary,
        no_args_is_help=not alone,
        invoke_without_command=alone,
        subcommand_metavar="[COMMAND] [ARGS]..." if alone else None,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH},
    )
