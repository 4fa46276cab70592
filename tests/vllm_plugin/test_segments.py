"""How prompts are cut and told apart: pure functions, no vLLM."""

import random

import pytest

from llava_mini_fast.vllm_plugin.segments import check_placeholder, expand, ids_of_segment, segment_hash, spans

EOT = 9
PLACEHOLDER = -200


@pytest.mark.parametrize(
    ("ids", "num_vision", "expected"),
    [
        ([1, 2, PLACEHOLDER, 3, 4], 1, [(0, 3), (3, 5)]),
        ([1, 2, PLACEHOLDER, 3, 4], 10, [(0, 12), (12, 14)]),
        ([PLACEHOLDER, 3], 4, [(0, 4), (4, 5)]),
        ([1, PLACEHOLDER], 4, [(0, 5)]),
        ([PLACEHOLDER], 1, [(0, 1)]),
        # a turn ends with the id that ends turns; what ends turns before the media cuts nothing
        ([EOT, 1, PLACEHOLDER, 3, EOT, 4, EOT], 2, [(0, 4), (4, 6), (6, 8)]),
        ([PLACEHOLDER, EOT, 3], 2, [(0, 2), (2, 3), (3, 4)]),
        ([PLACEHOLDER, EOT, EOT], 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_spans(ids, num_vision, expected):
    assert spans(ids, ids.index(PLACEHOLDER), num_vision, {EOT}) == expected


def test_spans_cover_every_row_once_and_carry_what_they_depend_on():
    draw = random.Random(0)
    for _ in range(500):
        ids = [draw.choice([3, 4, 5, EOT]) for _ in range(draw.randrange(12))]
        ids.insert(draw.randrange(len(ids) + 1), PLACEHOLDER)
        num_vision, at = draw.randrange(1, 6), ids.index(PLACEHOLDER)
        rows = expand(ids, at, num_vision, 7)
        assert len(rows) == len(ids) - 1 + num_vision
        cuts = spans(ids, at, num_vision, (EOT,))
        assert [row for start, stop in cuts for row in range(start, stop)] == list(range(len(rows)))
        assert all(start < stop for start, stop in cuts)
        for _, stop in cuts:
            own = ids_of_segment(ids, stop, num_vision)
            assert expand(own, at, num_vision, 7) == rows[:stop]
            assert PLACEHOLDER in own and own == ids[: len(own)]
        assert ids_of_segment(ids, cuts[-1][1], num_vision) == ids


def test_no_turn_ends_is_two_segments():
    assert spans([1, PLACEHOLDER, EOT, 3], 1, 1, ()) == [(0, 2), (2, 4)]


def digest(**changes):
    known = {"model": "m", "kind": "image", "pixels": "uint8 (1, 1, 3, 336, 336)", "digests": [b"a" * 16], "start": 0}
    return segment_hash(**(known | {"ids": [5, PLACEHOLDER, 6]} | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "n"},
        {"kind": "video"},
        {"pixels": "torch.float32 (1, 1, 3, 336, 336)"},
        {"pixels": "uint8 (2, 1, 3, 336, 336)"},
        {"digests": [b"b" * 16]},
        {"digests": [b"a" * 16, b"a" * 16]},
        {"start": 1},
        {"ids": [5, PLACEHOLDER, 7]},
        {"ids": [5, PLACEHOLDER]},
        {"ids": [PLACEHOLDER, 5, 6]},
        {"ids": [5, PLACEHOLDER, 6, 0]},
        {"ids": [5, PLACEHOLDER, 6 + 2**32]},
    ],
)
def test_everything_that_matters_is_in_the_hash(changes):
    assert digest(**changes) != digest()


def test_equal_input_has_equal_hash():
    assert digest() == digest(ids=(5, PLACEHOLDER, 6)) == digest(digests=(b"a" * 16,))
    assert len(digest()) == 32


def test_order_of_frames_is_in_the_hash():
    assert digest(digests=[b"a" * 16, b"b" * 16]) != digest(digests=[b"b" * 16, b"a" * 16])


def test_parts_do_not_run_into_one_another():
    assert digest(model="ab", kind="c") != digest(model="a", kind="bc")


def test_the_stand_in_as_an_ordinary_id():
    """[-200, R] and [R, -200] expand to the same ids, with R the stand-in: the hash sees them before."""
    stand_in = 7
    first, second = [PLACEHOLDER, stand_in], [stand_in, PLACEHOLDER]
    assert expand(first, 0, 1, stand_in) == expand(second, 1, 1, stand_in)
    assert digest(ids=first) != digest(ids=second)


def test_placeholder_and_media_belong_together():
    check_placeholder(0, has_media=True)
    check_placeholder(None, has_media=False)
    with pytest.raises(ValueError, match="no <image> placeholder for it"):
        check_placeholder(None, has_media=True)
    with pytest.raises(ValueError, match="no image or video was given for it"):
        check_placeholder(3, has_media=False)
