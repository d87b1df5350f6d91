"""Streams of work: order, bounds, errors, and batches."""

import threading
import time

import pytest

from faceprior.streams import in_background, in_groups


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3 == 0))  # every third overtakes no one only if the order is kept
    return number**2


@pytest.mark.parametrize("num_workers", [0, 1, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_results_come_in_order(num_workers, count):
    assert list(in_background(slow_square, range(count), num_workers, 5)) == [n**2 for n in range(count)]


def test_no_more_is_drawn_ahead_than_allowed():
    """Before result n is taken, items up to n + ahead - 1 are drawn, in this thread."""
    drawn = []

    def items():
        for number in range(10):
            assert threading.current_thread() is threading.main_thread()
            drawn.append(number)
            yield number

    results = in_background(lambda number: number, items(), 2, ahead=3)
    assert not drawn  # nothing begins before it is asked for
    for number in range(10):
        assert next(results) == number
        assert len(drawn) == min(number + 3, 10)


def test_the_function_runs_beside_the_caller():
    """The worker for item 1 waits until the caller is back at work on result 0: alone, neither would go on."""
    caller_works = threading.Event()

    def wait(number: int) -> bool:
        return number == 0 or caller_works.wait(600)

    results = in_background(wait, range(3), 2, ahead=2)
    assert next(results)
    caller_works.set()
    assert list(results) == [True, True]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_surfaces_where_its_result_would_have_come(num_workers):
    begun = []

    def fail_at_3(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise OSError("no space left on device")
        return number

    results = in_background(fail_at_3, range(100), num_workers, ahead=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no space left"):
        next(results)
    assert max(begun) <= 4  # what was not begun never is


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_items_surfaces(num_workers):
    def items():
        yield 1
        raise RuntimeError("the network overflowed")

    with pytest.raises(RuntimeError, match="overflowed"):
        list(in_background(slow_square, items(), num_workers, 4))


def test_no_thread_is_left_behind():
    before = threading.active_count()
    results = in_background(slow_square, range(50), 3, 4)
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before


def test_groups_fill_up():
    """Even numbers by three, odd ones by two: as soon as a group is full, and what is left in the end."""
    groups = in_groups(range(9), lambda number: number % 2, lambda odd: 2 if odd else 3)
    assert list(groups) == [[1, 3], [0, 2, 4], [5, 7], [6, 8]]
    assert list(in_groups([], len, len)) == []


def test_a_full_group_does_not_wait_for_the_end():
    def items():
        yield from (1, 1)
        raise AssertionError("drawn too far")

    assert next(in_groups(items(), lambda number: number, lambda _: 2)) == [1, 1]
