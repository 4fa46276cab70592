"""Decoding ahead: order, bounds, errors, and a reader that leaves."""

import threading
import time

import pytest

from llava_mini_fast.preprocess.prefetch import prefetch


def test_order_and_bound():
    made = []

    def source():
        for i in range(50):
            made.append(i)
            yield i

    for seen, item in enumerate(prefetch(source(), depth=3)):
        assert item == seen
        assert len(made) <= seen + 1 + 3 + 2  # the queue, one in hand and one being made


def test_an_error_comes_where_its_item_would():
    def source():
        yield 1
        raise ValueError("damaged")

    reader = prefetch(source(), depth=4)
    assert next(reader) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(reader)


def test_a_reader_that_leaves_stops_the_thread():
    reader = prefetch(iter(int, 1), depth=2)  # endless
    next(reader)
    reader.close()
    deadline = time.monotonic() + 5
    while any(t.name == "llava-mini-prefetch" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
