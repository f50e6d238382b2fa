"""The OT plan of one answer against the reference, as results_reading.ipynb draws it, in a file.

    python -m benchmarks.ot_figure                     # benchmarks/single_axis_ot_viz.png
    python -m benchmarks.ot_figure --output plan.png

The notebook's own cells compute and draw it; here are only the names by which they are found. No run is read, so the
figure depends on the embedded model alone. What it shows and what not is said by the notebook below the figure.
"""

import argparse
import ast
import json
import os
import tempfile
import warnings
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from src.run.reading import markdown

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOK = PROJECT / "results_reading.ipynb"
CELLS = ("RUNS_FOLDER", "REFERENCE", "compare", "results", "draw")  # a name that each cell defines, in order
DOTS_PER_INCH = 130


def defined_in(source: str) -> set[str]:
    """Functions and variables that the lines of a cell define, not those within its functions."""
    found = set()
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


def cells_that_define(names: tuple[str, ...], notebook: Path) -> list[str]:
    """The code cell of each name; one that is not there, or twice, ends it."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    found = []
    for name in names:
        defining = [source for source in code if name in defined_in(source)]
        if len(defining) != 1:
            raise SystemExit(f"{notebook.name}: {len(defining)} cells define {name!r}, not one; is it renamed?")
        found += defining
    return found


def drawn_by(notebook: Path) -> tuple[pyplot.Figure, dict[str, Any]]:
    """The figure that the cells draw, and all that they define."""
    names: dict[str, Any] = {"show": lambda table: print(markdown(table))}  # in place of a notebook's display
    cells = cells_that_define(CELLS, notebook)
    pyplot.close("all")
    with (
        tempfile.TemporaryDirectory() as empty,
        patch.dict(os.environ, GRPO_RUNS=empty),
        chdir(PROJECT),
        pyplot.rc_context(),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        for source in cells:
            exec(compile(source, notebook.name, "exec"), names)
    numbers = pyplot.get_fignums()
    if len(numbers) != 1:
        raise SystemExit(f"{notebook.name}: without a run its cells draw {len(numbers)} figures of OT, not one")
    return pyplot.figure(numbers[0]), names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "single_axis_ot_viz.png")
    options = parser.parse_args()
    figure, _ = drawn_by(NOTEBOOK)
    figure.savefig(options.output, dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
