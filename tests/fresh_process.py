"""
Scripts in a process of their own: what diffusers loads from a repository's code, a process remembers.

Each is a fork of a server that has imported the libraries, which takes seconds, and none of this repository's code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


SERVER = """
import json, os, shutil, sys, traceback

import torch, diffusers, transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPImageProcessor, CLIPModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, ViTForImageClassification


def move_to(folder):
    # The place of the folder that was named when the libraries were imported
    nowhere = os.path.dirname(os.environ["HF_HOME"])
    for names in (os.environ, *(vars(module) for module in list(sys.modules.values()))):
        for name, value in list(names.items()):
            if isinstance(value, str) and value.startswith(nowhere):
                names[name] = value.replace(nowhere, folder)


for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(request["folder"])
        shutil.rmtree("modules", ignore_errors=True)
        move_to(request["folder"])
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv, code = ["-c", *request["arguments"]], 1
        try:
            exec(compile(request["script"], "<script>", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

NOWHERE = f"{os.devnull}/fork"  # where no folder can be made

_servers: dict[str, subprocess.Popen] = {}  # by their environment; they end with this process, whose pipes they read


def run_fresh(script: str, *arguments: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """
    Runs a script in `folder`, in a process that has seen no code of this repository yet. What it fetches from the Hub
    stays in `folder/hf`; the modules that it makes of what it loads are in `folder/modules`, which is empty before.
    """
    key = json.dumps(environment, sort_keys=True)
    if key not in _servers:
        caches = {"HF_HOME": f"{NOWHERE}/hf", "HF_MODULES_CACHE": f"{NOWHERE}/modules"}
        variables = {**os.environ, **caches, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
        for name in ("PYTHONPATH", "HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            variables.pop(name, None)
        _servers[key] = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=variables,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    request = {"script": script, "arguments": [str(one) for one in arguments], "folder": str(folder)}
    server = _servers[key]
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    code = int(server.stdout.readline() or 255)  # nothing, if the server itself has ended
    outputs = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([script, *request["arguments"]], code, *outputs)


def check(process: subprocess.CompletedProcess) -> None:
    """Fails with the process's last words unless it ended well."""
    assert process.returncode == 0, process.stderr[-4000:]
