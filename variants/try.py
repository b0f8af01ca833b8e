"""Tries a variant in a copy of the repository; the working tree stays as it is.

    python variants/try.py                  lists the variants
    python variants/try.py gspo             applies variants/gspo.patch to a copy and runs the fast tests there
    python variants/try.py gspo gdpo        two at once
    python variants/try.py gspo --demo      runs the demo there instead; what it writes is in runs/variants/gspo
    git apply variants/gspo.patch           keeps it: the text before the diff is skipped

What stands behind -- goes on to pytest or to demo.py, as in `gspo --demo -- --seed 1`. The copy has the files that git
knows, as they are in the working tree.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from glob import glob

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES = sorted(os.path.basename(path).removesuffix(".patch") for path in glob(f"{ROOT}/variants/*.patch"))
SIZE = "tests/test_house.py::test_files_and_functions_are_short[train.py]"  # a patch may make train.py longer


def read(name: str) -> str:
    with open(f"{ROOT}/variants/{name}.patch", encoding="utf-8") as file:
        return file.read()


def broken_tests(name: str) -> list[str]:
    """The tests that hold the equation which the patch changes, as its head names them; pytest takes them as prefixes.
    """
    return re.findall(r"\btest_\w+\.py::\w+", read(name).split("diff --git")[0])


def copy_files(folder: str):
    """Copy what git knows into a folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for path in filter(os.path.exists, (os.path.join(ROOT, path) for path in listed.split("\0") if path)):
        target = os.path.join(folder, os.path.relpath(path, ROOT))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(path, target)


def apply(folder: str, name: str) -> subprocess.CompletedProcess:
    """`git apply` in a folder that is no repository."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": os.path.dirname(folder)}
    return subprocess.run(["git", "apply", f"{ROOT}/variants/{name}.patch"], cwd=folder, env=env, capture_output=True,
                          text=True)


def main(argv: list[str] | None = None) -> int:
    """The exit code of the tests or of the demo; 1 where a patch does not apply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--demo", action="store_true", help="run demo.py instead of the fast tests")
    argv = sys.argv[1:] if argv is None else argv
    own = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_args(argv[:own]), argv[own + 1 :]
    unknown = sorted(set(args.names) - set(NAMES))
    if unknown:
        parser.error(f"there is no variant {unknown[0]}; give one of {', '.join(NAMES)}")
    if not args.names:
        print("\n".join(read(name).split("\n")[0] for name in NAMES))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.realpath(folder)
        copy_files(folder)
        for name in args.names:
            done = apply(folder, name)
            if done.returncode:
                print(f"error: variants/{name}.patch does not apply: {done.stderr.strip()}", file=sys.stderr)
                return 1
        command = ["-m", "pytest", "-m", "fast", "-q", "--deselect", SIZE]
        for test in [test for name in args.names for test in broken_tests(name)]:
            command += ["--deselect", f"tests/{test}"]
        if args.demo:
            command = ["demo.py", "--out", os.path.join(ROOT, "runs", "variants", "-".join(args.names))]
        return subprocess.run([sys.executable, *command, *rest], cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
