"""Every op of both backends on the device: against the law at the interpreter's shapes, as a CUDA graph, and under torch.compile."""

from functools import partial

import checks
import pytest
import torch
from cases import CASES
from checks import DTYPES

from llava_mini_fast.bench.baselines import PUBLIC

pytestmark = pytest.mark.gpu
backends = pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
OPS = list(dict.fromkeys(case.op for case in CASES))


@dtypes
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
@backends
def test_obeys_the_law(backend, kernels, cuda_device, case, dtype):
    getattr(checks, case.op)(kernels[case.op], dtype, **case.shape, device=cuda_device)


@dtypes
@pytest.mark.parametrize("op", checks.STRIDED)
@backends
def test_public_functions_take_views_whose_last_dimension_is_strided(backend, kernels, cuda_device, op, dtype):
    checks.strided_views(partial(PUBLIC[op], backend=backend), op, dtype, device=cuda_device)
    assert kernels.asked == {op}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@backends
def test_a_mean_of_four_deviations_cancels(backend, kernels, cuda_device, dtype):
    checks.far_from_zero(kernels["compressor_attention"], dtype, device=cuda_device)


@dtypes
@pytest.mark.parametrize("op", OPS)
@backends
def test_a_graph_gives_the_same_bits(backend, kernels, cuda_device, op, dtype):
    getattr(checks, op)(replayed(kernels[op]), dtype, device=cuda_device)


@pytest.mark.parametrize("op", OPS)
@backends
def test_compiles_as_one_graph(backend, kernels, cuda_device, op):
    torch.compiler.reset()
    run = kernels[op]
    compiled = torch.compile(lambda *args: run(*args), fullgraph=True, backend="aot_eager")
    getattr(checks, op)(compiled, torch.bfloat16, device=cuda_device)


@pytest.mark.parametrize("op", OPS)
@backends
def test_torch_knows_the_op(backend, kernels, cuda_device, op):
    """Its schema says what it writes to, and its fake gives what it gives, on this device."""

    def run(*args):
        torch.library.opcheck(kernels[op], args, test_utils=("test_schema", "test_faketensor"))
        return kernels[op](*args)

    getattr(checks, op)(run, torch.bfloat16, device=cuda_device)


def replayed(run):
    """The op as a captured CUDA graph, whose replay must give the bits of a plain run."""

    def call(*args):
        given = [x for x in args if torch.is_tensor(x)]
        before = [x.clone() for x in given]
        plain = [
            x.clone() for x in (*checks.together(run(*args)), *given)
        ]  # compiles, too; add_frames writes into `given`
        _refill(given, before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(*args)
        results = checks.together(captured)
        for x in results:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for result, expected in zip((*results, *given), plain, strict=True):
            assert torch.equal(result, expected)
        return captured

    return call


def _refill(tensors, values):
    for x, value in zip(tensors, values):
        x.copy_(value)
