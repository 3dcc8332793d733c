"""Options of ``everstep serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from everstep.cli.common.errors import report_errors
from everstep.cli.common.groups import command_group
from everstep.cli.common.options import DEFAULT_HOME, Home, Json, VaultUrl, Yes, seconds

app = command_group("serve", "Run the service, or manage the one that runs.", alone=True)


@app.callback()
def serve(
    ctx: typer.Context,
    home: Home = DEFAULT_HOME,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, metavar="PORT", help="Port to listen on; 0 picks a free one."
        ),
    ] = 8055,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH_OR_HUB_ID",
            help="Base model to serve; may be repeated. [default: everstep/pico]",
            show_default=False,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Setting of the service, such as replay_seconds=10; may be repeated. "
            "docs/guides/operations.md lists all.",
        ),
    ] = None,
    vault: VaultUrl = None,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", "-d", help="Run it in the background, and return when it is ready."
        ),
    ] = False,
    until_stdin_closes: Annotated[bool, typer.Option(hidden=True)] = False,
    until_unused: Annotated[bool, typer.Option("--until-unused", hidden=True)] = False,
    handed_over: Annotated[
        int | None, typer.Option("--start-lock", hidden=True, metavar="FD")
    ] = None,
) -> None:
    """Run the service, or manage the one that runs.

    Without a command it runs in the foreground until Ctrl-C or SIGTERM. Started again on the same
    home, it resumes all runs of that home.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx, ctx.invoked_subcommand)
        return
    from everstep.cli.serve.options import ServeOptions

    options = ServeOptions(home, host, port, tuple(model or ()), tuple(setting or ()), vault)
    if detach:
        with report_errors():
            from everstep.cli.serve.detach import start_detached

            start_detached(options)
        return
    from everstep.cli.serve.run import run_service

    run_service(options, until_stdin_closes, until_unused, handed_over)


def _refuse_options(ctx: typer.Context, command: str) -> None:
    """Refuse options of `serve` before a subcommand, which would have no effect there."""
    for each in ctx.command.params:
        source = ctx.get_parameter_source(str(each.name))
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"{each.opts[0]} belongs to 'serve' and has no effect before '{command}'. Options "
                f"of '{command}' come after it: 'everstep serve {command} --help'."
            )


@app.command()
def status(home: Home = DEFAULT_HOME, as_json: Json = False) -> None:
    """Show whether the service runs, and where.

    Exits with 0 if it is ready, with 4 if it runs but is not ready, and with 3 if none runs.
    """
    with report_errors():
        from everstep.cli.serve.status import print_status

        code = print_status(home, as_json)
    raise typer.Exit(code)


@app.command()
def stop(
    home: Home = DEFAULT_HOME,
    timeout: Annotated[float, seconds("How long to wait for its end.")] = 60.0,
    yes: Yes = False,
) -> None:
    """Stop the service that runs on the home.

    It finishes what it executes, and saves the state of its runs. Exits with 0 if none runs, and
    with 1 if it has not ended in time.
    """
    with report_errors():
        from everstep.cli.serve.stop import stop_service

        stop_service(home, timeout, yes)


@app.command()
def logs(
    home: Home = DEFAULT_HOME,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the service ends.")
    ] = False,
    lines: Annotated[
        int | None,
        typer.Option(
            "--lines",
            "-n",
            min=0,
            metavar="N",
            help="Number of last lines to print. [default: all]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the log of the home's service.

    If none runs, it is the log of the last one. A service in the foreground logs to its terminal
    instead.
    """
    with report_errors():
        from everstep.cli.serve.logs import print_log

        print_log(home, lines, follow)
