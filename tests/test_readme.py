"""The README's equation table and the code name the same equations, and each has a test that exists."""
import os
import re
from glob import glob

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(path):
    with open(os.path.join(ROOT, path)) as file:
        return file.read()


def test_every_equation_tag_is_in_the_table_with_a_test():
    sources = [path for path in glob("*.py", root_dir=ROOT) + glob("*/*.py", root_dir=ROOT) if not path.startswith("tests/")]
    in_code = {tag for path in sources for tag in re.findall(r"Eq\. ([A-Z0-9]+)", read(path))}
    table = dict(re.findall(r"^\| Eq\. ([A-Z0-9]+) .*\| (tests/\w+\.py) \|$", read("README.md"), re.MULTILINE))
    assert in_code == set(table)
    for tag, test in table.items():
        assert os.path.exists(os.path.join(ROOT, test)), f"Eq. {tag} names {test}"


def test_every_file_of_the_reading_order_exists_and_is_whole():
    linked = set(re.findall(r"\]\(([\w./]+)\)", read("README.md")))
    assert all(os.path.exists(os.path.join(ROOT, path)) for path in linked)
    assert set(glob("*.py", root_dir=ROOT)) <= linked


def test_the_ci_script_runs_the_readme_test_command():
    assert read("README.md").count("-m pytest") == 1 and "README.md" in read(".ci/run")
