"""Every code block of README and docs runs, every command and link exists, and the pages build without a warning.

Python blocks of a page run in order, in one namespace. Shell blocks run in order, in one directory that has the images
they speak of; trainings are made tiny by further options, for which the last one given counts.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import idx, make_images

import capsroute
from capsroute import cli
from capsroute.bench.measure import Result
from capsroute.report import build, style
from capsroute.training import data

pytest.importorskip("sklearn")
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = {"text"}  # drawings and output
TINY = {
    "train": ["--epochs", "1", "--channels", "4", "--types", "1", "--batch-size", "256"],
    "report": ["--seconds", "0"],
    "bench": ["--batch", "2", "--seconds", "0", "--implementations", "fused", "reference"],
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """The line, the language and the text of each code block."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in BLOCK.finditer(text)]


def commands(page: Path) -> list[str]:
    """The commands of the shell blocks, without comments."""
    text = "".join(block for _, language, block in blocks(page) if language == "bash").replace("\\\n", " ")
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()) if line]


@pages
def test_every_block_says_what_it_is(page):
    assert page.read_text().count("```") % 2 == 0
    for line, language, _ in blocks(page):
        assert language.startswith("{") or language in {"python", "bash", *NOT_RUN}, f"{page.name}:{line}"


@pytest.fixture(autouse=True)
def few_digits(tmp_path, monkeypatch, threads):
    """An empty directory, no images of the environment's, not all of scikit-learn's; a page may set threads."""
    digits = data.digits()
    few = digits._replace(train=digits.train[:256], test=digits.test[:64])
    monkeypatch.setattr(data, "digits", lambda: few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPSROUTE_DATA", raising=False)


@pages
def test_python_runs(page):
    names = {"__name__": page.stem}
    for line, language, block in blocks(page):
        if language == "python":  # as many lines down as on the page: an error says where
            exec(compile("\n" * (line - 1) + block, page, "exec"), names)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """The data sets that the pages speak of, as small as can be; and figures of few pixels."""
    (tmp_path / "mnist").mkdir()
    for prefix in ("train", "t10k"):
        (tmp_path / "mnist" / f"{prefix}-images-idx3-ubyte").write_bytes(idx(40, 12, 12))
        labels = idx(40, values=bytes(k % 10 for k in range(40)))
        (tmp_path / "mnist" / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    for name in ("ant", "bee"):
        make_images(tmp_path / "photos" / name, 10, (10, 200, 30), size=(16, 16))

    def compare(model_factory, pixels, labels, *, seconds):  # tests/test_step.py does so for real
        return [Result(name, 0.1, 0.1, 0.1, 3, 2**20)._asdict() for name in ("fused", "reference")]

    monkeypatch.setattr(build, "compare_training_step", compare)
    monkeypatch.setattr(style, "DPI", 40)


@pages
def test_commands_run(page, images, monkeypatch):
    for line in commands(page):
        words = shlex.split(line)
        with monkeypatch.context() as patch:
            while "=" in words[0]:
                patch.setenv(*words.pop(0).split("=", 1))
            if words[0] == "torchrun":  # tests/test_training.py does so for real
                assert words[words.index("-m") + 1] == "capsroute"
                words = words[words.index("capsroute") :]
            if words[0] == "capsroute":
                tiny = TINY.get(words[1], [])
                tiny = tiny[2:] if "batch" in words else tiny  # --sweep batch takes none
                assert cli.main([*words[1:], *tiny]) == 0, line
            else:
                check_command(words, line)


def check_command(words: list[str], line: str) -> None:
    """A command of another program has what it needs; a program that is not known here is a failure."""
    program, arguments = words[0], [word for word in words[1:] if not word.startswith("-")]
    if program == "make":
        for target in (word for word in arguments if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif program == "pip":
        for extra in re.findall(r"\[(.*?)\]", line):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), line
    elif program == "pytest":
        chosen = words.index("-k") + 1 if "-k" in words else None
        for k, path in enumerate(words[1:], 1):
            assert path == "-k" or k == chosen or (ROOT / path).exists(), line
    elif program == "tensorboard":
        assert list(Path(words[words.index("--logdir") + 1]).glob("events.*")), line
    elif program == "python":
        assert (ROOT / arguments[0]).exists(), line
    else:
        assert program in {"git", "cd"}, f"{line}: how is this checked?"


@pages
def test_links_exist(page):
    text = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_chinese_readme_has_the_commands_of_the_quick_start():
    assert commands(ROOT / "README.zh-CN.md") == commands(ROOT / "docs" / "quick_start.md")


def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    build_dir = tmp_path / "html"
    environment = {**os.environ, "PYTHONPATH": str(Path(capsroute.__file__).parent.parent)}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", build_dir]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {path.stem for path in build_dir.glob("*.html")}
    mathematics = (build_dir / "mathematics.html").read_text()
    assert mathematics.count("<mtr>") == 4 + 4 + 4  # the lines of the three systems of equations
    assert "<mi>&</mi>" not in mathematics
    for html in build_dir.glob("*.html"):  # nothing is loaded from the network
        loaded = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', html.read_text())
        assert not loaded, html.name
    shutil.rmtree(build_dir)
