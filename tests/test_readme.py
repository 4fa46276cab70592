"""The README's Python examples run as printed, with the seeded checkpoint in place of a name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == 2 and all("path/or/hub-name" in example for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=["python", "vllm"])
def test_examples_run_as_printed(example, checkpoint, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example.replace("path/or/hub-name", str(checkpoint("llama31"))))
    environment = os.environ | {
        "PYTHONSAFEPATH": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
