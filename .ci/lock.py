"""Fix every version, direct and transitive: `python .ci/lock.py` resolves, and writes what it found into two files.

pyproject.toml gets an exact constraint for each package, so that `uv run` finds the same versions on any day and on any
mirror; requirements.txt is the same with hashes, for pip. Only this script asks what a registry holds.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
BEGIN, END = "# written by .ci/lock.py\nconstraint-dependencies = [\n", "]\n"
# a registry may show a file only weeks after the date it gives for it
WEEKS = 4


def without_constraints(text: str) -> str:
    return re.sub(re.escape(BEGIN) + r"(?:    .*\n)*" + re.escape(END), "", text)


def uv(folder: Path, *arguments: str) -> str:
    program = os.environ.get("UV") or shutil.which("uv") or "uv"
    return subprocess.run([program, *arguments], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    newest = datetime.date.today() - datetime.timedelta(weeks=WEEKS)
    parser.add_argument("--before", default=newest.isoformat(), help="nothing that was uploaded later")
    before = f"--exclude-newer={parser.parse_args().before}T00:00:00Z"
    text = without_constraints((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(text, encoding="utf-8")
        uv(folder, "lock", "--quiet", before)
        packages = tomllib.loads((folder / "uv.lock").read_text(encoding="utf-8"))["package"]
        found = sorted(f"{package['name']}=={package['version']}" for package in packages if "version" in package)
        twice = {
            pin.partition("==")[0]
            for pin in found
            if sum(other.startswith(pin.partition("==")[0] + "==") for other in found) > 1
        }
        if twice:
            raise SystemExit(f"no single version for every Python: pin {', '.join(sorted(twice))} in pyproject.toml")
        own = f"{tomllib.loads(text)['project']['name']}=="
        lines = "".join(f'    "{pin}",\n' for pin in found if not pin.startswith(own))
        text = text.replace("[tool.uv]\n", f"[tool.uv]\n{BEGIN}{lines}{END}")
        (folder / "pyproject.toml").write_text(text, encoding="utf-8")
        export = uv(folder, "export", "--quiet", before, "--format=requirements-txt", "--no-header", "--no-annotate")
    (PROJECT / "pyproject.toml").write_text(text, encoding="utf-8")
    (PROJECT / "requirements.txt").write_text(export, encoding="utf-8")
    of_pip = len(re.findall(r"(?m)^\S+==", export))
    print(f"{len(found)} versions in pyproject.toml, {of_pip} of them in requirements.txt")


if __name__ == "__main__":
    main()
