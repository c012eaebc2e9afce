"""`comp bundle`: what a notebook without internet needs, in one folder for `kaggle datasets` and `kaggle kernels`.

bundles/NAME/  MANIFEST.json  dataset-metadata.json  kernel-metadata.json  NAME.ipynb
               comp/ (the source: sys.path.append is enough)  wheels/  runs/*/  blend/
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comp import config_file
from comp.blend.crossfit import Blend, Recipe, examine, read_blend, write_blend_for_inference
from comp.blend.features import parse_features, run_path
from comp.blend.members import gather, weights_each
from comp.config import Config, Tracking
from comp.progress import open_progress
from comp.runs import RunFolder, commit, now, read_json, write_json, write_text
from comp.runtime import FALLBACKS
from comp.ship.half import cost_of_halves, halve, told
from comp.ship.infer import as_labels, must_fit
from comp.ship.jobs import parse_duration
from comp.ship.loaded import LoadedRun, load
from comp.ship.manifest import LOCAL, MANIFEST, content_of, files_of, sha256_of
from comp.ship.notebook import dataset_metadata, kernel_metadata, notebook, slug_of
from comp.ship.safety import scrubbed, unsafe
from comp.ship.wheels import ABSENT, KAGGLE, PACKAGE, build_comp, closure, normalised, repack
from comp.training.oof import COLUMN

__all__ = ["Order", "cv_of", "make_bundle"]

MB, GB = 10**6, 10**9
MEMORY, WORKING = 31 * GB, 20 * GB
"""What a Kaggle notebook with two T4s has, and what /kaggle/working keeps (image of August 2026)."""
NEEDS = {"statistics": ("textstat", "setuptools")}
"""Features -> packages that Kaggle's image may lack. textstat 0.7 reads pkg_resources, gone from setuptools 81."""
LOOSE = {"setuptools": "setuptools<81"}


@dataclass(frozen=True)
class Order:
    """What is to be bundled."""

    out: Path
    owner: str
    """Kaggle user or organisation."""
    competition: str
    """Its name in Kaggle's addresses."""
    runs: Sequence[str] = ()
    blend: str | None = None
    folds: list[int | str] | None = None
    """None = all finished folds, or the full-data model where there is no fold."""
    weights: str = "best"
    """best | last | averaged; a blend says its own."""
    precision: str | None = None
    """None = as in training."""
    half: bool = False
    time_budget: str | None = "8h"
    labels: bool | None = None
    """Whether binary and multilabel tasks submit 0 and 1; see `infer`."""
    fallback: str = "cpu"
    licence: str = "other"
    overwrite: bool = False


@dataclass
class _Staged:
    """A bundle while it is made."""

    order: Order
    folder: Path
    runs: list[LoadedRun]
    blend: Blend | None
    names: dict[Path, str] = field(default_factory=dict)
    """Run folder -> its name inside the bundle."""
    version: str = ""
    """Of comp."""
    kept_whole: int = 0
    """Tensors that do not fit float16."""

    def name_of(self, folder: RunFolder) -> str:
        """Return the name of a run inside the bundle; two of one name are told apart."""
        path = folder.path.resolve()
        if path not in self.names:
            taken, name, number = set(self.names.values()), path.name, 2
            while name in taken:
                name, number = f"{path.name}-{number}", number + 1
            self.names[path] = name
        return self.names[path]


def make_bundle(order: Order, say: Callable[[str], None] = print) -> Path:
    """Make the bundle folder; return its path. An old bundle stays until the new one is whole.

    Raises ValueError for whatever does not fit, and when a file holds a pickle, a key or a path of this machine.
    """
    slug = _check(order)
    blend = None if order.blend is None else read_blend(order.blend)
    weights = order.weights if blend is None else blend.weights
    paths = list(order.runs) if blend is None else blend.runs
    runs = [
        load(path, folds=order.folds, weights=own, precision="auto", fallback="cpu")
        for path, own in zip(paths, weights_each(weights, len(paths)), strict=True)
    ]
    must_fit(runs, blend)
    as_labels(order.labels, None, runs[0].of_task, blend, runs[0].config.metric)
    order.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=order.out.parent, prefix=".bundle-") as name:
        staged = _Staged(order, Path(name) / slug, runs, blend)
        models = sum(len(run.folds) for run in runs)
        progress = open_progress(2 * models + 1 + (models if order.half else 0), "bundle", "part")
        try:
            for run in runs:
                _put_run(staged, run)
                progress.advance(len(run.folds))
            if blend is not None:
                write_blend_for_inference(
                    blend, staged.folder / "blend", [f"runs/{staged.name_of(r.folder)}" for r in runs]
                )
            requirements = _put_code(staged, say)
            progress.advance()
            costs = _costs(staged) if order.half else None
            progress.advance(models if order.half else 0)
            manifest = _manifest(staged, weights, costs, say)
            _seal(staged, manifest, slug, requirements)
            progress.advance(models)
        finally:
            progress.close()
        if faults := unsafe(staged.folder):
            raise ValueError("the bundle is not made: " + "; ".join(faults))
        if order.out.exists():
            shutil.rmtree(order.out)
        staged.folder.rename(order.out)
    for cost in costs or ():
        say(f"half precision, {told(cost)}")
    for line in _report(order, manifest, slug):
        say(line)
    return order.out


def _check(order: Order) -> str:
    """Raise ValueError for what is wrong with an order before anything is done; return the dataset's name."""
    if bool(order.runs) == (order.blend is not None):
        raise ValueError("name what to bundle: --run, repeatable, or --blend, not both")
    for option, value in (("--owner", order.owner), ("--competition", order.competition)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", value):
            raise ValueError(f"{option} '{value}': wanted the name in Kaggle's addresses, letters, digits and hyphens")
    if order.time_budget is not None:
        parse_duration(order.time_budget)
    if order.fallback not in FALLBACKS:
        raise ValueError(f"--fallback '{order.fallback}': allowed are {' and '.join(FALLBACKS)}")
    slug = slug_of(order.out.name)
    if order.out.exists():
        if not (order.out / MANIFEST).exists() and any(order.out.iterdir()):
            raise ValueError(f"{order.out} is there and is no bundle; name another --out")
        if not order.overwrite:
            raise ValueError(f"{order.out} is there already; name another --out, or replace it with --overwrite")
    return slug


# --- the runs --------------------------------------------------------------------------------------------------------


def _put_run(staged: _Staged, run: LoadedRun) -> None:
    """Copy what inference with a run reads, and the runs whose vectors it reads."""
    folder, to = run.folder, RunFolder(staged.folder / "runs" / staged.name_of(run.folder))
    _put_frame(folder, to, run.config)
    if folder.classical.exists():
        about = read_json(folder.classical)
        names = []
        for feature, argument in parse_features(about["features"]):
            if feature == "run":
                other = RunFolder(run_path(folder.path.parent, argument))
                _put_vectors(staged, other, run)
                argument = staged.name_of(other)
            names.append(f"{feature}:{argument}" if argument else feature)
        write_json(to.classical, {**about, "features": names})
        for fold in run.folds:
            for name in ("seen.npz", "targets.npy", "fitted.json"):
                _copy(folder.fold(fold).path / name, to.fold(fold).path / name)
        if (folder.backbone / "model.safetensors").exists():
            _copy(folder.backbone / "model.safetensors", to.backbone / "model.safetensors")
    else:
        for fold in run.folds:
            _put_weights(staged, run.weights_of(fold), to.fold(fold).path)
    for fold in run.folds:
        _copy(folder.fold(fold).done, to.fold(fold).done)


def _put_frame(folder: RunFolder, to: RunFolder, config: Config) -> None:
    """Write config, manifest, scores, backbone config and tokenizer, without paths of this machine."""
    competition = config.competition
    tables = {name: Path(value).name for name, value in _tables(config).items() if value is not None}
    plain = config.model_copy(
        update={
            "competition": competition.model_copy(update={"train": Path(competition.train).name, **tables}),
            "tracking": Tracking(wandb="off"),
        }
    )
    data = scrubbed(plain.model_dump(mode="json"))
    write_text(to.config, config_file.dump(Config.model_validate(data)))
    write_json(to.manifest, scrubbed(read_json(folder.manifest)))
    if folder.scores.exists():
        _copy(folder.scores, to.scores)
    for name in files_of(folder.backbone) if folder.backbone.exists() else ():
        if name in ("config.json", "tokenizer_config.json"):
            write_json(to.backbone / name, scrubbed(read_json(folder.backbone / name)))
        elif name != "model.safetensors":
            _copy(folder.backbone / name, to.backbone / name)


def _tables(config: Config) -> dict[str, str | None]:
    return {"test": config.competition.test, "sample_submission": config.competition.sample_submission}


def _put_vectors(staged: _Staged, folder: RunFolder, reader: LoadedRun) -> None:
    """Copy what the features run:NAME of another run read: its backbone, and its weights of the same folds."""
    needed = load(folder.path, folds=reader.folds, precision="auto", fallback="cpu")
    to = RunFolder(staged.folder / "runs" / staged.name_of(folder))
    if not to.config.exists():
        _put_frame(folder, to, needed.config)
    for fold in needed.folds:
        _put_weights(staged, needed.weights_of(fold), to.fold(fold).path)
        _copy(folder.fold(fold).done, to.fold(fold).done)


def _put_weights(staged: _Staged, source: Path, folder: Path) -> None:
    to = folder / source.name
    if staged.order.half and not to.exists():
        staged.kept_whole += halve(source, to)
    else:
        _copy(source, to)


def _copy(source: Path, to: Path) -> None:
    if to.exists():
        return  # a run that another one reads may be bundled itself
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)


# --- the code --------------------------------------------------------------------------------------------------------


def _put_code(staged: _Staged, say: Callable[[str], None]) -> list[str]:
    """Write the source and the wheels; return what the notebook installs."""
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PACKAGE, staged.folder / "comp", ignore=skipped)
    wheels = staged.folder / "wheels"
    staged.version = build_comp(wheels).name.split("-")[1]
    features = {
        name
        for run in staged.runs
        if run.folder.classical.exists()
        for name, _ in parse_features(read_json(run.folder.classical)["features"])
    }
    wanted = [name for feature, names in NEEDS.items() if feature in features for name in names]
    there = closure(ABSENT)
    extra = [name for name in ABSENT if normalised(name) in there]
    extra += sorted((set(closure(wanted)) - set(closure(KAGGLE))) | set(wanted))
    for name in extra:
        repack(name, wheels)
    if _estimators(staged.runs) & {"lightgbm"}:
        say("note: a run needs lightgbm, which is compiled and not in the bundle; Kaggle's image must have it")
    return [f"comp=={staged.version}", *(LOOSE.get(name, name) for name in extra)]


def _estimators(runs: Sequence[LoadedRun]) -> set[str]:
    return {read_json(run.folder.classical)["estimator"] for run in runs if run.folder.classical.exists()}


# --- the manifest ----------------------------------------------------------------------------------------------------


def _costs(staged: _Staged) -> list[dict[str, Any]]:
    halved = [
        load(
            staged.folder / "runs" / staged.name_of(run.folder),
            folds=run.folds,
            weights=run.weights,
            precision="auto",
            fallback="cpu",
        )
        for run in staged.runs
    ]
    return cost_of_halves(staged.runs, halved, staged.blend)


def cv_of(paths: Sequence[str | Path], weights: str, blend: Blend | None) -> dict[str, Any] | None:
    """Return {metric, value, kind} of what is to be expected, out of fold; None where nothing tells.

    A blend: cross-fitted. One run: pooled over its folds. Several: their mean, pooled.
    """
    if blend is not None:
        about = read_json(blend.path)
        cross = about["scores"]["crossfit"]
        kind = "fitted on the same rows" if cross is None else "cross-fitted"
        return {"metric": about["metric"], "value": about["scores"]["fitted"] if cross is None else cross, "kind": kind}
    if len(paths) == 1:
        scores = RunFolder(paths[0]).scores
        found = read_json(scores) if scores.exists() else {}
        value = found.get(weights, {}).get("pooled")
        return None if value is None else {"metric": found["metric"], "value": value, "kind": "out of fold, pooled"}
    known = set(weights_each(weights, len(paths))) <= set(COLUMN)
    if not known or not all(RunFolder(path).oof.exists() for path in paths):
        return None
    members = gather(paths, weights=weights, any_folds=True)
    report = examine(members, Recipe("mean"))[1]
    return {"metric": report.metric, "value": report.honest, "kind": "mean of the runs, out of fold, pooled"}


def _manifest(
    staged: _Staged, weights: str, costs: Sequence[Mapping[str, Any]] | None, say: Callable[[str], None]
) -> dict[str, Any]:
    order, first = staged.order, staged.runs[0]
    paths = [run.folder.path for run in staged.runs]
    cv = cv_of(paths, weights, staged.blend)
    if cv is None:
        say("note: the bundle has no score: its runs have no out-of-fold rows")
    if staged.kept_whole:
        say(f"note: {staged.kept_whole} tensors have values beyond float16 and stay in float32")
    tables = {name: None if value is None else Path(value).name for name, value in _tables(first.config).items()}
    if tables["test"] is None:
        tables["test"] = "test.csv"
        say("note: the config names no test table; the notebook looks for test.csv")
    return {
        "bundle": order.out.name,
        "comp": staged.version,
        "commit": commit(PACKAGE),
        "created": now(),
        "owner": order.owner,
        "competition": order.competition,
        "tables": tables,
        "runs": [_about(staged, run) for run in staged.runs],
        "vectors_of": sorted(set(staged.names.values()) - {staged.name_of(run.folder) for run in staged.runs}),
        "blend": None if staged.blend is None else "blend/blend.json",
        "cv": cv,
        "folds": order.folds,
        "weights": weights,
        "precision": order.precision,
        "labels": order.labels,
        "fallback": order.fallback,
        "time_budget": order.time_budget,
        "half": None if costs is None else list(costs),
        "trust_remote_code": False,
        "made_from": {
            "runs": [_here(path) for path in paths],
            "blend": None if staged.blend is None else _here(staged.blend.path),
            **{name: None if value is None else _here(Path(value)) for name, value in _tables(first.config).items()},
        },
    }


def _here(path: Path) -> str | None:
    """Return a path as seen from the current directory, or None where that would tell about this machine."""
    if not path.is_absolute():
        return str(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else None


def _about(staged: _Staged, run: LoadedRun) -> dict[str, Any]:
    folder, model = run.folder, run.config.model
    classical = read_json(folder.classical) if folder.classical.exists() else None
    if classical is not None:
        what = f"{classical['estimator']} on {', '.join(name.split(':')[0] for name in classical['features'])}"
    else:
        what = f"{scrubbed(model.backbone)}, {model.pooler.name} pooler, {model.max_length} tokens"
    folds = ", ".join(map(str, run.folds))
    return {
        "path": f"runs/{staged.name_of(folder)}",
        "told": f"{what}; folds {folds}",
        "folds": run.folds,
        "fingerprints": read_json(folder.manifest)["fingerprints"],
    }


def _seal(staged: _Staged, manifest: dict[str, Any], slug: str, requirements: Sequence[str]) -> None:
    """Add the sha256 of every file to the manifest; write it, the notebook and kaggle's metadata."""
    folder, order = staged.folder, staged.order
    code_file = f"{slug}.ipynb"

    def told(name: str) -> dict[str, Any]:
        return {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}

    manifest["files"] = {name: told(name) for name in files_of(folder)}
    manifest["content"] = content_of(manifest)
    write_json(folder / "dataset-metadata.json", dataset_metadata(order.owner, slug, order.licence))
    metadata = kernel_metadata(order.owner, slug, order.competition, code_file)
    write_json(folder / "kernel-metadata.json", metadata)
    write_json(folder / code_file, notebook(manifest, requirements))
    for name in (code_file, *LOCAL):
        manifest["files"][name] = {**told(name), "outside": True}
    write_json(folder / MANIFEST, manifest)


# --- the report ------------------------------------------------------------------------------------------------------


def _report(order: Order, manifest: Mapping[str, Any], slug: str) -> list[str]:
    """Return the sizes, what they mean on Kaggle, and the next steps."""
    sizes = {"weights": 0, "wheels and code": 0, "all else": 0}
    largest = 0
    for name, file in manifest["files"].items():
        weights = name.endswith(".safetensors")
        kind = "weights" if weights else "wheels and code" if name.startswith(("wheels/", "comp/")) else "all else"
        sizes[kind] += file["bytes"]
        if weights:
            largest = max(largest, file["bytes"] * (2 if order.half else 1))
    total = sum(sizes.values())
    packed = total - sum(file["bytes"] for name, file in manifest["files"].items() if "/" not in name)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    cv, out = manifest["cv"], order.out
    score = "unknown" if cv is None else f"{cv['metric']} {cv['value']:.5f} ({cv['kind']})"
    lines = [
        f"{out}: {len(manifest['files'])} files, {_size(total)}; expected score: {score}",
        *(f"  {kind:<16}{_size(size):>10}" for kind, size in sizes.items()),
        f"  the largest model takes {_size(largest)} in memory (a notebook has {_size(MEMORY)}); one is held at a time",
        f"  /kaggle/working keeps {_size(WORKING)}: the notebook leaves submission.csv and its sidecar there",
        f"  uploading needs room for {_size(packed)} of zip files in {tempfile.gettempdir()}, where {_size(free)} are "
        "free; the size also counts against the private quota of your Kaggle account",
    ]
    if largest > MEMORY / 2 or packed > free:
        lines.append("warning: that is more than fits comfortably; see above")
    return [
        *lines,
        f"next: comp bundle verify {out}",
        f"then: comp submit {out}; or kaggle datasets create -p {out} --dir-mode zip, and when it is ready,",
        f"      kaggle kernels push -p {out}, and submit its output from kaggle.com/code/{order.owner}/{slug}",
    ]


def _size(number: float) -> str:
    for size, unit in ((GB, "GB"), (MB, "MB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1000:.1f} kB"
