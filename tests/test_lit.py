"""A run in the Language Interpretability Tool: what it predicts there is what `predict` says, row by row, model by model."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TINY_TASKS, write_tiny_competition

from comp import config_file
from comp.blend.classical import run_classical
from comp.ship.lit import ALL, FOLD, RunPredictor, held_out_rows, lit_parts, open_lit, unlabelled_rows
from comp.ship.loaded import load
from comp.training import crossval

CASES = [*TINY_TASKS, "pair", "classical"]
needs_lit = pytest.mark.skipif(find_spec("lit_nlp") is None, reason="lit-nlp, of the extra `lit`, is not installed")
# The tool's own packages warn of each other at their import.
quiet_lit = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Callable[[str], Path]:
    """Return `runs("binary")`: a folder with a trained run of that case, runs/tiny."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            kind = {"pair": "binary", "classical": "regression"}.get(case, case)
            competition = write_tiny_competition(folder / "data", kind, pair=case == "pair", train_rows=36, test_rows=6)
            settings = competition.config(tiny_model_folder("bert"))
            if case == "ordinal":
                settings["tasks"][0]["loss"] = {"name": "ordinal"}
            (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                config = config_file.load("tiny.yaml")
                quiet: dict[str, Any] = {"say": lambda line: None}
                if case == "classical":
                    run_classical(config, "tiny", features=["tfidf"], estimator="ridge", **quiet)
                else:
                    crossval.run(config, "tiny", **quiet)
            made[case] = folder
        return made[case]

    return make


def by_predict(examples: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Return (N, K) predictions of examples by `load(...).predict`, each by the models of its own field."""
    frame = pd.DataFrame(examples)
    folds = sorted(frame[FOLD].unique())
    parts = []
    for fold in folds:
        own = frame[frame[FOLD] == fold]
        run = load("runs/tiny", folds=None if fold == ALL else [int(fold)])
        parts.append(pd.DataFrame(run.predict(own)[run.output_names].to_numpy(), index=own.index))
    return pd.concat(parts).sort_index().to_numpy()


@pytest.mark.parametrize("case", CASES)
def test_rows_are_predicted_by_the_model_that_did_not_see_them(
    case: str, runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs(case))
    run = load("runs/tiny")
    dev, table = held_out_rows(run)
    assert dev.total == len(dev.examples) == 36
    predictor = RunPredictor(run)
    found = np.array([values for values, _ in predictor.predict(dev.examples)])
    assert np.allclose(found, by_predict(dev.examples), atol=1e-6)
    oof = pd.read_parquet("runs/tiny/oof.parquet").set_index("id").loc[[one["id"] for one in dev.examples]]
    columns = [name for name in oof.columns if name.startswith("pred_main_")]
    assert np.allclose(found, oof[columns].to_numpy(), atol=1e-5)
    assert [one[FOLD] for one in dev.examples] == [str(fold) for fold in oof["fold"]]
    for place, one in enumerate(dev.examples[:5]):
        row = table.frame.set_index("id").loc[one["id"]]
        for name in run.config.competition.text_columns:
            assert one[name] == row[name]
        for name in run.task.targets:
            assert one[name] == (
                float(row[name]) if case in ("regression", "ordinal", "classical") else str(row[name])
            ), place
    test = unlabelled_rows(run)
    assert test is not None and len(test.examples) == 6
    mean = np.array([values for values, _ in predictor.predict(test.examples)])
    assert np.allclose(mean, by_predict(test.examples), atol=1e-6)
    assert not set(run.task.targets) & set(test.examples[0])


def test_an_edited_text_goes_to_the_model_of_its_row(
    runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs("binary"))
    run = load("runs/tiny")
    predictor = RunPredictor(run)
    edited = [
        {"id": f"x{place}", "text": "a lovely bright ship", FOLD: fold}
        for place, fold in enumerate(("1", "0", "1", ALL))
    ]
    found = np.array([values for values, _ in predictor.predict(edited)])
    assert np.allclose(found, by_predict(edited), atol=1e-6)
    assert found[0] == found[2] != found[1]
    calls: list[Any] = []
    monkeypatch.setattr(predictor, "_by", lambda *given: calls.append(given))
    predictor.predict(edited)
    assert not calls, "what is known is not predicted again"
    with pytest.raises(ValueError, match="model_fold '7': allowed are 0, 1, all"):
        predictor.predict([{"text": "a", FOLD: "7"}])


def test_a_sample_is_said_and_the_same(runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs("binary"))
    run = load("runs/tiny")
    one, other = (held_out_rows(run, 10)[0] for _ in range(2))
    assert one == other and len(one.examples) == 10 and one.total == 36


# --- the tool itself -------------------------------------------------------------------------------------------------


@needs_lit
@quiet_lit
@pytest.mark.parametrize("case", CASES)
def test_the_tools_model_and_data_fit_each_other(
    case: str, runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs(case))
    run = load("runs/tiny")
    dev, table = held_out_rows(run)
    test = unlabelled_rows(run)
    assert test is not None
    model, datasets = lit_parts(run, {"dev": dev, "test": test}, table)
    for name, rows in datasets.items():
        assert model.is_compatible_with_dataset(rows)
        outputs = list(model.predict(rows.examples))
        wanted = by_predict(rows.examples)
        for example, output, values in zip(rows.examples, outputs, wanted, strict=True):
            assert example.keys() == rows.spec().keys() and output.keys() == model.output_spec().keys()
            for key, kind in rows.spec().items():
                kind.validate_input(example[key], rows.spec(), example)
            for key, kind in model.output_spec().items():
                if name == "dev":
                    kind.validate_output(
                        output[key], model.output_spec(), output, model.input_spec(), rows.spec(), example
                    )
            if case == "multiclass":
                assert np.allclose(output["predicted_main"], values, atol=1e-6)
                assert list(model.output_spec()["predicted_main"].vocab) == run.output_names
            else:
                told = [output[f"predicted_{target}"] for target in run.task.targets]
                told = [one if np.ndim(one) == 0 else one[1] for one in told]
                assert np.allclose(told, values, atol=1e-6)


@contextmanager
def serving(application: Any) -> Iterator[str]:
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(address: str, what: str, data: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/{what}", json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@pytest.mark.slow
@needs_lit
@quiet_lit
def test_the_page_in_a_real_browser_shows_what_predict_says(
    runs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no Chromium is installed")
    monkeypatch.chdir(runs("regression"))
    application, model = open_lit("runs/tiny", say=lambda line: None)
    dev, _ = held_out_rows(model.predictor.run)
    wanted = dict(zip([one["id"] for one in dev.examples], by_predict(dev.examples)[:, 0], strict=True))
    with serving(application) as address, playwright.sync_playwright() as play:
        rows = ask(address, "get_dataset?dataset_name=dev", {})
        told = ask(address, "get_preds?model=tiny&requested_types=RegressionScore", {"inputs": rows})
        for row, one in zip(rows, told, strict=True):
            assert one["predicted_target"] == pytest.approx(wanted[row["data"]["id"]], abs=1e-6)
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 950})
        faults: list[str] = []
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.goto(f"{address}/?models=tiny&dataset=dev", wait_until="networkidle", timeout=300_000)
        page.locator("lit-data-table").first.wait_for(timeout=300_000)
        first = next(iter(wanted))
        page.get_by_text(first, exact=True).first.click(timeout=300_000)
        page.wait_for_timeout(5000)
        shown = page.locator("body").evaluate(
            """body => { const all = []; const walk = node => {
                if (node.shadowRoot) walk(node.shadowRoot);
                for (const child of node.childNodes) {
                    if (child.nodeType === 3) all.push(child.textContent.trim());
                    else if (!['STYLE', 'SCRIPT'].includes(child.nodeName)) walk(child); } };
                walk(body); return all.filter(Boolean); }"""
        )
        page.screenshot(path=str(tmp_path / "lit.png"))
        browser.close()
    assert not faults
    numbers = [float(text) for text in shown if text.replace(".", "", 1).replace("-", "", 1).isdigit()]
    assert any(number == pytest.approx(wanted[first], abs=6e-5) for number in numbers), (wanted[first], shown)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.skipif(find_spec("lit_nlp") is not None, reason="lit-nlp is installed")
def test_its_absence_names_the_extra(refuses: Callable[..., str]) -> None:
    refuses(["lit", "runs/tiny"], ["comp lit needs", "pip install lit-nlp", "comp[lit]"])


@needs_lit
@quiet_lit
@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/none"], ["runs/none is no run folder"]),
        (["runs/tiny", "--port", "70000"], ["--port 70000", "0 (any that is free) to 65535"]),
        (["runs/tiny", "--rows", "0"], ["--rows 0", "at least 1"]),
        (["runs/tiny", "--weights", "averaged"], ["no averaged weights"]),
        (["runs/tiny", "--weights", "worst"], ["weights 'worst'"]),
    ],
)
def test_refusals(arguments: list[str], words: list[str], refuses: Callable[..., str]) -> None:
    refuses(["lit", *arguments, "--no-open"], words)
