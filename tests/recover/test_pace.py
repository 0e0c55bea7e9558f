from __future__ import annotations

import pytest

from autocompress.recover.pace import Pace


def test_nothing_is_known_before_any_training() -> None:
    pace = Pace()
    assert pace.seconds("recover", 100, 10) is None
    assert pace.seconds("recover", 100, 0) == 0
    pace.note("recover", 100, 0, 1.0)
    pace.note("recover", 100, 5, 0.0)
    assert pace.seconds("recover", 100, 10) is None


def test_seconds_grow_with_macs_and_steps() -> None:
    pace = Pace()
    pace.note("recover", 100, 10, 2.0)
    assert pace.seconds("recover", 100, 10) == pytest.approx(2)
    assert pace.seconds("recover", 300, 20) == pytest.approx(12)


def test_the_nearest_training_of_its_kind_is_taken_and_the_last_of_equals() -> None:
    pace = Pace()
    pace.note("recover", 100, 10, 2.0)
    pace.note("recover", 1000, 10, 5.0)
    pace.note("qat", 200, 10, 40.0)
    assert pace.seconds("recover", 200, 10) == pytest.approx(4)
    assert pace.seconds("recover", 500, 10) == pytest.approx(2.5)
    assert pace.seconds("qat", 1000, 10) == pytest.approx(200)
    assert pace.seconds("tune_codebooks", 1000, 10) == pytest.approx(5)
    pace.note("recover", 100, 10, 3.0)
    assert pace.seconds("recover", 200, 10) == pytest.approx(6)
