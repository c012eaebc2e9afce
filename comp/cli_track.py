"""The subcommands for other people's tools: trackers, LIT. One short function each, as in cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["track_app"]

track_app = typer.Typer()
trackers = typer.Typer(help="Send scores to the trackers, and W&B runs written offline to W&B.", no_args_is_help=True)
track_app.add_typer(trackers, name="track")


@trackers.command("sync")
def track_sync(
    run: Annotated[list[str] | None, typer.Argument(help="Run folders; default: every one in runs/.")] = None,
) -> None:
    """Send the W&B runs that were written offline; those that were sent before are skipped."""
    from comp.ship.track_sync import sync

    if not sync(run or []):
        raise typer.Exit(1)


@trackers.command("scores")
def track_scores(
    run: Annotated[list[str], typer.Argument(help="Run folders.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="tracking.KEY=value over the run's config; repeatable.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Send them even if they were sent before.")] = False,
) -> None:
    """Send scores, out-of-fold rows and the report to the trackers; `comp train` does so when all folds are trained."""
    from comp import config_file
    from comp.runs import RunFolder
    from comp.ship.tracked import track_scores as send

    strange = [text for text in overrides or [] if not text.startswith("tracking.")]
    if strange:
        raise ValueError(f"--set {strange[0]}: only keys of tracking can be set here, like tracking.wandb=offline")
    for path in run:
        file = RunFolder(path).config
        tracking = config_file.load(file, overrides or []).tracking if overrides and file.exists() else None
        send(path, tracking, again=again)


@track_app.command()
def lit(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    port: Annotated[int, typer.Option(help="Port to serve on; 0 = any that is free.")] = 5432,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 = for other machines, too.")] = "127.0.0.1",
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open it in a browser.")] = True,
    weights: Annotated[str, typer.Option(help="best (by validation), last, or averaged.")] = "best",
    rows: Annotated[int, typer.Option(help="Most rows of a data set; of more a sample is drawn.")] = 2000,
) -> None:
    """Serve the Language Interpretability Tool: out-of-fold rows, each predicted by the model that did not see it."""
    from comp.ship.lit import serve

    serve(run, host=host, port=port, browse=browse, weights=weights, most=rows)
