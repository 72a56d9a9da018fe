"""README, CONTRIBUTING, CHANGELOG and docs/: what they tell readers to type works, what they name exists, and links lead on.

Blocks of commands (```bash) and of code (```python) run here, all in one working folder, unless the line before them says what
they need that is not here, `<!-- needs: tpu -->`. Those are read instead: their flags, settings and files must exist.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import yaml
from commands import captured, on_a_path
from test_messages import has
from test_structure import FLOORS

from refusal_jax.jobs.main import JOBS
from refusal_jax.runs import artifacts
from refusal_jax.study.config import get_config

ROOT = pathlib.Path(__file__).parent.parent
ARTIFACTS = {name for name in vars(artifacts).values() if isinstance(name, str)}
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = ("bash", "python", "text", "yaml")
MARK = re.compile(r"<!-- (needs|excerpt): (.+) -->")
DEMO = "refusal-jax study --config=configs/demo.py --workdir=runs/demo"


def hooks():
    """Returns the module that builds the site's pages."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block. needs: what it needs that is not here; excerpt: the file that it shows a part of, or ""."""

    page: pathlib.Path
    line: int
    language: str
    text: str
    needs: tuple[str, ...] = ()
    excerpt: str = ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: pathlib.Path) -> list[Block]:
    found, lines, mark = [], page.read_text(encoding="utf-8").splitlines(), None
    number = 0
    while number < len(lines):
        fence = re.fullmatch(r"( *)```(\w*)", lines[number])
        if fence:
            end = next(n for n in range(number + 1, len(lines)) if lines[n] == f"{fence[1]}```")
            text = "\n".join(line[len(fence[1]) :] for line in lines[number + 1 : end])
            marked = dict([mark.groups()]) if mark else {}
            needs = tuple(marked.get("needs", "").split(", ")) if "needs" in marked else ()
            found.append(Block(page, number + 1, fence[2], text, needs, marked.get("excerpt", "")))
            number = end
        mark = MARK.fullmatch(lines[number].strip())
        number += 1
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
CODE = [block for block in BLOCKS if block.language == "python"]
RUN = [block for block in BLOCKS if block.language in ("bash", "python") and not block.needs and not block.excerpt]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block of commands, pipes and assignments taken apart."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = list(lexer)
        while words:
            end = next((n for n, word in enumerate(words) if set(word) <= set("|;&")), len(words))
            found.append([word for word in words[:end] if not re.match(r"[A-Z_]+=", word)])
            words = words[end + 1 :]
    return [words for words in found if words]


def test_every_block_says_what_it_is():
    known = hooks().NEEDS
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: a block is one of {LANGUAGES}"
        assert set(block.needs) <= known.keys(), f"{block}: needs one of {', '.join(known)}"
    for page in PAGES:
        marks = [
            line for line in page.read_text(encoding="utf-8").splitlines() if re.match(" *<!-- (needs|excerpt)", line)
        ]
        used = [block for block in blocks_of(page) if block.needs or block.excerpt]
        assert len(marks) == len(used), f"{page.name}: a mark must stand in the line before a block: {marks}"
    assert len(RUN) >= 15


def sound(job: str, words: list[str]) -> str | None:
    """Tells what is wrong with the flags of a job, if anything is."""
    if job not in JOBS:
        return f"there is no job {job}"
    if job == "lm_eval":
        return None  # its flags are the harness's
    names = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    wrong = [name for name in names if not has(job, name)]
    for file, _, argument in (word.partition("=")[2].partition(":") for word in words if word.startswith("--config=")):
        runpy.run_path(str(ROOT / file))["get_config"](*[argument] * bool(argument))
    return f"there is no flag {wrong}" if wrong else None


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_sound(block):
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    extras = re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.MULTILINE)
    for words in commands(block):
        if words[0] == "refusal-jax" and len(words) > 1:
            assert sound(words[1], words[2:]) is None, words
        elif words[:1] == ["bash"]:
            script = (ROOT / words[1]).read_text()
            at = words.index("--") if "--" in words else len(words)
            for flag in (word.partition("=")[0] for word in words[2:at] if word.startswith("--")):
                assert flag in script or f"{flag[2:]})" in script, f"{words[1]} has no {flag}"
            assert at == len(words) or sound(words[at + 1], words[at + 2 :]) is None, words
        elif words[:1] == ["python"]:
            for word in words[1:]:
                assert not word.startswith("tests/") or (ROOT / word).is_file(), word
        elif words[:2] == ["pip", "install"]:
            assert re.fullmatch(r"\.(\[\w+(,\w+)*\])?|[\w ]+", words[2]), words
            assert set(re.findall(r"\w+", words[2].removeprefix("."))) <= {*extras, "sentencepiece"}, words


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_steps_are_sound(block):
    """Steps of continuous integration, whose commands are this package's."""
    runs = [shlex.split(step["run"]) for step in yaml.safe_load(block.text) if "run" in step]
    assert runs
    for words in runs:
        assert words[0] == "refusal-jax" and sound(words[1], words[2:]) is None, words


@pytest.mark.parametrize("block", CODE, ids=str)
def test_code_compiles(block):
    compile(block.text, str(block), "exec")
    if block.excerpt:
        assert block.text in (ROOT / block.excerpt).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a checkout, with the study of the embedded model in runs/demo; and what the study printed."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "launch", "refusal_jax", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    with on_a_path(folder / "bin"):
        yield folder, run(folder, DEMO)


def surroundings(folder: pathlib.Path) -> dict[str, str]:
    """Returns the environment of what runs in the folder like a checkout."""
    path = f"{folder / 'bin'}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}


def run(folder: pathlib.Path, line: str) -> str:
    """Runs a line of commands in the folder like a checkout, and returns what it prints."""
    command = ["bash", "-euo", "pipefail", "-c", line]
    done = subprocess.run(
        command, cwd=folder, env=surroundings(folder), text=True, capture_output=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_run(place):
    """Each command once, though pages share some."""
    folder, _ = place
    done = {DEMO: ""}
    for block in (block for block in RUN if block.language == "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip() and line not in done:
                done[line] = run(folder, line)
    assert (folder / "edited/export.json").is_file() and (folder / "judged/statistics.json").is_file()
    (audited,) = (" ".join(out.split()) for line, out in done.items() if line.startswith("refusal-jax audit edited"))
    shown = [block.text for block in BLOCKS if block.page.name == "audit.md" and block.language == "text"]
    assert any(audited.startswith(" ".join(text.split())) for text in shown), audited[:1000]
    assert (folder / "audited/audit.html").is_file()


@pytest.mark.parametrize(
    "page", sorted({block.page for block in RUN if block.language == "python"}), ids=lambda p: p.stem
)
def test_code_runs(place, page):
    """All blocks of a page, one after the other in one process."""
    folder, _ = place
    script = folder / f"{page.stem}.py"
    script.write_text("\n\n".join(block.text for block in RUN if block.page == page and block.language == "python"))
    done = captured([str(script)], folder, surroundings(folder))
    assert done.returncode == 0, f"{page.name}\n{done.stdout}\n{done.stderr}"


def test_readme_shows_what_the_demo_prints(place):
    (table,) = (block.text for block in BLOCKS if block.page.name == "README.md" and block.language == "text")
    assert " ".join(table.split()) in " ".join(place[1].split())  # the page breaks the long lines
    start = next(block.text for block in BLOCKS if block.page.name == "start.md" and block.language == "text")
    assert start in table
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_ci_runs_what_the_readme_says():
    ci = (ROOT / ".ci/run").read_text()
    assert all(f"bash launch/{name}.sh" in ci for name in ("check", "test", "demo"))


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as forges and MkDocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.stem)
def test_what_is_named_exists(page):
    """Settings, jobs, modules and files that a page names."""
    text = page.read_text(encoding="utf-8")
    fields = {one.path for one in get_config().described()}
    for name in re.findall(r"--config\.([a-z_.]+[a-z_])", text):
        assert name in fields or any(field.startswith(f"{name}.") for field in fields), name
    for job in re.findall(r"refusal-jax (\w+)", re.sub(r"^```text.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        assert job in (*JOBS, "JOB", "alone"), job
    for name in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text):
        places = (ROOT, ROOT / "refusal_jax", ROOT / "refusal_jax/models", ROOT / "docs")
        ours = name.split("/")[0] in {path.name for path in [*ROOT.iterdir(), *(ROOT / "refusal_jax").iterdir()]}
        written = name.startswith("runs/") or name.rstrip("/") in ARTIFACTS
        assert not ours or written or any((place / name).exists() for place in places), name


def test_messages_that_are_explained_exist():
    """Each message that the page on troubleshooting explains is one of the package, as far as it is the same every time."""
    files = [*(ROOT / "refusal_jax").rglob("*.py"), *(ROOT / "launch").glob("*.sh")]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    for quoted in re.findall(r'^\*\*(".+?")\.?\*\*', (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE):
        for message in re.findall(r'"([^"]+)"', quoted):
            parts = re.split(r"…|'[^']*'|[\w.-]*[\d=][\w.-]*|[\w.]+\.json|: |\.", message)
            longest = max((part.strip(" ,") for part in parts), key=len)
            assert longest in source, message


def test_rooms_in_the_design():
    """The table of floors is that of the package."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "docs/design.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows] == list(FLOORS)
