"""The guide in docs/: its pages, links, pictures, commands and Python blocks agree with the repository.

Whether the blocks do what the pages say is shown by `.ci/walk`, which runs them.
"""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import recontrast
from recontrast.app import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from pages import previous_page, read_blocks  # noqa: E402

PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
LIMIT = 2_500_000  # bytes of all pictures


def blocks(language):
    """The blocks of that language on all pages and the README, as parameters named by page and line."""
    pages = [*PAGES, ROOT / "README.md"]
    found = [block for page in pages for block in read_blocks(page) if block.language == language]
    return [pytest.param(block, id=f"{block.page.name}:{block.line}") for block in found]


def anchors(page):
    """Anchors of the headings of a Markdown file, as code hosts and MyST form them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links():
    """Target of every link and picture that is no address, by page."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for _, target in LINK.findall(text):
            if "://" not in target:
                yield pytest.param(page, target, id=f"{page.name}-{target}")


def test_every_page_is_in_the_contents_once():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = [line for part in re.findall(r"```\{toctree\}(.*?)```", text, re.S) for line in part.split("\n")]
    names = sorted(line for line in listed if line and not line.startswith(":"))
    assert names == sorted(page.stem for page in PAGES if page.name != "index.md")
    for name in names:  # and in the list that a code host shows
        assert f"]({name}.md)" in text


@pytest.mark.parametrize("page, target", list(links()))
def test_link_leads_to_a_file_and_a_heading(page, target):
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.is_file()
    if anchor:
        assert anchor in anchors(file)


def test_pictures_are_described_used_and_small():
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md"])
    assert not re.search(r"!\[\s*\]", text)
    pictures = [path for path in (DOCS / "figures").iterdir() if path.is_file()]
    assert [path.name for path in pictures if f"figures/{path.name}" not in text] == []
    assert 0 < sum(path.stat().st_size for path in pictures) < LIMIT


def commands(text):
    """Each `recontrast` command of a shell script, as words."""
    script = re.sub(r"<<'(\w+)'.*?^\1$", "", text, flags=re.M | re.S).replace("\\\n", " ")
    for line in script.splitlines():
        words = shlex.split(line, comments=True)
        while words and words[0] != "recontrast":
            words = words[1:]
            if "-m" in words[:1]:
                words = words[1:]
        if len(words) > 1:
            yield words[1:]


@pytest.mark.parametrize("block", blocks("sh"))
def test_commands_and_options_exist(block):
    group = get_command(cli.app)
    for name, *words in commands(block.text):
        command = group.commands[name]
        known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
        known |= {"--help"}
        assert [word for word in words if word.startswith("--") and word.partition("=")[0] not in known] == []


def test_a_wrong_option_is_found():
    assert isinstance(get_command(cli.app), typer.core.TyperGroup)
    assert list(commands("pip install x\nrecontrast train mine \\\n  --stpes 3 # no\n")) == [
        ["train", "mine", "--stpes", "3"]
    ]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_compiles_and_imports_what_exists(block):
    tree = ast.parse(block.text, str(block.page))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "recontrast":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_blocks_that_are_not_run_say_why():
    for page in PAGES:
        for block in read_blocks(page):
            assert block.reason is None or len(block.reason.split()) >= 4, f"{page.name}:{block.line}"


def test_a_page_that_continues_another_names_it():
    assert previous_page(DOCS / "decisions.md") == DOCS / "your_images.md"
    for page in PAGES:
        assert previous_page(page) is None or previous_page(page) in PAGES


def test_blocks_are_read_with_line_language_reason_and_file(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```sh\nls\n```\n\n<!-- not run: it would take far too long -->\n```python\nx = 1\n```\n\n"
        "Save it as `line.py`:\n\n```python\nimport sys\n```\n\n```text\nno\n```\n",
        encoding="utf-8",
    )
    found = [(block.line, block.language, block.text, block.reason, block.file) for block in read_blocks(page)]
    assert found == [
        (4, "sh", "ls\n", None, None),
        (9, "python", "x = 1\n", "it would take far too long", None),
        (15, "python", "import sys\n", None, "line.py"),
    ]


@pytest.mark.parametrize("name", recontrast.__all__)
def test_public_name_is_in_the_reference(name):
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    assert re.search(rf"^\.\. auto\w+:: recontrast\.(\w+\.)*{name}$", text, re.M)


def named_files():
    """Files of the repository that the pages name in backticks."""
    name = re.compile(r"`((?:recontrast|csrc|kernels|tests|benchmarks|examples|docs)/[\w./]+)`")
    return sorted({path for page in PAGES for path in name.findall(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("path", named_files())
def test_file_that_is_named_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/extending.md"])
def test_every_folder_of_the_package_is_explained(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = {path.parent.name for path in ROOT.glob("recontrast/*/__init__.py")} - {"kernels"}
    assert not {name for name in folders if not re.search(rf"\b{name}/", text)}


def test_benchmarks_are_collected():
    """`pytest benchmarks` is documented, but the tests do not run it; an import that broke would go unnoticed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    for name in ("bench_evaluate.py", "bench_ops.py"):  # bench_train.py is a script
        assert f"benchmarks/{name}::" in result.stdout
