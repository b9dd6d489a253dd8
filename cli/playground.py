"""`assay playground`: the tools of the local-life world as a small HTTP service."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.words import ConfigDir, Overrides


def playground(
    overrides: Overrides = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is reachable from this machine only.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8731,
    rate: Annotated[float, typer.Option(help="Requests per second of one client; 0: no limit.")] = 200.0,
    body: Annotated[int, typer.Option(help="Longest body in bytes.")] = 16_384,
    config_dir: ConfigDir = None,
) -> None:
    """Serve the tools of task=local_life over HTTP, so that an agent built elsewhere can be scored against them.

    \b
    Examples:
      assay playground
      assay playground task.size=20000 --port 9000
      assay playground task.path=my_world/
      curl -s localhost:8731/health
      assay playground 'task.world_seeds={train: 1, eval: 7, test: 3}'
      curl -s localhost:8731/search -H 'content-type: application/json' -d '{"query": "hotpot", "city": "CITY"}'

    Paths: POST /search, /detail, /web_search, /distance, /hours; GET /health. The world is that of `assay eval
    task=local_life` with the same overrides, and so are the results. Needs the extra [serve]. Ctrl-C stops it.
    """
    from cli.compose import compose
    from experiments.engines.build import instantiate
    from experiments.tasks.local_life import service

    cfg = compose("eval", ["task=local_life", "task.questions=0", *(overrides or [])], config_dir or ())
    tools = instantiate(cfg.task).playground(cfg.eval.split)
    app = service.make_app(tools, rate=rate, body=body)
    tools.prepare()

    def started(url: str) -> None:
        typer.echo(f"LocalPlayground of {tools.world.source}: {url}")

    try:
        service.serve(app, host, port, started)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
