"""Every kernel compiles for machines that are not here, without spills, with the instructions its design counts on."""

import os
from pathlib import Path

import pytest
import torch

from llava_mini_fast.triton_kernels import OPS, compiled, launch
from llava_mini_fast.triton_kernels.compiled import (
    ALLOWED,
    ARCHITECTURES,
    CASES,
    DTYPES,
    SHARED_LIMIT,
    VERSION,
    Case,
    Compiled,
    compile_case,
    occupancy,
    problems,
    spills_in_loops,
    table,
    write,
)

OUT = Path(os.environ.get("LLAVA_MINI_TEST_OUT", "/tmp"))


def gate(cases, dtypes, archs, name):
    rows, wrong = [], []
    for case in cases:
        for dtype in dtypes:
            for arch in archs:
                made = compile_case(case, dtype, arch)
                assert made, f"{case.op} launched nothing"
                rows += made
                wrong += [text for one in made for text in problems(case, one)]
    print(table(rows))
    write(rows, OUT / name)
    assert not wrong, "\n".join(wrong)
    return rows


@pytest.mark.parametrize("arch", ARCHITECTURES[:2])
def test_one_case_a_kernel_and_dtype(arch):
    quick = [case for case in CASES if case.quick]
    assert {case.op for case in quick} | {"causal_attention"} == set(
        OPS
    )  # causal attention is prefix attention's kernel
    gate(quick, DTYPES, [arch], f"triton-compiled-sm{arch}.json")


@pytest.mark.slow
@pytest.mark.timeout(1700)
def test_every_case():
    rows = gate(CASES, DTYPES, ARCHITECTURES, f"triton-compiled-{VERSION}.json")
    spilling = {(row.case, row.dtype, row.arch) for row in rows if row.spills or row.stack}
    assert spilling == ALLOWED.get(VERSION, frozenset()), "what is allowed and spills no more must leave the list"


def binary(**changes):
    good = dict(
        kernel="prefix_attention_kernel", case="", dtype="bfloat16", arch=90, warps=4, registers=100, stack=0,
        shared=1000, occupancy=0.5, spills=0, spills_in_loops=0, tensor_cores=8, async_copies=8,
    )  # fmt: skip
    return Compiled(**good | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"spills": 2}, "spills: 2"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": SHARED_LIMIT[90] + 1}, "the limit is 232448"),
        ({"tensor_cores": 0}, "no tensor core"),
        ({"tensor_cores": 0, "dtype": "float32"}, None),
        ({"async_copies": 0}, "not pipelined"),
    ],
)
def test_the_gate_can_say_no(changes, words):
    case = Case("prefix_attention", "", None, tensor_cores=True, async_copies=True)
    said = problems(case, binary(**changes))
    assert (said == []) if words is None else (len(said) == 1 and words in said[0])


def test_what_is_allowed_may_spill_outside_loops_alone(monkeypatch):
    case = Case("prefix_attention", "", None)
    spilling = {"spills": 4, "stack": 8}
    monkeypatch.setattr(compiled, "ALLOWED", {VERSION: {("", "bfloat16", 90)}})
    assert problems(case, binary(**spilling)) == []
    (said,) = problems(case, binary(**spilling, spills_in_loops=1))
    assert "1 of them in loops" in said
    assert problems(case, binary(**spilling, arch=80)) and problems(case, binary(**spilling, dtype="float16"))
    monkeypatch.setattr(compiled, "ALLOWED", {"2.0": {("", "bfloat16", 90)}})
    assert problems(case, binary(**spilling))


def test_spills_are_counted_in_loops():
    code = "\n".join([
        "  STL [R1], R2 ;", ".L_x_0:", "  LDL R2, [R1] ;", "  @P0 BRA `(.L_x_1) ;", "  STL.64 [R1], R4 ;",
        "  @!P1 BRA `(.L_x_0) ;", ".L_x_1:", "  LDL.LU R2, [R1] ;",
    ])  # fmt: skip
    assert spills_in_loops(code) == 2


def test_occupancy_by_each_limit():
    assert occupancy(warps=8, registers=32, shared=0, arch=90) == 1.0
    assert occupancy(warps=8, registers=255, shared=0, arch=90) == 8 / 64
    assert occupancy(warps=4, registers=32, shared=100_000, arch=90) == 2 * 4 / 64
    assert occupancy(warps=1, registers=32, shared=0, arch=80) == 32 / 64


def test_a_spilling_tile_is_caught(monkeypatch):
    """A tile that is too large for the registers, through the table that tuning writes: the gate has to see it."""
    case = next(case for case in CASES if case.op == "prefix_attention" and case.quick)
    name = launch.key("prefix_attention", launch.NO_CARD, torch.bfloat16, packed=256, head_dim=128)
    monkeypatch.setitem(launch.TABLE, name, {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4})
    (made,) = compile_case(case, torch.bfloat16, 80)
    assert made.spills_in_loops and any("spills" in text for text in problems(case, made))
