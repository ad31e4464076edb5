"""Scripts in a process of their own: what diffusers loads from a repository's code, a process remembers."""

import os
import subprocess
import sys
from pathlib import Path


def run_fresh(script: str, *arguments: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """
    Runs a script in `folder`, in a process that has seen no code of this repository yet. What it fetches from the Hub
    stays in `folder/hf`; the modules that it makes of what it loads are in a new folder each time.
    """
    variables = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    variables["HF_MODULES_CACHE"] = str(folder / f"modules_{len(list(folder.glob('modules_*')))}")
    variables.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True)


def check(process: subprocess.CompletedProcess) -> None:
    """Fails with the process's last words unless it ended well."""
    assert process.returncode == 0, process.stderr[-4000:]
