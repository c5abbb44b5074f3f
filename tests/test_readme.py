"""The README's code runs, and its commands and links exist."""

import re
from pathlib import Path

import pytest
import torch

from capsroute.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL))


def test_python_runs():
    names = {}
    exec(blocks("python"), names)
    assert names["v"].shape == (128, 10, 16)
    v = names["layer"](names["u"][:1])
    assert v.shape == (1, 10, 16)
    assert (v.norm(dim=-1) < 1).all()
    assert torch.isfinite(v).all()


def test_commands_exist(capsys):
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", blocks("bash"), re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    commands = re.findall(r"^capsroute (\w+)", blocks("bash"), re.MULTILINE)
    assert commands
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    assert capsys.readouterr().out


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
