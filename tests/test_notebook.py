"""The notebook of experiments/ runs from its first cell to its last."""

import os
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "from_text_to_chat.ipynb"


@pytest.mark.slow
def test_from_text_to_chat(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # where gptjax is
    monkeypatch.delenv("XLA_FLAGS")  # the processors and the compiler as a reader has them
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if output)
    assert "done; best validation loss" in outputs and "bits_per_byte" in outputs
    assert "What does json.dumps do? ->" in outputs
    assert "error:" not in outputs
