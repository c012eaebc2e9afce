"""A bundle: what is in it, what is refused, and that it predicts what its runs predict, wherever it is mounted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bundling import ORDER, RUNS, bundle, inside, silent, train
from conftest import TinyCompetition
from safetensors.torch import load_file, save_file

from comp import load, load_bundle
from comp.blend.crossfit import read_blend
from comp.ship.bundle import make_bundle
from comp.ship.half import halve
from comp.ship.infer import infer
from comp.ship.manifest import check_files, content_of, files_of, read_manifest
from comp.ship.notebook import slug_of
from comp.ship.rerun import find_table, rerun
from comp.ship.safety import scrubbed, unsafe
from comp.ship.verify import SHAPES
from comp.ship.wheels import build_comp, closure, repack

SECRET = "0123456789abcdef-not-a-real-key"


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]
) -> tuple[Path, Any, list[str]]:
    """A folder with runs, blend and bundle, made with secrets in the environment; the competition; what was said."""
    folder, said = tmp_path_factory.mktemp("project"), []
    competition = train(folder, tiny_model_folder("bert"))
    before = dict(os.environ)
    os.environ.update({"KAGGLE_KEY": SECRET, "WANDB_API_KEY": SECRET[::-1], "HF_TOKEN": "hf_" + "x" * 34})
    try:
        with inside(folder):
            bundle(said.append)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return folder, competition, said


@pytest.fixture
def project(made: tuple[Path, Any, list[str]], monkeypatch: pytest.MonkeyPatch) -> TinyCompetition:
    monkeypatch.chdir(made[0])
    return made[1]


@pytest.fixture
def copy(project: TinyCompetition, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree("bundles/tiny-blend", tmp_path / "tiny-blend"))


def predicted(**options: Any) -> pd.DataFrame:
    """What comp infer writes with the runs themselves."""
    with inside(Path.cwd()):
        infer([], blend=read_blend("blends/all"), out="expected.csv", say=silent, **options)
    return pd.read_csv("expected.csv", dtype={"id": str})


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_what_is_in_a_bundle(made: Any, project: TinyCompetition) -> None:
    folder = Path("bundles/tiny-blend")
    manifest = read_manifest(folder)
    names = list(files_of(folder))
    assert set(names) == {*manifest["files"], "MANIFEST.json"}
    assert {"comp/__init__.py", "wheels/comp-0.1.0-py3-none-any.whl", "blend/blend.json", "tiny-blend.ipynb"} <= {
        *names
    }
    inside_runs = {name.removeprefix("runs/a/") for name in names if name.startswith("runs/a/")}
    assert {"fold0/best.safetensors", "fold1/best.safetensors", "backbone/tokenizer.json", "config.yaml"} <= inside_runs
    assert not any(name.endswith((".parquet", "last.safetensors", ".jsonl", ".pt", ".pyc")) for name in names)
    assert [run["path"] for run in manifest["runs"]] == RUNS and manifest["trust_remote_code"] is False
    scores = json.loads(Path("blends/all/blend.json").read_text())["scores"]
    assert manifest["cv"] == {"metric": "rmse", "value": scores["crossfit"], "kind": "cross-fitted"}
    said = "\n".join(made[2])
    assert f"{len(manifest['files'])} files" in said and "(cross-fitted)" in said and "--dir-mode zip" in said
    kernel = json.loads((folder / "kernel-metadata.json").read_text())
    assert kernel["enable_internet"] == "false" and kernel["enable_gpu"] == "true" and kernel["is_private"] == "true"
    assert kernel["dataset_sources"] == ["someone/tiny-blend"] and kernel["competition_sources"] == ["tiny-comp"]
    assert json.loads((folder / "runs/words/classical.json").read_text())["features"] == ["tfidf", "run:a"]


def test_no_secret_and_no_path_of_this_machine_is_in_any_file(made: Any, project: TinyCompetition) -> None:
    """Not even inside the wheels; the same search finds them where they are put."""
    marks = [SECRET, SECRET[::-1], "hf_xxx", str(made[0]), str(Path.home()) + "/", str(project.folder)]

    def found(folder: Path) -> set[str]:
        hits = set()
        for name in files_of(folder):
            pieces = [(folder / name).read_bytes()]
            if name.endswith((".whl", ".npz")):
                with zipfile.ZipFile(folder / name) as archive:
                    pieces = [archive.read(member) for member in archive.namelist()]
            hits |= {mark for mark in marks for piece in pieces if mark.encode() in piece}
        return hits

    assert found(Path("bundles/tiny-blend")) == set()
    assert found(Path("runs/a")) == {str(project.folder), str(made[0])}, "the run itself has them"


def test_a_secret_or_a_home_path_stops_the_bundle(
    project: TinyCompetition, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree("runs/a", tmp_path / "runs" / "leaky")
    tokenizer = tmp_path / "runs/leaky/backbone/added.txt"
    for text, words in (
        (SECRET, "holds the value of $MY_API_KEY"),
        ("hf_" + "q" * 34, "holds what looks like a key: hf_qqq"),
        (f"{Path.home()}/x", "holds the path of the home folder"),
    ):
        monkeypatch.setenv("MY_API_KEY", SECRET)
        tokenizer.write_text(text)
        with pytest.raises(ValueError, match="the bundle is not made: .*added.txt") as fault:
            bundle(out=tmp_path / "leaking", blend=None, runs=[str(tmp_path / "runs/leaky")])
        assert words in str(fault.value)
        assert SECRET not in str(fault.value)
        assert not (tmp_path / "leaking").exists() and not list(tmp_path.glob(".bundle-*"))


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("runs/a/extra.pkl", pickle.dumps([1]), "is a pickle"),
        ("runs/a/extra.json", pickle.dumps([1]), "is a pickle"),
        ("runs/a/model.bin", b"abc", "is a pickle, or may be one"),
        ("runs/a/state.pt", b"PK", "is a pickle, or may be one"),
        ("runs/a/modeling.py", b"import os", "is code of a checkpoint, which comp never runs"),
        ("runs/a/lib.so", b"\x7fELF", "is compiled"),
        ("runs/a/notes.xyz", b"hello", "is of a kind that a bundle does not hold (.xyz)"),
        ("runs/a/broken.json", b"{", "is no readable .json"),
        ("runs/a/noise.txt", b"\xff\xfe\x00", "is no UTF-8 text"),
        ("runs/a/w.safetensors", b"\x04\0\0\0\0\0\0\0abcd", "is no readable .safetensors"),
    ],
)
def test_unsafe_files_are_named(name: str, raw: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(raw)
    (fault,) = unsafe(tmp_path)
    assert fault.startswith(name) and words in fault


def test_arrays_of_objects_and_pickles_in_wheels_are_unsafe(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "b.npz", fine=np.zeros(3), bad=np.array([{}], dtype=object))
    with zipfile.ZipFile(tmp_path / "c.whl", "w") as wheel:
        wheel.writestr("c/model.pkl", pickle.dumps([1]))
        wheel.writestr("c/_fast.so", b"x")
        wheel.writestr("c/__init__.py", "")
    np.save(tmp_path / "d.npy", np.zeros(3))
    faults = unsafe(tmp_path)
    assert [fault.split()[0] for fault in faults] == ["a.npy", "b.npz", "c.whl", "c.whl"]
    assert "(c/model.pkl) is a pickle" in faults[2] and "(c/_fast.so) is compiled" in faults[3]


def test_what_a_published_package_holds_is_its_own_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path files are no weights, and a path in its code nobody's home; ours, and what pip noted, are searched."""
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("KAGGLE_KEY", SECRET)
    home, place = "x = '/root/x'", "other-1.0.dist-info/direct_url.json"
    for name in ("other-1.0-py3-none-any.whl", "comp-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr("paths.pth", "import os; os.environ.get('X')")
            wheel.writestr("bad.pth", pickle.dumps([1]))
            wheel.writestr("a.py", home)
            wheel.writestr("b.py", SECRET)
            wheel.writestr(place, home)
    faults = [fault.split("-", 1) for fault in unsafe(tmp_path)]
    other, ours = ([rest for name, rest in faults if name == own] for own in ("other", "comp"))
    assert len(other) == 3 and len(ours) == 4
    assert "(bad.pth) is a pickle" in other[0] and "(b.py) holds the value of $KAGGLE_KEY" in other[1]
    assert place in other[2] and "the path of the home folder" in other[2]
    assert any("(a.py) holds the path of the home folder" in rest for rest in ours)


def test_paths_are_cut_to_their_last_part() -> None:
    given = {"a": "/home/me/x/train.csv", "b": ["~/m", "../up/m/"], "c": "microsoft/deberta", "d": 1, "e": "package:x"}
    assert scrubbed(given) == {"a": "train.csv", "b": ["m", "m"], "c": "microsoft/deberta", "d": 1, "e": "package:x"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"runs": ["runs/a"]}, "--run, repeatable, or --blend, not both"),
        ({"blend": None}, "--run, repeatable, or --blend, not both"),
        ({"owner": "a/b"}, "--owner 'a/b': wanted the name in Kaggle's addresses"),
        ({"competition": "x y"}, "--competition 'x y'"),
        ({"out": Path("bundles/x")}, "Kaggle names the dataset 'x', which has 1 characters; allowed are 6 to 50"),
        ({"out": Path("bundles") / ("x" * 51)}, "allowed are 6 to 50"),
        ({"time_budget": "soon"}, "allowed are like 8h"),
        ({"fallback": "tpu"}, "--fallback 'tpu': allowed are stop and cpu"),
        ({}, "is there already; name another --out, or replace it with --overwrite"),
        ({"out": Path("data/folder")}, "is there and is no bundle"),
        ({"out": Path("bundles/new-one"), "blend": "blends/gone"}, "blends/gone is no blend"),
        ({"out": Path("bundles/new-one"), "blend": None, "runs": ["runs/gone"]}, "runs/gone is no run folder"),
    ],
)
def test_what_bundle_refuses(changes: dict[str, Any], words: str, project: TinyCompetition) -> None:
    Path("data/folder").mkdir(exist_ok=True)
    Path("data/folder/mine.txt").write_text("")
    with pytest.raises(ValueError, match=".") as fault:
        make_bundle(replace(ORDER, **changes), silent)
    assert words in str(fault.value)
    assert Path("data/folder/mine.txt").exists()


def test_names_for_kaggle() -> None:
    assert slug_of("CLEAR_best run.2") == "clear-best-run-2"


# --- changed, and refused --------------------------------------------------------------------------------------------


def test_a_changed_file_is_refused_by_name(copy: Path) -> None:
    manifest = read_manifest(copy)
    check_files(copy, manifest)
    weights = copy / "runs/b/fold1/best.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    (copy / "wheels/comp-0.1.0-py3-none-any.whl").unlink()
    with pytest.raises(ValueError, match="is not the bundle that was made") as fault:
        check_files(copy, manifest)
    assert "runs/b/fold1/best.safetensors was changed (sha256)" in str(fault.value)
    assert "wheels/comp-0.1.0-py3-none-any.whl is missing" in str(fault.value)


def test_a_changed_manifest_and_names_that_lead_out_are_refused(copy: Path) -> None:
    path, manifest = copy / "MANIFEST.json", read_manifest(copy)
    path.write_text(json.dumps({**manifest, "fallback": "stop"}))
    with pytest.raises(ValueError, match="was changed after the bundle was made"):
        read_manifest(copy)
    for name in ("../evil.json", "/etc/passwd", "runs\\..\\evil", "c:/evil", ""):
        bad = {**manifest, "files": {**manifest["files"], name: {"sha256": "0", "bytes": 0}}}
        path.write_text(json.dumps({**bad, "content": content_of(bad)}))
        with pytest.raises(ValueError, match="leads out of the bundle"):
            read_manifest(copy)
        bad = {**manifest, "runs": [{"path": name or "/"}]}
        path.write_text(json.dumps({**bad, "content": content_of(bad)}))
        with pytest.raises(ValueError, match="leads out of the bundle"):
            read_manifest(copy)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="MANIFEST.json is damaged"):
            read_manifest(copy)
    path.unlink()
    with pytest.raises(ValueError, match="is no bundle: MANIFEST.json is missing"):
        read_manifest(copy)
    (copy / "link").symlink_to(copy)
    with pytest.raises(ValueError, match="is a link"):
        files_of(copy)


def test_the_notebook_finds_its_bundle_and_refuses_a_changed_one(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first cell alone, in every shape of mount: it imports nothing of comp."""
    page = json.loads((copy / "tiny-blend.ipynb").read_text())
    check = "".join(next(cell["source"] for cell in page["cells"] if cell["id"] == "check"))
    assert "import comp" not in check and "from comp" not in check

    def run(root: Path) -> Path:
        monkeypatch.setenv("COMP_INPUTS", str(root))
        names: dict[str, Any] = {}
        exec(compile(check, "check", "exec"), names)
        return names["BUNDLE"]

    for shape, (place, _) in SHAPES.items():
        root = tmp_path / shape
        mounted = root / place.format(owner="someone", slug="tiny-blend")
        shutil.copytree(copy, mounted, ignore=shutil.ignore_patterns("*-metadata.json"))
        other = root / "another" / "MANIFEST.json"
        other.parent.mkdir()
        other.write_text("{}")
        assert run(root) == mounted
    (mounted / "comp/runs.py").write_text("import os")
    with pytest.raises(ValueError, match=r"comp/runs.py was changed \(sha256\)"):
        run(root)
    newer = read_manifest(copy) | {"created": "later"}
    (copy / "MANIFEST.json").write_text(json.dumps({**newer, "content": content_of(newer)}))
    shutil.copytree(copy, tmp_path / "newer" / "tiny-blend")
    with pytest.raises(ValueError, match="is 'tiny-blend' of later, another version"):
        run(tmp_path / "newer")
    with pytest.raises(ValueError, match="the bundle of this notebook is not under"):
        run(tmp_path / "nothing")


# --- it predicts -----------------------------------------------------------------------------------------------------


def mount(root: Path, shape: str, **tables: Any) -> tuple[Path, Path]:
    """Lay the bundle and a competition out as Kaggle does; return where the bundle and the inputs are.

    A table is a frame, written as CSV, or a path.
    """
    bundled, competition = (
        root / place.format(owner="someone", slug="tiny-blend", competition="tiny-comp") for place in SHAPES[shape]
    )
    bundled.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree("bundles/tiny-blend", bundled, dirs_exist_ok=True)
    competition.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        path = competition / f"{name}.csv"
        if isinstance(table, Path):
            shutil.copyfile(table, path)
        else:
            table.to_csv(path, index=False)
    return bundled, root


def test_labels_of_a_bundle_are_those_of_its_notebook(project: TinyCompetition, tmp_path: Path) -> None:
    """Where they do not fit the task no bundle is made; here one is altered, to see that the notebook asks for them."""
    message = "--labels and --probabilities are for tasks of kind binary and multilabel; 'main' is regression"
    with pytest.raises(ValueError, match=message):
        make_bundle(replace(ORDER, out=tmp_path / "labelled", labels=True), say=silent)
    assert list(tmp_path.iterdir()) == []
    where, inputs = mount(tmp_path, "slug", test=project.test, sample_submission=project.sample_submission)
    manifest = json.loads((where / "MANIFEST.json").read_text())
    assert manifest["labels"] is None
    altered = {**manifest, "labels": False}
    (where / "MANIFEST.json").write_text(json.dumps({**altered, "content": content_of(altered)}))
    with pytest.raises(ValueError, match=message):
        rerun(where, inputs, out=tmp_path / "submission.csv", say=silent)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rerun_is_comp_infer_and_leaves_the_submission_alone(
    shape: str, project: TinyCompetition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predicted()
    where, inputs = mount(tmp_path / "in", shape, test=project.test, sample_submission=project.sample_submission)
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    before = {path: path.stat().st_mtime_ns for path in inputs.rglob("*")}
    found = rerun(where, inputs, say=silent)
    assert list(found["id"]) == list(expected["id"])
    assert found["target"].astype(float).to_numpy() == pytest.approx(expected["target"].to_numpy(), abs=1e-6)
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["submission.csv", "submission.json"]
    assert {path: path.stat().st_mtime_ns for path in inputs.rglob("*")} == before


def test_the_scored_rerun_has_other_rows(project: TinyCompetition, tmp_path: Path) -> None:
    """More rows than the sample names, no row, texts that are missing, ids of another type: a valid CSV each time."""
    test = pd.read_csv(project.test, dtype=str)
    sample = pd.read_csv(project.sample_submission, dtype=str)
    out = tmp_path / "submission.csv"

    def again(**tables: Any) -> pd.DataFrame:
        where, inputs = mount(tmp_path / "in", "typed", **tables)
        return rerun(where, inputs, out=out, say=silent)

    normal = again(test=test, sample_submission=sample).set_index("id")["target"].astype(float)
    more = pd.concat([test, test.assign(id="x" + test["id"])])
    with pytest.warns(UserWarning, match="names 20 rows, .* has 40, and they are not the same"):
        found = again(test=more, sample_submission=sample)
    assert list(found.columns) == ["id", "target"] and list(found["id"]) == list(more["id"])
    values = found.set_index("id")["target"].astype(float)
    assert values[normal.index].to_numpy() == pytest.approx(normal.to_numpy(), abs=1e-5)

    with pytest.warns(UserWarning, match="has no rows"):
        found = again(test=test.head(0), sample_submission=sample.head(0))
    assert out.read_text() == "id,target\n" and not len(found)
    with pytest.warns(UserWarning, match="has 0, and they are not the same|has no rows"):
        again(test=test.head(0), sample_submission=sample)
    assert out.read_text() == "id,target\n"

    holes = test.assign(text=[None if row % 3 == 0 else text for row, text in enumerate(test["text"])])
    with pytest.warns(UserWarning, match="such rows are predicted from an empty text"):
        found = again(test=holes, sample_submission=sample).set_index("id")["target"].astype(float)
    assert np.isfinite(found).all()
    full = holes["id"][holes["text"].notna()]
    assert found[full].to_numpy() == pytest.approx(normal[full].to_numpy(), abs=1e-5)
    with pytest.warns(UserWarning, match="has no text .* in any row: all are predicted from an empty text"):
        assert len(again(test=test.assign(text=""), sample_submission=sample)) == 20

    numbers = [str(1000 + row) for row in range(20)]
    found = again(test=test.assign(id=numbers), sample_submission=sample.assign(id=[int(n) for n in numbers]))
    assert list(found["id"]) == numbers
    assert found["target"].astype(float).to_numpy() == pytest.approx(normal[test["id"]].to_numpy(), abs=1e-5)


def test_the_sample_decides_the_columns(project: TinyCompetition, tmp_path: Path) -> None:
    """Extra columns or another name of the target in the sample: the submission has the sample's columns."""
    test = pd.read_csv(project.test, dtype=str)
    sample = pd.DataFrame({"id": ["zz"], "score": ["0"]})
    where, inputs = mount(tmp_path / "in", "slug", test=test, sample_submission=sample)
    with pytest.warns(UserWarning, match="names 1 rows"):
        found = rerun(where, inputs, out=tmp_path / "submission.csv", say=silent)
    assert list(found.columns) == ["id", "score"] and list(found["id"]) == list(test["id"])
    (inputs / "tiny-comp/sample_submission.csv").unlink()
    with pytest.warns(UserWarning, match="no sample_submission.csv under"):
        found = rerun(where, inputs, out=tmp_path / "submission.csv", say=silent)
    assert list(found.columns) == ["id", "target"]


def test_which_table_is_meant(tmp_path: Path) -> None:
    bundled = tmp_path / "own"

    def put(place: str) -> Path:
        path = tmp_path / place / "test.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("id\n")
        return path

    def find() -> Path | None:
        return find_table(tmp_path, "comp-x", "test.csv", without=bundled)

    with pytest.raises(ValueError, match="no test.csv under .*; add the competition 'comp-x' to the notebook's inputs"):
        find()
    assert find_table(tmp_path, "comp-x", "test.csv", without=bundled, needed=False) is None
    put("own")
    other = put("other")
    with pytest.warns(UserWarning, match="no folder is called 'comp-x'"):
        assert find() == other
    deep = put("competitions/comp-x/deeper")
    assert find() == deep
    near = put("competitions/comp-x")
    assert find() == near
    put("datasets/comp-x")
    with pytest.raises(ValueError, match="2 files could be test.csv of 'comp-x'"):
        find()


def test_load_and_load_bundle_in_a_notebook(project: TinyCompetition) -> None:
    test, expected = pd.read_csv(project.test, dtype=str), predicted()
    whole = load_bundle("bundles/tiny-blend")
    found = whole.predict(test)
    assert found["target"].to_numpy() == pytest.approx(expected["target"].to_numpy(), abs=1e-5)
    renamed = test.rename(columns={"text": "full_text", "id": "essay_id"})
    columns = {"full_text": "text", "essay_id": "id"}
    pd.testing.assert_frame_equal(whole.predict(renamed, columns=columns), found)
    one = load("bundles/tiny-blend/runs/a")
    pd.testing.assert_frame_equal(one.predict(renamed.set_index("essay_id"), columns=columns), one.predict(test))
    assert list(whole.predict(test.head(0)).columns) == ["id", "target"] and not len(one.predict(test.head(0)))
    with pytest.raises(ValueError, match="use comp.load_bundle"):
        load("bundles/tiny-blend")
    for wrong, words in (
        ({"txt": "text"}, "the frame has no 'txt'"),
        ({"text": "id"}, "'id' is there already"),
        ({"id": "x", "text": "x"}, "each once"),
    ):
        with pytest.raises(ValueError, match=words):
            one.predict(test, columns=wrong)


def test_a_folder_on_the_path_is_enough_and_kaggles_image_has_all_it_needs(
    project: TinyCompetition, tmp_path: Path
) -> None:
    """Not installed, every other package blocked: the whole blend predicts."""
    expected = predicted()

    def tops(distributions: Iterable[metadata.Distribution]) -> set[str]:
        parts = {file.parts[0] for own in distributions for file in own.files or () if file.suffix in (".py", ".so")}
        return {part.split(".")[0] for part in parts if not part.startswith("_")} - {".."}

    allowed = ("torch", "transformers", "numpy", "pandas", "scikit-learn", "safetensors", "PyYAML", "pydantic")
    blocked = tops(metadata.distributions()) - tops(closure(allowed).values()) - {"comp", "pip"}
    named = {"madgrad", "torch_optimizer", "wandb", "typer", "accelerate", "pyarrow", "iterstrat", "nbclient", "kaggle"}
    folder = Path("bundles/tiny-blend").resolve()
    code = f"""
import importlib.util, sys
# an editable install of comp must not answer first
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
blocked, real = {blocked | named!r}, importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in blocked else real(name, *rest)
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
sys.path.append({str(folder)!r})
import pandas as pd
from comp import load_bundle
import comp
assert comp.__file__.startswith({str(folder)!r}), comp.__file__
found = load_bundle({str(folder)!r}).predict(pd.read_csv({str(project.test)!r}, dtype=str))
print(found["target"].tolist())
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-B", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == pytest.approx(expected["target"].tolist(), abs=1e-5)


# --- half precision --------------------------------------------------------------------------------------------------


def test_half_precision_and_what_it_costs(project: TinyCompetition, tmp_path: Path) -> None:
    said: list[str] = []
    out = bundle(said.append, out=tmp_path / "tiny-half", half=True)
    manifest = read_manifest(out)
    small, large = (Path(root) / "runs/a/fold0/best.safetensors" for root in (out, "."))
    assert small.stat().st_size < 0.6 * large.stat().st_size
    assert {t.dtype for t in load_file(small).values() if t.is_floating_point()} == {torch.float16}
    lines = {line["run"]: line for line in manifest["half"]}
    assert list(lines) == ["a", "b", "words", "blend"]
    scores = json.loads(Path("runs/a/scores.json").read_text())
    assert lines["a"]["before"] == pytest.approx(scores["best"]["pooled"], abs=1e-6)
    assert lines["blend"]["before"] == pytest.approx(
        json.loads(Path("blends/all/blend.json").read_text())["scores"]["fitted"], abs=1e-5
    )
    for line in lines.values():
        assert line["rows"] == 60 and 0 < line["largest"] < 0.01 and line["after"] != line["before"]
        assert line["after"] == pytest.approx(line["before"], abs=0.01)
    assert sum("half precision, " in line for line in said) == 4
    # what is written down is what the bundle's own weights do
    rows = pd.read_parquet("runs/a/oof.parquet").set_index("id")
    frame = pd.read_csv(project.train, dtype=str).set_index("id")
    parts = []
    for fold in (0, 1):
        ids = rows.index[rows["fold"] == fold]
        parts.append(load(out / "runs/a", folds=[fold]).predict(frame.loc[ids].reset_index()).set_index("id")["target"])
    errors = pd.concat(parts)[rows.index] - rows["target_main_target"]
    assert lines["a"]["after"] == pytest.approx(float((errors**2).mean() ** 0.5), abs=1e-6)
    Path("data/train.csv").rename("data/hidden.csv")
    try:
        with pytest.raises(ValueError, match="no such file"):
            bundle(out=tmp_path / "tiny-half", half=True, overwrite=True)
    finally:
        Path("data/hidden.csv").rename("data/train.csv")
    assert read_manifest(out) == manifest, "an old bundle stays until the new one is whole"


def test_what_float16_cannot_hold_stays(tmp_path: Path) -> None:
    state = {"a": torch.tensor([1.0, 70000.0]), "b": torch.tensor([0.1]), "n": torch.tensor([3]), "e": torch.zeros(0)}
    save_file(state, tmp_path / "in.safetensors", metadata={"step": "7"})
    assert halve(tmp_path / "in.safetensors", tmp_path / "out.safetensors") == 1
    found = load_file(tmp_path / "out.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {
        "a": torch.float32, "b": torch.float16, "n": torch.int64, "e": torch.float16
    }  # fmt: skip
    from comp.training.checkpoint import step_of

    assert step_of(tmp_path / "out.safetensors") == 7


# --- single runs, names, wheels --------------------------------------------------------------------------------------


def test_runs_without_a_blend_and_two_of_one_name(project: TinyCompetition, tmp_path: Path) -> None:
    shutil.copytree("runs/b", "others/a", dirs_exist_ok=True)
    out = bundle(out=tmp_path / "two-runs", blend=None, runs=["runs/a", "others/a"], folds=[0], weights="last,best")
    manifest = read_manifest(out)
    assert [run["path"] for run in manifest["runs"]] == ["runs/a", "runs/a-2"]
    assert not (out / "runs/a/fold1").exists() and manifest["cv"]["kind"].startswith("mean of the runs")
    test = pd.read_csv(project.test, dtype=str)
    chosen = {"runs/a": "last", "others/a": "best"}
    each = [load(path, folds=[0], weights=own).predict(test)["target"].to_numpy() for path, own in chosen.items()]
    found = load_bundle(out).predict(test)["target"].to_numpy()
    assert found == pytest.approx(np.mean(each, axis=0), abs=1e-6)
    # a classical run takes along the run whose vectors it reads
    alone = bundle(out=tmp_path / "alone-words", blend=None, runs=["runs/words"])
    assert read_manifest(alone)["vectors_of"] == ["a"] and read_manifest(alone)["cv"]["kind"] == "out of fold, pooled"
    found = load_bundle(alone).predict(test)["target"].to_numpy()
    assert found == pytest.approx(load("runs/words").predict(test)["target"].to_numpy(), abs=1e-5)


def test_wheels(tmp_path: Path) -> None:
    path = build_comp(tmp_path)
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        assert "comp/ship/rerun.py" in names and not any(name.startswith("tests/") for name in names)
    again = repack("packaging", tmp_path)
    with zipfile.ZipFile(again) as wheel:
        record = next(name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
        listed = {line.split(",")[0] for line in wheel.read(record).decode().splitlines()}
        assert listed == set(wheel.namelist()) and not any("INSTALLER" in name for name in listed)
    with pytest.raises(ValueError, match="numpy is not pure Python"):
        repack("numpy", tmp_path)
    with pytest.raises(ValueError, match="no-such-thing is not installed"):
        repack("no-such-thing", tmp_path)


# --- the machine -----------------------------------------------------------------------------------------------------


def test_a_gpu_without_kernels_stops_or_gives_way_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from comp.runtime import open_runtime

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100")
    with pytest.raises(ValueError, match="Tesla P100: this torch build has no kernels for sm_60"):
        open_runtime()
    for precision in ("auto", "fp16", "fp32"):
        with pytest.warns(UserWarning, match="Tesla P100: .* The CPU is used instead"):
            runtime = open_runtime(precision, fallback="cpu")
        assert runtime.device.type == "cpu" and runtime.precision != "fp16"
    with pytest.raises(ValueError, match="fallback 'tpu': allowed are stop and cpu"):
        open_runtime(fallback="tpu")


def test_code_of_a_checkpoint_is_never_run(
    tmp_path: Path, tiny_model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that names code of its own is read by transformers' own class; its code leaves no trace."""
    from comp.model.backbone import load_backbone, rebuild_backbone
    from comp.model.sources import load_tokenizer

    folder = Path(shutil.copytree(tiny_model_folder("bert"), tmp_path / "remote"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks whether to run it"))
    tokenizer = load_tokenizer(str(folder))
    for model in (
        load_backbone(str(folder), tokenizer, dropout=0.0, with_pooler=False),
        rebuild_backbone(folder, tokenizer, dropout=0.0, with_pooler=False),
    ):
        assert type(model.model).__module__.startswith("transformers.models.bert")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(ValueError, match="needs code that comes with the checkpoint, which comp never runs"):
        load_backbone(str(folder), tokenizer, dropout=0.0, with_pooler=False)
    assert not (tmp_path / "ran").exists()
