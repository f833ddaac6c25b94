"""Runs notebooks/parity.py and keeps what it printed and drew in a .ipynb.

python notebooks/execute.py [--out FILE.ipynb]        (`make notebook`)

The environment variable MODEL names another checkpoint; the result is then parity_NAME.ipynb in the working directory, unless
--out says otherwise. Exits 1 when a cell fails, with the cell and its error.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

SOURCE = Path(__file__).resolve().parent / "parity.py"


def read_source() -> nbformat.NotebookNode:
    """parity.py as a notebook without outputs; cells are numbered, so that a second run differs in its outputs only."""
    notebook = jupytext.read(SOURCE)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata.pop("jupytext", None)  # where the text is, is said in the text
    return notebook


def shrink(png: str) -> str:
    """A base64 PNG with at most 256 colours: photographs under labels take a third of the bytes, and look the same."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: notebooks/parity.ipynb; with MODEL, parity_NAME.ipynb right here")
    args = parser.parse_args()
    out = args.out or SOURCE.with_suffix(".ipynb")
    if os.environ.get("MODEL"):
        model = Path(os.environ["MODEL"]).expanduser().resolve()  # the kernel's working directory is another one
        os.environ["MODEL"] = str(model)
        out = args.out or Path(f"parity_{model.name}.ipynb")
    if os.environ.get("WORK"):
        os.environ["WORK"] = str(Path(os.environ["WORK"]).expanduser().resolve())

    notebook, start = read_source(), time.perf_counter()
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", record_timing=False, resources={"metadata": {"path": str(SOURCE.parent)}}
    )
    try:
        client.execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = shrink(output["data"]["image/png"])
    notebook.metadata["language_info"] = {"name": "python"}  # not the machine's version: it would change with each run
    nbformat.write(notebook, out)
    print(f"{out}: {len(notebook.cells)} cells in {time.perf_counter() - start:.0f} s, {out.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
