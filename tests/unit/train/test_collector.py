"""Old objects are left alone for the length of a run, and only so long."""

from __future__ import annotations

import gc
import weakref

import pytest

from tritune.train.collector import old_objects_left_alone


class Ring:
    """An object in a circle: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_circles_of_before_wait_and_those_made_since_do_not() -> None:
    old = Ring()
    seen = weakref.ref(old)
    with old_objects_left_alone():
        del old
        new = weakref.ref(Ring())
        gc.collect()
        assert seen() is not None
        assert new() is None
    gc.collect()
    assert seen() is None


def test_an_error_does_not_leave_them_frozen() -> None:
    with pytest.raises(KeyError), old_objects_left_alone():
        raise KeyError
    assert gc.get_freeze_count() == 0
