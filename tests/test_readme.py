import importlib.util
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from evoprune.commands import COMMANDS, parser_of
from evoprune.config import options
from evoprune.main import parser

README, DOCS = ((ROOT / folder / "README.md").read_text() for folder in (".", "evoprune"))
BLOCKS, MORE = (re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) for text in (README, DOCS))


def commands():
    lines = [line for kind, text in BLOCKS + MORE if kind == "sh" for line in text.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.split("&&")]


def test_the_two_commands_are_there():
    assert {"pip install -e .", "python -m evoprune.main", "pip install -e '.[test]'", "pytest"} <= set(commands())


def test_every_command_line_is_one_that_the_parser_takes():
    found = [shlex.split(c, comments=True) for c in commands() if c.startswith("python -m evoprune.main")]
    assert len(found) >= 5
    for words in found:
        (parser_of(words[3]) if words[3:4] and words[3] in COMMANDS else parser()).parse_args(
            words[4 if words[3:4] and words[3] in COMMANDS else 3:])


def test_every_setting_stands_in_the_table():
    rows = dict(re.findall(r"^\| `(--[\w-]+)[^`]*` \| (.*) \|$", README, re.MULTILINE))
    for name, about in options().items():
        flag = "--" + ("no-" if about.default is True else "") + name.replace("_", "-")
        default = "" if about.default is None or about.kind is bool else f" (default: {about.default})"
        assert rows.get(flag) == ("no " if about.default is True else "") + about.help.replace("|", "\\|") + default, flag


def test_the_map_of_the_wings_names_every_module():
    paths = [p for p in (ROOT / "evoprune").rglob("*.py") if p.stem != "__init__"]
    assert len(paths) > 40
    rows = re.findall(r"^\| `(\w+)/`.*?\| (.*) \|$", README, re.MULTILINE)
    for path in paths:
        assert any(f"`{path.stem}.py`" in text for wing, text in rows if wing == path.parent.name), path
    assert {f"`{p.name}/`" for p in (ROOT / "evoprune").iterdir() if (p / "__init__.py").exists()} <= set(
        re.findall(r"`\w+/`", README))


def test_the_readme_is_what_a_user_needs():
    assert len([line for line in README.splitlines() if not line.startswith("| `--")]) <= 250


@pytest.mark.parametrize("folder", [".", "results", "evoprune"])
def test_pictures_and_files_that_a_readme_names_exist(folder):
    links = re.findall(r"\]\(([^):]+)\)", (ROOT / folder / "README.md").read_text())
    assert links
    for target in links:
        path, _, section = target.partition("#")
        text = ROOT / folder / (path or "README.md")
        assert text.exists(), target
        heads = [re.sub(r"[^\w\- ]", "", h).strip().replace(" ", "-").lower()
                 for h in re.findall(r"^#+ (.*)$", text.read_text(), re.MULTILINE)] if section else [section]
        assert section in heads, target


def plain(text):
    """Lines without what differs from run to run and machine to machine: numbers, origins, verdicts, what trained, widths."""
    for pattern in (r", [^,\n]* CPU\b", r"^plan for .*", r"(?<=values: )(trained ones|those of the dense model)",
                    r"(?<=; )[\w+@.]+(?=, generation)", r"(?<=\))  [\w+@.]+$"):
        text = re.sub(pattern, "", text, flags=re.MULTILINE)
    text = re.sub(r"\b(better|worse|tie)\b", "VERDICT", text)
    return {" ".join(re.sub(r"(?<![\w-])[+-]?\d[\d,.e-]*|(?<= )-(?= |$)", "#", line).split()) for line in text.splitlines()}


def test_the_first_hour_goes_as_the_readme_says(tmp_path):
    """All commands and Python blocks, in an empty folder; shorter, by settings that change no line but in numbers."""
    hour, shorter = README[README.index("## A first hour"):README.index("## In Python")], {
        "python -m evoprune.main": "python -m evoprune.main --generations 5 --seed 1",
        "python -m evoprune.main --finetune-epochs 5": "python -m evoprune.main --generations 5 --finetune-epochs 1 --front 6"}
    name = "small.onnx" if importlib.util.find_spec("onnxscript") else "picked.pt2"  # without the extra
    hour = hour.replace("small.onnx", name)
    said, shown = "", 0
    for kind, block in re.findall(r"```(\w*)\n(.*?)```", hour, re.DOTALL):
        if kind == "sh":
            said = ""
            for line in block.replace("pip install -e . && ", "").splitlines():
                words = shlex.split(shorter.get(line, line).replace("0.8,0.9,0.95", "0.2,0.3,0.4"))
                done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                said = done.stdout
        elif not kind:
            missing = plain(block) - plain(said) - {"..."}
            assert not missing, (missing, said)
            shown += 1
    assert shown == 3 and {p.name for p in tmp_path.iterdir()} == {"results", name}
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert len(blocks) == 2
    program = "\n".join(blocks).replace("generations=50", "generations=3")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stderr)
    assert "sparsity" in done.stdout


def test_the_block_of_a_hugging_face_model_runs(tmp_path):
    pytest.importorskip("transformers")
    block, = (text for kind, text in MORE if kind == "python" and "transformers" in text)
    program = "import evoprune, torch\n" + block + "print(front)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "accuracy" in done.stdout, done.stderr
