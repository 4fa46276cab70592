"""The repaired interpreter and the checker themselves: a tool that judges kernels has to be able to say no."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from llava_mini_fast.triton_kernels.interpreted import watch


@triton.jit
def arithmetic(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at, mask=at < n, other=0.0), tl.load(y + at, mask=at < n, other=0.0)
    value = tl.where(a > b, a * b + a, (a.to(tl.float32) / 3).to(tl.bfloat16) - b)
    tl.store(out + at, value, mask=at < n)


@triton.jit
def product(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = (tl.load(x + at[:, None] * BLOCK + at[None, :]), tl.load(y + at[:, None] * BLOCK + at[None, :]))
    tl.store(out + at[:, None] * BLOCK + at[None, :], tl.dot(a, b).to(tl.bfloat16))


def test_bfloat16_arithmetic_is_torchs():
    x, y = (torch.randn(100, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (1, 2))
    out = torch.empty_like(x)
    arithmetic[(1,)](x, y, out, 100, BLOCK=128)
    assert torch.equal(out, torch.where(x > y, x * y + x, (x.float() / 3).bfloat16() - y))


def test_bfloat16_products_are_summed_in_float32():
    x, y = (torch.randn(64, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (1, 2))
    out = torch.empty_like(x)
    product[(1,)](x, y, out, BLOCK=64)
    assert (out.float() - x.float() @ y.float()).abs().max() < 0.1


def test_autotuned_kernels_run():
    @triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])
    @triton.jit
    def copy(x, out, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)

    x = torch.arange(300.0)
    out = torch.empty_like(x)
    copy[lambda meta: (triton.cdiv(300, meta["BLOCK"]),)](x, out, 300)
    assert torch.equal(out, x)


@triton.jit
def sum_up(x, out, n, ATOMIC: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + at, mask=at < n, other=0.0) if MASK else tl.load(x + at), 0)
    if ATOMIC:
        tl.atomic_add(out, total)
    else:
        tl.store(out, tl.load(out) + total)


@triton.jit
def shift(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at + 1, mask=at + 1 < n, other=0.0), mask=at < n)


@triton.jit
def clash(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK) // 2, tl.zeros((BLOCK,), tl.float32))


def test_atomics_are_no_race_and_are_counted():
    x, out = torch.ones(250), torch.zeros(1)
    with watch(x=x, out=out) as seen:
        sum_up[(4,)](x, out, 250, ATOMIC=True, MASK=True, BLOCK=64)
    assert out.item() == 250 and seen.stores["out"].tolist() == [4] and (seen.loads["x"] == 1).all()


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (lambda x, out: sum_up[(4,)](x, out, 250, ATOMIC=False, MASK=True, BLOCK=64), "stored by several programs"),
        (lambda x, out: shift[(4,)](x, 250, BLOCK=64), "reads what another program writes"),
        (lambda x, out: clash[(1,)](x, BLOCK=64), "two lanes"),
    ],
)
def test_races_are_seen(launch, words):
    x, out = torch.ones(250), torch.zeros(1)
    with pytest.raises(AssertionError, match=words), watch(x=x, out=out):
        launch(x, out)


def test_unmasked_loads_are_bounded_too():
    x, out = torch.ones(250), torch.zeros(1)
    with pytest.raises(InterpreterError, match="6 lanes of program"), watch(x=x, out=out):
        sum_up[(4,)](x, out, 250, ATOMIC=True, MASK=False, BLOCK=64)


def test_tensors_that_were_not_named_are_out_of_bounds():
    x, out = torch.ones(250), torch.zeros(1)
    with pytest.raises(InterpreterError, match="atomic: 1 lanes"), watch(x=x):
        sum_up[(4,)](x, out, 250, ATOMIC=True, MASK=True, BLOCK=64)


def test_programs_run_in_a_shuffled_order():
    @triton.jit
    def note(out):
        tl.store(out + tl.program_id(0), tl.atomic_add(out + 50, 1))

    orders = []
    for seed in (1, 2):
        out = torch.zeros(51, dtype=torch.int32)
        with watch(seed, out=out):
            note[(50,)](out)
        orders.append(out[:50].tolist())
    assert sorted(orders[0]) == list(range(50)) and orders[0] != orders[1] != list(range(50))
