"""The plan of the house, held by reading the imports of every file in comp/ (those inside functions too).

A new file is entered in LAYERS; a file that goes is taken out.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "comp"
HARD_CAP = 500
"""Lines of a file."""

LAYERS = {
    "catalog.py": 0,
    "config.py": 0,
    "config_section.py": 0,
    "config_poolers.py": 0,
    "config_optimizers.py": 0,
    "config_stability.py": 0,
    "config_variants.py": 0,
    "config_pseudo.py": 0,
    "config_training.py": 0,
    "config_pretrain.py": 0,
    "config_file.py": 0,
    "search_space.py": 0,
    "pipeline_file.py": 0,
    "pipeline.py": 7,
    "runs.py": 0,
    "lock.py": 0,
    "runtime.py": 0,
    "worker.py": 0,
    "tracker.py": 0,
    "tracking_wandb.py": 0,
    "tracking_others.py": 0,
    "tracking.py": 0,
    "metrics.py": 0,
    "doctor.py": 0,
    "kernels.py": 0,
    "progress.py": 0,
    "data/__init__.py": 1,
    "data/frames.py": 1,
    "data/tables.py": 1,
    "data/splitters.py": 1,
    "data/folds.py": 1,
    "data/lineage.py": 1,
    "data/leaks.py": 1,
    "data/tokens.py": 1,
    "data/batches.py": 1,
    "data/masking.py": 1,
    "data/corpora.py": 1,
    "data/pseudo.py": 1,
    "data/first_config.py": 1,
    "model/__init__.py": 1,
    "model/sources.py": 1,
    "model/attention.py": 1,
    "model/packing.py": 1,
    "model/backbone.py": 1,
    "model/lowest.py": 1,
    "model/token_pooling.py": 1,
    "model/layer_pooling.py": 1,
    "model/sbert_wk.py": 1,
    "model/pooling.py": 1,
    "model/losses.py": 1,
    "model/heads.py": 1,
    "model/text_model.py": 2,
    "model/pretraining.py": 2,
    "model/frozen.py": 2,
    "optim/schedules.py": 1,
    "optim/bertadam.py": 1,
    "optim/radam.py": 1,
    "optim/madgrad.py": 1,
    "optim/lookahead.py": 1,
    "optim/groups.py": 2,
    "optim/__init__.py": 2,
    "stability/__init__.py": 2,
    "stability/reinit.py": 2,
    "stability/mixout.py": 2,
    "stability/prior_decay.py": 2,
    "stability/averaging.py": 2,
    "stability/techniques.py": 3,
    "stability/adversarial.py": 2,
    "stability/consistency.py": 2,
    "stability/contrast.py": 2,
    "training/__init__.py": 3,
    "training/predict.py": 3,
    "training/checkpoint.py": 3,
    "training/cadence.py": 3,
    "training/trainer.py": 3,
    "training/ranks.py": 3,
    "training/shards.py": 3,
    "training/job.py": 3,
    "training/processes.py": 3,
    "training/cluster.py": 3,
    "training/dispatch.py": 3,
    "training/lessons.py": 3,
    "training/resume.py": 3,
    "training/held_out.py": 3,
    "training/objective.py": 3,
    "training/preflight.py": 3,
    "training/memory.py": 3,
    "training/covariates.py": 3,
    "training/early.py": 3,
    "training/decision.py": 3,
    "training/compiling.py": 3,
    "training/optimism.py": 3,
    "training/mlm.py": 3,
    "training/simcse.py": 3,
    "training/oof.py": 3,
    "training/assembly.py": 3,
    "training/plan.py": 3,
    "training/one_fold.py": 4,
    "training/crossval.py": 4,
    "training/determinism.py": 4,
    "training/seeds.py": 4,
    "training/pretrain_stages.py": 4,
    "training/pretrain.py": 4,
    "training/lr_find.py": 4,
    "training/study.py": 4,
    "training/search.py": 4,
    "training/search_workers.py": 4,
    "training/search_result.py": 4,
    "blend/__init__.py": 5,
    "blend/ensemble.py": 5,
    "blend/calibration.py": 5,
    "blend/members.py": 5,
    "blend/crossfit.py": 5,
    "blend/features.py": 5,
    "blend/classical.py": 5,
    "ship/__init__.py": 6,
    "ship/jobs.py": 6,
    "ship/workers.py": 6,
    "ship/loaded.py": 6,
    "ship/infer.py": 6,
    "ship/teachers.py": 6,
    "ship/submission.py": 6,
    "ship/scoring.py": 6,
    "ship/manifest.py": 6,
    "ship/safety.py": 6,
    "ship/wheels.py": 6,
    "ship/half.py": 6,
    "ship/rerun.py": 6,
    "ship/notebook.py": 6,
    "ship/bundle.py": 6,
    "ship/execute.py": 6,
    "ship/kaggle_client.py": 6,
    "ship/verify.py": 6,
    "ship/leaderboard.py": 6,
    "ship/submit.py": 6,
    "ship/demo.py": 6,
    "ship/row_errors.py": 6,
    "ship/report_page.py": 6,
    "ship/report_style.py": 6,
    "ship/report_parts.py": 6,
    "ship/report_figures.py": 6,
    "ship/report_run.py": 6,
    "ship/report_tasks.py": 6,
    "ship/report_errors.py": 6,
    "ship/report_panels.py": 6,
    "ship/report.py": 6,
    "ship/report_search.py": 6,
    "ship/compare.py": 6,
    "ship/explain.py": 6,
    "ship/explain_page.py": 6,
    "ship/tracked.py": 6,
    "ship/track_sync.py": 6,
    "ship/lit.py": 6,
    "__init__.py": 7,
    "__main__.py": 7,
    "cli_stop.py": 7,
    "cli_pretrain.py": 7,
    "cli_ship.py": 7,
    "cli_search.py": 7,
    "cli_track.py": 7,
    "cli.py": 7,
}
EMPTY = (
    "data/__init__.py",
    "model/__init__.py",
    "stability/__init__.py",
    "training/__init__.py",
    "blend/__init__.py",
    "ship/__init__.py",
)
"""Package files that import nothing, so that `import comp.data.tables` costs what tables.py costs."""

FORBIDDEN = {
    "training/trainer.py": (
        "comp.stability",
        "comp.optim",
        "comp.model.pooling",
        "comp.model.losses",
        "comp.metrics",
        "comp.catalog",
        "comp.config",
        "comp.config_file",
        "comp.config_variants",
    )
}
"""The loop receives finished parts: no catalogue, no technique, no config."""

ONE_FILE_ONLY = (
    "wandb",
    "ray",
    "optuna",
    "matplotlib",
    "captum",
    "lit_nlp",
    "kaggle",
    "nbclient",
    "tensorboard",
    "trackio",
)
"""Optional packages: each is imported in one file, inside the function that needs it."""

KAGGLE_HAS = {"torch", "transformers", "numpy", "pandas", "sklearn", "scipy", "safetensors", "yaml", "pydantic"}
"""All that inference on Kaggle may need (scikit-learn brings SciPy). Anything else is imported where it is used, inside a function."""
AT_THE_TOP = {f"cli{of}.py": {"typer"} for of in ("", "_stop", "_ship", "_pretrain", "_search", "_track")}

HEAVY = ("torch", "transformers", "tokenizers", "pandas", "sklearn", "scipy", "pyarrow", "wandb", "tqdm")


@dataclass(frozen=True)
class Import:
    """One imported name, written out: `from comp.data import folds` is "comp.data.folds"."""

    module: str
    line: int
    inside_function: bool
    for_types_only: bool


@cache
def imports(name: str) -> tuple[Import, ...]:
    """Return what the file comp/`name` imports, relative imports resolved."""
    return tuple(read_imports((PACKAGE / name).read_text(encoding="utf-8"), name))


def read_imports(source: str, name: str) -> Iterator[Import]:
    def visit(node: ast.AST, inside: bool, types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, inside, types)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ["comp", *Path(name).parts[:-1]]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, inside, types)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            named = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from (Import(module, node.lineno, inside, types) for module in named)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, inside, True)
            for child in node.orelse:
                yield from visit(child, inside, types)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, types)

    yield from visit(ast.parse(source), False, False)


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def file_of(module: str, known: dict[str, int]) -> str | None:
    """Return the file that `module` (or a module and one of its names) stands in; None = not ours."""
    parts = module.split(".")
    if parts[0] != "comp":
        return None
    for end in range(len(parts), 0, -1):
        stem = "/".join(parts[1:end])
        for candidate in (f"{stem}.py", f"{stem}/__init__.py" if stem else "__init__.py"):
            if candidate in known:
                return candidate
    raise AssertionError(f"{module} is in no file of the table")


def folder_of(name: str) -> str:
    return str(Path(name).parent)


def files() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py"))


FILES = files()


def test_table_and_folder_agree():
    missing, unknown = sorted(set(LAYERS) - set(FILES)), sorted(set(FILES) - set(LAYERS))
    assert not unknown, f"enter these files in LAYERS: {unknown}"
    assert not missing, f"in LAYERS but not in comp/: {missing}"


def test_contributing_shows_the_same_house():
    """The tree in CONTRIBUTING.md names every file of the table with its layer (empty package files left out)."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.split("```\ncomp/\n")[1].split("```")[0]
    shown, folder = {}, ""
    for line in tree.splitlines():
        if match := re.fullmatch(r"  (\w+/)", line):
            folder = match[1]
        elif match := re.match(r"(  |    )(\w+\.py) +(\d)  \S", line):
            shown[(folder if len(match[1]) == 4 else "") + match[2]] = int(match[3])
    assert shown == {name: layer for name, layer in LAYERS.items() if name not in EMPTY}


def faults_of(name: str, found: tuple[Import, ...], layers: dict[str, int]) -> list[str]:
    """Return what breaks the layering in file `name`."""
    faults = []
    for item in found:
        target = file_of(item.module, layers)
        if target is None or target == name:
            continue
        lower = layers[target] < layers[name]
        neighbour = layers[target] == layers[name] and folder_of(target) == folder_of(name)
        if not (lower or neighbour):
            faults.append(
                f"comp/{name}:{item.line} (layer {layers[name]}) imports {item.module} "
                f"(comp/{target}, layer {layers[target]})"
            )
    return faults


@pytest.mark.parametrize("name", [name for name in FILES if name in LAYERS])
def test_imports_go_down(name):
    assert faults_of(name, imports(name), LAYERS) == []


def test_no_cycles():
    graph = {
        name: {file_of(item.module, LAYERS) for item in imports(name)} - {None, name}
        for name in FILES
        if name in LAYERS
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as cycle:
        pytest.fail(f"files import each other in a circle: {' -> '.join(cycle.args[1])}")
    assert set(order) >= set(graph)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("data/")])
def test_data_never_imports_model(name):
    assert [item for item in imports(name) if f"{item.module}.".startswith("comp.model.")] == []


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_imports(name):
    assert (PACKAGE / name).exists(), f"comp/{name} is named in FORBIDDEN and does not exist"
    bad = [
        f"comp/{name}:{item.line} imports {item.module}"
        for item in imports(name)
        if any(f"{item.module}.".startswith(f"{banned}.") for banned in FORBIDDEN[name])
    ]
    assert bad == []


@pytest.mark.parametrize("package", ONE_FILE_ONLY)
def test_optional_package_in_one_file(package):
    places = [(name, item) for name in FILES for item in imports(name) if item.module.split(".")[0] == package]
    assert len({name for name, _ in places}) <= 1, f"{package} is imported in {sorted({n for n, _ in places})}"
    top = [f"comp/{name}:{item.line}" for name, item in places if not item.inside_function]
    assert top == [], f"{package} is optional: import it inside the function, not at the top: {top}"


@pytest.mark.parametrize("name", FILES)
def test_imports_at_the_top_are_on_kaggle(name):
    allowed = KAGGLE_HAS | AT_THE_TOP.get(name, set()) | sys.stdlib_module_names | {"comp"}
    bad = [
        f"comp/{name}:{item.line} imports {item.module}"
        for item in imports(name)
        if not (item.inside_function or item.for_types_only) and item.module.split(".")[0] not in allowed
    ]
    assert bad == []


@pytest.mark.parametrize("name", EMPTY)
def test_package_files_import_nothing(name):
    assert imports(name) == ()


@pytest.mark.parametrize("name", FILES)
def test_hard_cap(name):
    lines = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
    assert lines <= HARD_CAP, f"comp/{name} has {lines} lines; split it ({HARD_CAP} is the hard cap)"


def test_light_modules_stay_light():
    """`import comp`, layer 0 and the command line load no tensor, table or tracking library."""
    light = ["comp", "comp.cli", *(f"comp.{name[:-3]}" for name, layer in LAYERS.items() if layer == 0)]
    script = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        f"for module in {light!r}:\n"
        "    before = set(sys.modules)\n"
        "    importlib.import_module(module)\n"
        f"    found = [name for name in {HEAVY!r} if name in sys.modules and name not in before]\n"
        "    if found: loaded[module] = found\n"
        "print(json.dumps(loaded))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}, "these imports load heavy libraries; import them inside functions"


# --- the reader itself --------------------------------------------------------------------------------------

SAMPLE = """
import os, comp.runs
from comp.data import folds, tables as t
from . import pooling
from .losses import LOSSES
from ..optim.groups import x
if TYPE_CHECKING:
    import torch
else:
    import numpy
def f():
    import wandb
    return lambda: import_module("comp.ship.infer")
class C:
    from comp.catalog import pick
"""


def test_reader_finds_every_form_of_import():
    found = {item.module: item for item in read_imports(SAMPLE, "model/text_model.py")}
    assert list(found) == [
        "os",
        "comp.runs",
        "comp.data.folds",
        "comp.data.tables",
        "comp.model.pooling",
        "comp.model.losses.LOSSES",
        "comp.optim.groups.x",
        "torch",
        "numpy",
        "wandb",
        "comp.ship.infer",
        "comp.catalog.pick",
    ]
    assert {name for name, item in found.items() if item.inside_function} == {"wandb", "comp.ship.infer"}
    assert {name for name, item in found.items() if item.for_types_only} == {"torch"}


def test_reader_finds_the_files_and_the_faults():
    assert file_of("comp.catalog.pick", LAYERS) == "catalog.py"
    assert file_of("comp.optim.build_optimizer", LAYERS) == "optim/__init__.py"
    assert file_of("comp.optim.groups.LAYOUTS", LAYERS) == "optim/groups.py"
    assert file_of("comp.__version__", LAYERS) == "__init__.py"
    assert file_of("numpy.random", LAYERS) is None
    found = tuple(read_imports(SAMPLE, "model/text_model.py"))
    assert faults_of("model/text_model.py", found, LAYERS) == [
        "comp/model/text_model.py:6 (layer 2) imports comp.optim.groups.x (comp/optim/groups.py, layer 2)",
        "comp/model/text_model.py:13 (layer 2) imports comp.ship.infer (comp/ship/infer.py, layer 6)",
    ]
