"""What importing and registering does, and what it must not do. vLLM itself runs in child processes alone."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from llava_mini_fast.vllm_plugin import shadowed_triton_kernels

ROOT = Path(__file__).parents[2]


def python(*arguments, safe=True, folder=ROOT):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"} | ({"PYTHONSAFEPATH": "1"} if safe else {})
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, check=True, capture_output=True, text=True
    )


def imported(statement):
    """Names of the modules that a statement imports, by `-X importtime`."""
    report = python("-X", "importtime", "-c", statement).stderr
    return {line.rpartition("|")[2].strip() for line in report.splitlines() if line.startswith("import time:")}


def test_importing_the_package_is_light():
    names = imported("import llava_mini_fast")
    assert "llava_mini_fast.media" in names
    assert {name.split(".")[0] for name in names}.isdisjoint({"vllm", "triton", "transformers", "torch"})


def test_importing_the_plugin_imports_no_vllm():
    names = imported("import llava_mini_fast.vllm_plugin")
    assert "llava_mini_fast.vllm_plugin.segments" in names
    assert {name.split(".")[0] for name in names}.isdisjoint({"vllm", "triton"})
    assert not [name for name in names if name.startswith("transformers.models")]


def test_vllm_finds_no_triton_kernels_of_ours():
    """In the repository's root, where `python -c` without PYTHONSAFEPATH would find them."""
    code = """
import importlib.util, json
from vllm.plugins import load_general_plugins
from vllm.utils.import_utils import has_triton_kernels
load_general_plugins()
found = importlib.util.find_spec("triton_kernels")
print(json.dumps({"has": has_triton_kernels(), "where": found and found.origin}))
"""
    found = json.loads(python("-c", code).stdout.splitlines()[-1])
    theirs = find_spec("triton_kernels")
    assert found["has"] == (theirs is not None)
    assert found["where"] is None or not Path(found["where"]).is_relative_to(ROOT / "triton_kernels")


def test_our_triton_kernels_on_the_path_are_found_and_warned_of():
    """The control: without PYTHONSAFEPATH, the name is ours."""
    code = "from llava_mini_fast.vllm_plugin import shadowed_triton_kernels; print(shadowed_triton_kernels())"
    found = 'import importlib.util; print(importlib.util.find_spec("triton_kernels").origin)'
    where, warning = python("-c", f"{found}; {code}", safe=False).stdout.splitlines()
    assert Path(where) == ROOT / "triton_kernels" / "__init__.py"
    assert [warning] == shadowed(ROOT)
    assert python("-c", code).stdout.strip() == "None"


def test_only_our_own_folder_is_warned_of(monkeypatch, tmp_path):
    theirs = tmp_path / "theirs" / "triton_kernels"
    ours = tmp_path / "ours" / "triton_kernels"
    for folder in (theirs, ours):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (ours.parent / "llava_mini_fast").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(theirs.parent), str(ours.parent)])
    assert shadowed_triton_kernels() is None  # OpenAI's comes first
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ours.parent), str(theirs.parent)])
    assert str(ours.parent) in shadowed_triton_kernels()
    monkeypatch.chdir(ours.parent)
    monkeypatch.setattr(sys, "path", [""])
    assert str(ours.parent) in shadowed_triton_kernels()


def test_registering_warns_and_registers_twice(v1, checkpoint):
    """In a process that runs an engine: registered by the entry point, once more by hand, and with the path spoilt."""
    v1.start(checkpoint("llama31"))
    assert v1.call("register", str(ROOT)) == shadowed(ROOT)
    assert v1.call("register", None) == []


def shadowed(root):
    return [
        f"{root} is on sys.path, so vLLM would import this project's triton_kernels as OpenAI's; "
        "run from another directory or set PYTHONSAFEPATH=1."
    ]
