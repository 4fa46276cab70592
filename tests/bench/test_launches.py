"""What the front end asks of a CUDA device, on tensors without data: no device is mixed up, and no launch, copy or sync is added."""

import pytest
import torch

from llava_mini_fast.bench import launches
from llava_mini_fast.ops import backend
from llava_mini_fast.preprocess import views

TABLE = {
    "cold image": (487, 13, 0),
    "second question": (53, 7, 0),
    "32 second questions": (394, 100, 0),
    "15 frames": (573, 69, 0),
    "32 frames": (1623, 151, 0),
}
"""At Llama-3.1-8B's widths: launches, copies from the host, syncs. A change that lowers one lowers it here too."""


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """What "auto" takes on CUDA, whatever is installed here: its ops need not be compiled to be counted."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_default_on_cuda", lambda: "triton")


def test_no_launch_copy_or_sync_is_added():
    found = launches.situations("llama")
    assert {name: (c.launches, c.copies, c.syncs) for name, c in found.items()} == TABLE
    # every op of ours is one launch a layer, and the device's own kernels ran, not torch's for a CPU
    ours = {"rms_norm": 8, "rope": 4, "prefix_attention": 4, "swiglu": 4, "add_frames": 1}
    assert {name: found["second question"].ops[name] for name in ours} == ours


@pytest.fixture
def counted():
    """counted(run) -> the counts of run(x) for x (4, 6) on the fake device."""

    def count(run):
        with launches.fake_cuda():
            x = torch.empty(4, 6, device="cuda")
            return launches.count(lambda: run(x))

    return count


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: x * 2, (1, 0, 0)),
        (lambda x: x.view(6, 4).transpose(0, 1)[1:, None].split(1), (0, 0, 0)),
        (lambda x: torch.empty_like(x), (0, 0, 0)),
        (lambda x: x.add_(1), (1, 0, 0)),
        (lambda x: x[torch.tensor([1, 2]).to("cuda:0")], (1, 1, 0)),
        (lambda x: x[[1, 2]], (1, 1, 0)),
        (lambda x: x.copy_(torch.empty(4, 6)), (0, 1, 0)),
        (lambda x: x.cpu(), (0, 0, 1)),
        (lambda x: torch.empty(4, 6) + 1, (0, 0, 0)),
        (lambda x: x.mT.contiguous(), (1, 0, 0)),
        (lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), (1, 0, 0)),
    ],
)
def test_what_counts(counted, run, expected):
    found = counted(run)
    assert (found.launches, found.copies, found.syncs) == expected


@pytest.mark.parametrize(
    ("added", "copies"),
    [(lambda x: x * 1, 0), (lambda x: x + torch.zeros(()).to("cuda:0"), 1)],
    ids=["a launch", "a launch and a copy"],
)
def test_an_addition_shows(monkeypatch, added, copies):
    plain = launches.situations(small=True)["second question"]
    rows = launches.FusionFrontEnd._text_part

    def more(self, segments):
        for segment in segments:
            segment.job.text = added(segment.job.text)
        rows(self, segments)

    monkeypatch.setattr(launches.FusionFrontEnd, "_text_part", more)
    found = launches.situations(small=True)["second question"]
    assert found.launches == plain.launches + 1
    assert found.copies == plain.copies + copies


@pytest.mark.parametrize("mixed", ["positions", "normalize"])
def test_a_device_mix_up_is_an_error(monkeypatch, mixed):
    """Of an op of ours, whose fake looks at shapes alone, and of torch's."""
    from llava_mini_fast import fusion
    from llava_mini_fast.model import prefusion

    if mixed == "positions":
        rope = prefusion.rope
        monkeypatch.setattr(prefusion, "rope", lambda x, positions, *args, **kw: rope(x, positions.cpu(), *args, **kw))
    else:
        monkeypatch.setattr(fusion, "normalize", lambda pixels, dtype: views.normalize(pixels.cpu(), dtype))
    with pytest.raises((ValueError, RuntimeError), match="cpu"):
        launches.situations(small=True)


def test_the_command_prints_a_table(capsys):
    launches.main(["--ops", "2", "--small"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["launches", "copies", "syncs"]
    assert len(lines) == 1 + 3 * len(TABLE)
