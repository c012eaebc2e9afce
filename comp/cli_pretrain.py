"""The subcommands before training: pretrain, lr-find. One short function each, as in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from comp.cli_stop import goes_on

__all__ = ["pretrain_app"]

pretrain_app = typer.Typer()


@pretrain_app.command()
def pretrain(
    config: Annotated[str, typer.Option("--config", help="Config file, with a section `pretrain`.")],
    fold: Annotated[str | None, typer.Option(help="A number: read only that fold's training rows.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value over the config; repeatable.")] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; default: <config>-pretrain[-foldK].")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Pre-train anew, what is finished too.")] = False,
    save_every: Annotated[
        str, typer.Option(help="auto (at evaluations), evaluation, never, '10 minutes', '200 steps': to go on from.")
    ] = "auto",
) -> None:
    """Train the backbone further on texts alone; the result, runs/NAME/backbone, is a model.backbone."""
    from comp import config_file
    from comp.runs import check_name
    from comp.training.pretrain import pretrain as train

    file = config_file.find(config)
    loaded = config_file.load(file, overrides or [])
    name = run or f"{file.stem}-pretrain" + ("" if fold is None else f"-fold{fold}")
    check_name(name, "--run", "runs")
    with goes_on(f"runs/{name}"):
        train(loaded, name, fold, restart=restart, save_every=save_every)


@pretrain_app.command("lr-find")
def lr_find(
    config: Annotated[str, typer.Option("--config", help="Config file.")],
    optimizer: Annotated[
        list[str] | None, typer.Option(help="Optimizer to test with its own range; repeatable; default: the config's.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a test, at most.")] = 100,
    fold: Annotated[int, typer.Option(help="Fold whose training rows are used.")] = 0,
    lowest: Annotated[float | None, typer.Option(help="First rate; default: by optimizer.")] = None,
    highest: Annotated[float | None, typer.Option(help="Last rate; default: by optimizer.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG file; default: lr-find-<config>.png.")] = None,
    text: Annotated[bool, typer.Option("--text", help="No picture.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value over the config; repeatable.")] = None,
) -> None:
    """Let the learning rate grow over a short training and read off a good one; leaves a picture, no run."""
    from comp import config_file
    from comp.training.lr_find import ADVICE, range_of
    from comp.training.lr_find import lr_find as find

    file = config_file.find(config)
    names = [[*(overrides or []), f"optimizer.name={name}"] for name in optimizer or []]
    configs = [config_file.load(file, own) for own in names or [overrides or []]]
    for loaded in configs:
        range_of(loaded, lowest, highest)
    path = out or Path(f"lr-find-{file.stem}.png")
    if not text:
        from comp.ship.report_figures import need_matplotlib

        need_matplotlib()
        if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
            raise ValueError(f"--out {path}: wanted a .png file in a folder that is there")
    curves = []
    for loaded in configs:
        curves.append(find(loaded, steps=steps, fold=fold, lowest=lowest, highest=highest))
        print(curves[-1].table())
        if loaded.optimizer.name in ADVICE:
            print(ADVICE[loaded.optimizer.name])
    drawn = [curve for curve in curves if len(curve.lrs)]
    if not text and drawn:
        from comp.runs import write_stream
        from comp.ship.report_figures import draw
        from comp.ship.report_page import Picture

        parts = ("name", "lrs", "losses", "smoothed", "suggestion")
        lines = [{part: getattr(curve, part) for part in parts} for curve in drawn]
        picture = draw(Picture("lr-find", "loss over learning rate", "range_test", {"lines": lines}))

        def write(file: BinaryIO) -> None:
            file.write(picture.png)

        write_stream(path, write)
        print(f"wrote {path}")
