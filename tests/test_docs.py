"""The documents: every command in them exists with its options, every file and page they point to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from comp import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IN_LINE = re.compile(r"`(comp [a-z][^`]*)`")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the code blocks of a page in order: language ("" where none is named), and content."""
    return re.findall(r"^```([a-z]*)\n(.*?)^```", text, re.M | re.S)


def lines(block: str) -> list[str]:
    """Return the lines of a block without their comments."""
    return [line.split("  #")[0].split(" # ")[0].strip() for line in block.split("\n")]


def commands(text: str) -> list[str]:
    """Return the comp commands of a page: lines of its code blocks, and what stands in backquotes with an option."""
    standing = [line for language, block in blocks(text) if language in ("", "sh") for line in lines(block)]
    flowing = [" ".join(found.split()) for found in IN_LINE.findall(text)]
    return [line for line in [*standing, *flowing] if re.match(r"comp [a-z]", line)]


def check(line: str) -> None:
    """Raise ValueError where comp would not know the command or an option of it."""
    command: Any = typer.main.get_command(cli.app)
    words = shlex.split(line.split(" && ")[0])[1:]
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            if command.invoke_without_command or "|" in line:
                break
            raise ValueError(f"no command '{' '.join(words[:1])}'")
        command = command.commands[words.pop(0)]
    if "|" in words or "..." in words:
        return
    known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    for word in words:
        if word.startswith("-") and word.split("=")[0] not in known | {"--help"}:
            raise ValueError(f"no option {word}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_known(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        try:
            check(line)
        except ValueError as fault:
            pytest.fail(f"{page.name}: `{line}`: {fault}")


def test_the_check_finds_what_is_wrong() -> None:
    check("comp train --config x --fold all")
    check("comp bundle verify bundles/x --shape slug")
    for line in ["comp tran --config x", "comp train --folds all", "comp bundle verify x --shapes y"]:
        with pytest.raises(ValueError, match="no (command|option)"):
            check(line)


def test_commands_are_found() -> None:
    assert commands("a `comp infer --run x` b\n```\ncomp oof   # why\nmake\n```\n") == [
        "comp oof",
        "comp infer --run x",
    ]
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"
