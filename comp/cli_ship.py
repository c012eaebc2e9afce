"""The subcommands that come after training: predict, ship, look. One short function each, as in cli.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["ship_app"]

ship_app = typer.Typer()
bundle_app = typer.Typer(help="Make the offline Kaggle folder of runs or a blend, or verify one.")
ship_app.add_typer(bundle_app, name="bundle")


@ship_app.command()
def infer(
    run: Annotated[list[str] | None, typer.Option(help="Run folder; repeatable; default: the newest finished.")] = None,
    blend: Annotated[str | None, typer.Option(help="Blend to apply, in place of --run: blends/<name>.")] = None,
    test: Annotated[str | None, typer.Option(help="Table to predict; default: the config's competition.test.")] = None,
    out: Annotated[str | None, typer.Option(help="CSV to write; default: submissions/<run or blend>.csv.")] = None,
    fold: Annotated[str | None, typer.Option(help="all (the default), full, all,full, or like 0,2.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="best (the default), last, or averaged; or one for each run: best,averaged.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as in training.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, one a GPU; default: every visible GPU.")] = None,
    devices: Annotated[str | None, typer.Option(help="Like cuda:0,cuda:1 or cpu,cpu: one process each.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Most padded tokens of a batch; default: 8192 on a GPU, 2048 on a CPU.")
    ] = None,
    time_budget: Annotated[str | None, typer.Option(help="Like 8h: leaves out what will not fit.")] = None,
    labels: Annotated[
        bool | None,
        typer.Option(
            "--labels/--probabilities",
            help="What binary and multilabel tasks submit; default: labels where the metric scores them, and "
            "sample_submission holds whole numbers.",
        ),
    ] = None,
    fallback: Annotated[str, typer.Option(help="For a GPU that torch has no kernels for: stop, or cpu.")] = "stop",
) -> None:
    """Predict the test table with finished runs and write a checked submission.

    Every model of a run weighs the same, a full-data one (--fold all,full) like a fold's. Of several runs each weighs
    the same, whatever its number of models; a blend has weights of its own.
    """
    from comp.runtime import choose_devices
    from comp.ship.infer import infer as write
    from comp.ship.workers import WorkerFault

    how: dict[str, Any] = {"folds": _folds(fold), "precision": precision, "batch_tokens": batch_tokens, "test": test}
    how |= {"time_budget": time_budget, "out": out, "devices": choose_devices(workers, devices), "fallback": fallback}
    how |= {"labels": labels}
    try:
        if blend is None:
            write(run or [], weights=weights or "best", **how)
            return
        if run or weights:
            raise ValueError("--blend says which runs and weights; leave out --run and --weights")
        from comp.blend.crossfit import read_blend

        write(blend=read_blend(blend), **how)
    except WorkerFault as fault:
        print(f"comp: {fault}", file=sys.stderr)
        raise typer.Exit(1) from None


def _folds(text: str | None) -> list[int | str] | None:
    """Read "all", "full", "0,2" or "all,full"."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    known = all(part in ("all", "full") or part.isdecimal() for part in parts)
    if not known or len(set(parts)) != len(parts) or ("all" in parts and any(part.isdecimal() for part in parts)):
        raise ValueError(f"--fold '{text}': allowed are all, full, numbers like 0,2, or several like all,full")
    return [int(part) if part.isdecimal() else part for part in parts]


@bundle_app.callback(invoke_without_command=True)
def bundle(
    context: typer.Context,
    run: Annotated[list[str] | None, typer.Option(help="Run folder; repeatable.")] = None,
    blend: Annotated[str | None, typer.Option(help="Blend, in place of --run: blends/<name>.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make; its name is the dataset's, 6 to 50 long.")] = None,
    owner: Annotated[str, typer.Option(help="Your Kaggle user name.")] = "",
    competition: Annotated[str, typer.Option(help="The competition's name in Kaggle's addresses.")] = "",
    fold: Annotated[str | None, typer.Option(help="all (the default), full, all,full, or like 0,2.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="best (the default), last, or averaged; or one for each run: best,averaged.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as in training.")] = None,
    half: Annotated[bool, typer.Option("--half", help="Weights as float16; the cost on OOF rows is measured.")] = False,
    time_budget: Annotated[str, typer.Option(help="Of the notebook; what will not fit is left out; or none.")] = "8h",
    labels: Annotated[
        bool | None,
        typer.Option(
            "--labels/--probabilities",
            help="What binary and multilabel tasks submit; see comp infer.",
        ),
    ] = None,
    fallback: Annotated[str, typer.Option(help="For a GPU without kernels: cpu, or stop.")] = "cpu",
    licence: Annotated[str, typer.Option("--licence", help="Of the dataset, as Kaggle names it.")] = "other",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle that is there.")] = False,
) -> None:
    """Make a folder for `kaggle datasets create` and `kaggle kernels push`: code, wheels, weights, notebook."""
    if context.invoked_subcommand is not None:
        return
    from comp.ship.bundle import Order, make_bundle

    if out is None or not owner or not competition:
        raise ValueError("comp bundle needs --run or --blend, --out, --owner and --competition; see comp bundle --help")
    if blend is not None and weights:
        raise ValueError("--blend says which weights; leave out --weights")
    make_bundle(
        Order(
            out=out,
            owner=owner,
            competition=competition,
            runs=run or [],
            blend=blend,
            folds=_folds(fold),
            weights=weights or "best",
            precision=precision,
            half=half,
            time_budget=None if time_budget == "none" else time_budget,
            labels=labels,
            fallback=fallback,
            licence=licence,
            overwrite=overwrite,
        )
    )


@bundle_app.command("verify")
def bundle_verify(
    path: Annotated[Path, typer.Argument(help="Bundle.")],
    test: Annotated[str | None, typer.Option(help="Table to predict; default: that of the runs' config.")] = None,
    sample: Annotated[str | None, typer.Option(help="Sample submission for --test.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="slug, owner, typed, model; repeatable; default: all.")
    ] = None,
    cut: Annotated[str | None, typer.Option(help="unshare or guard; default: unshare where it is permitted.")] = None,
) -> None:
    """Run the notebook as Kaggle will: fresh environment, no network, read-only inputs; compare with comp infer."""
    from comp.ship.verify import SHAPES, verify

    verify(path, test=test, sample=sample, shapes=shape or tuple(SHAPES), cut=cut)


@ship_app.command("submit")
def submit_(
    path: Annotated[Path, typer.Argument(help="Submission CSV, or bundle.")],
    competition: Annotated[str | None, typer.Option(help="Its name in Kaggle's addresses; a bundle says it.")] = None,
    sample: Annotated[str | None, typer.Option(help="Sample submission; default: that of the run.")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="For Kaggle and the log.")] = "",
    score: Annotated[float | None, typer.Option(help="Note the leaderboard's score; nothing is sent.")] = None,
) -> None:
    """Check and send a CSV, or the dataset and notebook of a bundle; note it in submissions/LOG.md."""
    from comp.ship.submit import submit

    submit(path, competition=competition, sample=sample, message=message, score=score)


@ship_app.command()
def score(
    submission: Annotated[Path, typer.Option(help="Submission CSV.")],
    truth: Annotated[Path, typer.Option(help="CSV of the true targets; a Usage column is scored apart.")],
    metric: Annotated[str, typer.Option(help="Metric, see `comp list metrics`.")],
    id_column: Annotated[str | None, typer.Option("--id", help="Id column; default: the submission's first.")] = None,
) -> None:
    """Score a submission against a file of true targets."""
    from comp.ship.scoring import score_submission

    for part, value in score_submission(submission, truth, metric, id_column).items():
        print(f"{metric} {part}: {value:.5f}")


@ship_app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or not.")],
    text: Annotated[bool, typer.Option("--text", help="Print it for a terminal or a notebook; write nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Page to write; default: report.html in the run folder.")] = None,
) -> None:
    """Write one page on a run: scores, curves, errors, worst rows, config; its pictures as PNG files, too."""
    from comp.ship.report import report_text, write_report

    if text:
        if out is not None:
            raise ValueError("--text prints the report and writes no page; leave out --out, or --text")
        print(report_text(run), end="")
        return
    path = write_report(run, out)
    print(f"wrote {path}; pictures in {path.with_suffix('')}/")


@ship_app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders; the others are compared with the first.")],
    weights: Annotated[str, typer.Option(help="best (by validation), last, or averaged.")] = "best",
    metric: Annotated[str | None, typer.Option(help="See `comp list metrics`; default: the runs' own.")] = None,
    resamples: Annotated[int, typer.Option(help="Draws of the rows that the intervals are made of.")] = 1000,
    html: Annotated[Path | None, typer.Option(help="Write it as a page, too.")] = None,
) -> None:
    """Runs side by side: scores, paired differences with intervals, and what differs in their configs."""
    from comp.ship.compare import compare as show

    print(show(runs, weights=weights, metric=metric, resamples=resamples, html=html), end="")
    if html is not None:
        print(f"wrote {html}")


@ship_app.command()
def explain(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    row: Annotated[list[str] | None, typer.Option(help="Id of a row that a fold held out; repeatable.")] = None,
    sample: Annotated[int | None, typer.Option(help="So many rows drawn instead: which words push?")] = None,
    output: Annotated[str | None, typer.Option(help="Column or class; default: the first, or predicted.")] = None,
    weights: Annotated[str, typer.Option(help="best (by validation), last, or averaged.")] = "best",
    steps: Annotated[int, typer.Option(help="Points of the integral.")] = 50,
    html: Annotated[Path | None, typer.Option(help="Write it as a page, too.")] = None,
) -> None:
    """Which words push a prediction up or down, by the fold model that did not see the row."""
    from comp.ship.explain_page import explain as show

    text = show(
        run,
        row or [],
        sample=sample,
        output=output,
        weights=weights,
        steps=steps,
        html=html,
        colour=sys.stdout.isatty(),
    )
    print(text, end="")
    if html is not None:
        print(f"wrote {html}")
