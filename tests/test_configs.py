"""Every YAML in configs/ loads, and opens with its command, cost and result."""

from __future__ import annotations

from pathlib import Path

import pytest

from comp import config_file

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_opens_with_command_cost_and_result(file: Path) -> None:
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Command:", "Cost", "esult"):
        assert any(word in line for line in head), f"{file.name} does not say its {word}"


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != "base"], ids=lambda file: file.stem)
def test_loads(file: Path) -> None:
    config = config_file.load(file)
    assert config.competition.train
    assert config.model.backbone


def test_base_holds_no_competition_of_its_own() -> None:
    with pytest.raises(config_file.ConfigError, match="competition: is missing"):
        config_file.load(FOLDER / "base.yaml")
