"""README.md and the files beside it are true: equations, links, the file tree, examples of data rows, and sizes."""
import json
import os
import re
import tomllib
from glob import glob

import pytest
import yaml

import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(glob("docs/*.md", root_dir=ROOT))]
pytestmark = pytest.mark.fast


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def code_blocks(text):
    """What stands between two lines of three backticks."""
    return text.split("```")[1::2]


def test_every_equation_tag_is_in_the_table_with_a_test():
    sources = [path for path in glob("*.py", root_dir=ROOT) + glob("*/*.py", root_dir=ROOT)
               if not path.startswith("tests/")]
    in_code = {tag for path in sources for tag in re.findall(r"Eq\. ([A-Z0-9]+)", read(path))}
    table = dict(re.findall(r"^\| Eq\. ([A-Z0-9]+) .*\| (tests/\w+\.py) \|$", read("README.md"), re.MULTILINE))
    assert in_code == set(table)
    for tag, test in table.items():
        assert os.path.exists(os.path.join(ROOT, test)), f"Eq. {tag} names {test}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", read(page)):
        assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), target)), f"{page} links {target}"


def test_every_root_file_and_every_room_is_in_the_tree():
    tree = next(block for block in code_blocks(read("README.md")) if "\ntrain.py " in block)
    named = set(re.findall(r"^([\w.]+)/? ", tree, re.MULTILINE))
    rooms = {os.path.dirname(path) for path in glob("*/*.py", root_dir=ROOT)} | {"docs", "recipes"}
    assert set(glob("*.py", root_dir=ROOT)) | rooms <= named
    assert all(os.path.exists(os.path.join(ROOT, name)) for name in named)


def test_the_examples_of_data_rows_can_be_loaded(tmp_path):
    lines = [line for line in read("README.md").splitlines() if line.startswith("{")]
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line + "\n")
        [sample] = data.load_samples(str(path))
        assert sample.images and (sample.answer and sample.key_words or sample.solution)
        assert json.loads(line)
    assert len(lines) == 2


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 250


@pytest.mark.parametrize("page", [*PAGES, *glob("recipes/*.sh", root_dir=ROOT)])
def test_no_line_is_over_120_columns(page):
    """A table row cannot be wrapped, so in docs/ rows may be longer."""
    lines = [line for line in read(page).splitlines() if not (page.startswith("docs/") and line.startswith("|"))]
    assert max(map(len, lines)) <= 120


def test_the_ci_script_runs_the_readme_test_command():
    assert read("README.md").count("-m pytest") == 1 and "README.md" in read(".ci/run")


def test_the_files_that_tools_read_can_be_parsed():
    settings = tomllib.loads(read("pyproject.toml"))
    markers = settings["tool"]["pytest"]["ini_options"]["markers"]
    assert {marker.split(":")[0] for marker in markers} == {"gpu", "fast"}
    workflow = yaml.safe_load(read(".github/workflows/tests.yml"))
    assert any(step.get("run") == "bash .ci/run" for step in workflow["jobs"]["tests"]["steps"])
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["references"]
