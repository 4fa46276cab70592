"""`llava-mini bench kernels` at small shapes on the CPU: what is counted is right, what is red gives no number."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from llava_mini_fast import ops
from llava_mini_fast.bench import baselines, ceilings, kernels, report, shapes, tune
from llava_mini_fast.bench.judge import Judge
from llava_mini_fast.bench.timing import Timing
from llava_mini_fast.cli import app

SMALL = shapes.SMALL
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def small(monkeypatch):
    """Small shapes in place of the registry's, and little of everything else."""
    monkeypatch.setattr(shapes, "SHAPES", SMALL)
    monkeypatch.setattr(kernels, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(ceilings, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(ceilings, "GEMM", {"cpu": (64, 64, 64)})
    monkeypatch.setitem(kernels.LEAST, "cpu", 1e-5)


def entry(op, name):
    (found,) = (shape for shape in shapes.SHAPES if (shape.op, shape.name) == (op, name))
    return found


def public_ops():
    """Functions of ops/*.py that run on a backend, read from the source."""
    for path in Path(ops.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            arguments = [a.arg for a in node.args.kwonlyargs] if isinstance(node, ast.FunctionDef) else []
            if "backend" in arguments:
                yield node.name


def test_every_op_is_registered():
    assert set(shapes.OPS) == set(baselines.PUBLIC) == set(baselines.PUBLISHED) == set(public_ops())
    assert set(tune.CHOICES) == set(shapes.OPS)
    pairs = [(shape.op, shape.name) for shape in shapes.SHAPES]
    assert len(pairs) == len(set(pairs))


def test_bytes_and_flops_by_hand():
    norm = entry("rms_norm", "text60")
    assert norm.bytes(torch.bfloat16) == 2 * (4 * 60 * 4096 + 4096)
    assert norm.bytes(torch.float32) == 2 * norm.bytes(torch.bfloat16)
    pooled = entry("compressor_attention", "image-q1")
    assert pooled.flops == 4 * 8 * 576 * 1024
    assert pooled.bytes(torch.float16) == 2 * 576 * 1024 + 4 * (8 * 1024 + 8 * 576 + 8 * 1024)
    last = entry("causal_attention", "image-last-layer-llama")
    assert last.flops == 4 * 577 * 32 * 128
    assert last.bytes(torch.bfloat16) == 2 * 128 * 2 * (32 + 577 * 8)
    text = entry("prefix_attention", "text60-vicuna")
    assert text.flops == 4 * 32 * 128 * (60 * 577 + 60 * 61 // 2)
    asked = entry("prefix_attention", "second-questions8-llama")  # eight read one frame, which counts once
    assert asked.elements == 128 * 2 * (480 * 32 + 480 * 8 + 577 * 8)
    assert entry("swiglu", "text20-llama").elements == 20 * 3 * 14336
    frames = entry("add_frames", "video8-text60")
    assert frames.bytes(torch.bfloat16) == 8 * 60 * 4096 * 2 + 2 * 60 * 4096 * 4 + 60 * 8 + 8 * 4


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: f"{shape.op}-{shape.name}")
def test_inputs_are_what_the_bytes_count(shape):
    first, second = shape.make(torch.bfloat16), shapes.copied(shape.make(torch.bfloat16), torch.device("cpu"))
    result = baselines.call(shape.op, second, "torch")
    moved = [x for x in first.values() if isinstance(x, torch.Tensor)]
    moved += [first["total"]] if shape.op == "add_frames" else result if isinstance(result, tuple) else [result]
    if "segments" in first:
        moved += [first["segments"].starts, first["segments"].slots]
    assert sum(x.numel() * x.element_size() for x in moved) == shape.bytes(torch.bfloat16)
    if "prefix_k" in second:
        assert not second["prefix_k"].is_contiguous() and second["prefix_k"].stride(-1) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: f"{shape.op}-{shape.name}")
def test_ops_pass_and_baselines_compute_the_same(shape, dtype):
    judge = Judge(shape.op, shape.make(dtype), dtype)
    assert judge.red(lambda inputs: baselines.call(shape.op, inputs, "torch")) is None
    assert judge.differs("published", lambda inputs: baselines.PUBLISHED[shape.op](**inputs)) is None
    sdpa = baselines.LIBRARIES["sdpa"].get(shape.op)
    assert sdpa is None or judge.differs("sdpa", lambda inputs: sdpa(**inputs)) is None


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: f"{shape.op}-{shape.name}")
def test_wrong_results_are_red(shape):
    judge = Judge(shape.op, shape.make(torch.float32), torch.float32)

    def spoilt(change):
        def run(inputs):
            result = baselines.call(shape.op, inputs, "torch")
            changed = inputs["total"] if result is None else result[0] if isinstance(result, tuple) else result
            change(changed[-1])
            return result

        return run

    assert "above the law's bound" in judge.red(spoilt(lambda x: x.mul_(1.001).add_(1e-3)))
    assert judge.red(spoilt(lambda x: x.fill_(torch.nan)))
    assert judge.differs("published", spoilt(lambda x: x.add_(100))) if shape.op != "compressor_attention" else True


def test_arithmetic():
    others = {"a": Timing((2.0, 4.0, 6.0)), "b": Timing((1.0,))}
    assert kernels.ratios(others, Timing((2.0,))) == {"a": 2.0, "b": 0.5}
    ceiling = ceilings.Ceilings(copy_bytes_per_s=100.0, gemm_flops_per_s=1000.0)
    assert ceiling.seconds(50, 100) == 0.5 and ceiling.bound(50, 100) == "memory"
    assert ceiling.seconds(1, 2000) == 2.0 and ceiling.bound(1, 2000) == "compute"
    assert [kernels.rotation(moved, 100) for moved in (300, 200, 150, 10)] == [1, 1, 2, 20]
    assert [kernels.round_count(cost, 7, 1.0) for cost in (0.01, 0.3, 5.0)] == [7, 3, 1]


def test_selecting_takes_parts_of_names():
    assert [s.name for s in shapes.select(["prefix_attention"], ["text20"])] == ["text20-vicuna", "text20-llama"]
    assert {s.op for s in shapes.select([], ["text2000"])} == {"prefix_attention", "rms_norm", "rope", "swiglu"}
    with pytest.raises(ValueError, match="--op must be one of"):
        shapes.select(["softmax"])
    with pytest.raises(ValueError, match="--shape 'text2' is no shape's name"):
        shapes.select([], ["text2"])


def test_command_end_to_end(small, tmp_path):
    paths = {name: tmp_path / f"result.{name}" for name in ("json", "markdown", "plot")}
    asked = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    result = CliRunner().invoke(
        app,
        ["bench", "kernels", "--device", "cpu", "--rounds", "2", "--dtype", "float32", "--dtype", "bfloat16", *asked],
    )
    assert result.exit_code == 0, result.output
    stored = json.loads(paths["json"].read_text())
    assert {row["op"] for row in stored["rows"]} == set(shapes.OPS)
    assert len(stored["rows"]) == 2 * len(SMALL) and set(stored["ceilings"]) == {"float32", "bfloat16"}
    for row in stored["rows"]:
        assert row["state"] == "ok" and row["median_s"] > 0 and row["ceiling_share"] > 0
        assert row["baselines"]["published"]["ratio"] > 0
        assert ("sdpa" in row["baselines"]) == row["op"].endswith(("causal_attention", "prefix_attention"))
    assert stored["machine"]["torch"] and stored["machine"]["device"] == "cpu"
    text = paths["markdown"].read_text()
    assert text.count("\n| ") == 1 + len(stored["rows"]) and "| v published | v sdpa |" in text
    bars = ElementTree.fromstring(paths["plot"].read_text()).findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + len(stored["rows"])
    assert all(shape.name in result.stdout for shape in SMALL)


def test_a_red_row_has_no_number(small, monkeypatch, tmp_path):
    monkeypatch.setitem(baselines.PUBLIC, "swiglu", lambda gate_up, backend: gate_up.chunk(2, dim=1)[0] * 1.01)
    path = tmp_path / "result.json"
    arguments = ["--device", "cpu", "--op", "swiglu", "--op", "rope", "--rounds", "1", "--json", str(path)]
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith("red, so without numbers: swiglu small float32 by torch: swiglu, result 0: error")
    rope, swiglu = json.loads(path.read_text())["rows"]
    assert rope["state"] == "ok" and "median_s" in rope
    assert swiglu["state"] == "red" and not {"median_s", "seconds", "gb_per_s", "baselines"} & set(swiglu)


def test_kernels_and_baselines_that_fail_do_not_end_the_run(small, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of resources")

    monkeypatch.setitem(baselines.LIBRARIES["sdpa"], "causal_attention", fails)
    monkeypatch.setitem(baselines.PUBLIC, "swiglu", fails)
    result = kernels.run(kernels.Options(ops=["causal_attention", "swiglu"], rounds=1))
    assert [row["state"] for row in result["rows"]] == ["ok", "ok", "red"]
    assert "sdpa: it failed: out of resources" in result["rows"][0]["notes"]
    assert kernels.red(result) == ["swiglu small float32 by torch: swiglu failed: out of resources"]


def test_torch_compile_is_a_baseline_where_asked_for(small):
    (row,) = kernels.run(kernels.Options(ops=["swiglu"], rounds=1, compile=True))["rows"]
    assert "torch.compile" in row["baselines"] or any(
        note.startswith("torch.compile: it failed") for note in row["notes"]
    )


def test_what_is_left_out_is_in_the_table(small, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_BYTES", 2000)
    result = CliRunner().invoke(app, ["bench", "kernels", "--device", "cpu", "--op", "swiglu", "--rounds", "1"])
    assert result.exit_code == 0 and "left out: too long for a CPU" in result.stdout
    named = kernels.run(kernels.Options(ops=["swiglu"], shapes=["small"], rounds=1))
    assert named["rows"][0]["state"] == "ok"


def test_a_kernel_that_refuses_a_shape_is_left_out(small, monkeypatch):
    refusing = type(
        "Kernels", (), {"unsupported": staticmethod(lambda op, dtype, **shape: f"no {op} {shape}"), "OPS": {}}
    )
    monkeypatch.setattr(kernels.backends, "unavailable", lambda name, device: None)
    monkeypatch.setattr(kernels.backends, "_kernels", lambda name: refusing)
    rows = kernels.run(kernels.Options(backends=["triton", "torch"], rounds=1))["rows"]
    assert [row["state"] for row in rows] == ["left out", "ok"] * len(SMALL)
    assert rows[2]["why"] == "no causal_attention {'queries': 9, 'keys': 9, 'head_dim': 32, 'group': 2}"
    assert "torch eager" in rows[1]["baselines"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "softmax"], "--op must be one of compressor_attention"),
        (["--shape", "giant"], "--shape 'giant' is no shape's name"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--backend", "cudnn"], "--backend must be one of torch, triton"),
        (["--backend", "cuda"], "--backend cuda can't run on cpu"),
    ],
)
def test_what_there_is_not_is_a_sentence(arguments, words):
    result = CliRunner().invoke(app, ["bench", "kernels", "--device", "cpu", *arguments])
    assert result.exit_code == 1 and words in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_cuda_is_a_sentence():
    result = CliRunner().invoke(app, ["bench", "kernels", "--device", "cuda"])
    assert result.exit_code == 1 and "torch finds no CUDA device here" in result.stderr
    with pytest.raises(SystemExit, match="tuning needs a CUDA device"):
        tune.main([])


def test_list_runs_nothing():
    result = CliRunner().invoke(app, ["bench", "kernels", "--list", "--op", "add_frames"])
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 3
    assert "video32-text500" in result.stdout


def test_tuning_keeps_what_is_clearly_faster():
    assert tune.best({0: [0.9, 0.9], 1: [0.5, 1.25], 2: [1.0, 1.0]}, [1.0, 1.0]) == (1, pytest.approx(1.6**0.5))
    assert tune.best({0: [0.99, 0.99]}, [1.0, 1.0]) == (None, pytest.approx(1 / 0.99))
    assert tune.best({}, [1.0]) == (None, 1.0)
    assert len(list(tune.candidates("swiglu"))) == 12


def test_the_tuned_table_is_written_as_launch_reads_it(tmp_path):
    table = {
        "swiglu nvidia-h200 bfloat16 width=14336": {"BLOCK": 1024},
        "rope nvidia-h200 bfloat16 head_dim=128": {"num_warps": 2},
    }
    tune.write(tmp_path / "tuned.json", table)
    assert json.loads((tmp_path / "tuned.json").read_text()) == table
    tune.write(tmp_path / "tuned.json", {})
    assert json.loads((tmp_path / "tuned.json").read_text()) == {}


def test_choices_are_settings_that_the_kernels_have():
    """In a child process: whether Triton compiles or interprets is decided where its kernels are first imported."""
    pytest.importorskip("triton")
    code = """
import importlib, inspect, torch
from llava_mini_fast.bench.tune import CHOICES
files = {"add_frames": "frame_mean", "causal_attention": "prefix_attention"}
for op, choices in CHOICES.items():
    config = importlib.import_module(f"llava_mini_fast.triton_kernels.{files.get(op, op)}").config
    given = {name: torch.bfloat16 if name == "dtype" else 80 if name == "arch" else 64 for name in inspect.signature(config).parameters}
    assert set(choices) <= set(config(**given)), (op, config(**given))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)


def test_durations_read_well():
    assert report.duration(0.0123) == "12.30 ms" and report.duration(12.3e-6) == "12.3 us"


def test_tuning_measures_every_choice_that_works():
    """Under Triton's interpreter, where times mean nothing: a row is found, its choices run, wrong ones are dropped."""
    pytest.importorskip("triton")
    code = """
import torch
from llava_mini_fast.bench import shapes, tune
from llava_mini_fast.triton_kernels import launch
tuner = tune.Tuner(launch, torch.float32, "cpu")
tune.cache_bytes = lambda device: 1
tune.ROUNDS = tune.CALLS = 1
tune.CHOICES["swiglu"] = {"BLOCK": (16, 32, 48), "num_warps": (1,)}
((key, found),) = tuner.keys([shapes.swiglu("a", 32, 2), shapes.swiglu("b", 32, 3)]).items()
assert key == "swiglu interpreter float32 width=32" and [shape.name for shape in found] == ["a", "b"]
seen = []
tune.best = lambda seconds, own: seen.append((sorted(seconds), len(own))) or (1, 1.5)
assert tuner.row(key, found) == ({"BLOCK": 32, "num_warps": 1}, 1.5)
assert seen == [([0, 1], 2)], seen  # 48 is no power of 2: the kernel refuses it
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, env=os.environ | {"TRITON_INTERPRET": "1"}, text=True
    )
