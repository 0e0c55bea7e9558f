from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from autocompress.errors import RunFolderError
from autocompress.report.columns import COLUMNS, front_rows, read_device, read_front, typed_front


def test_a_front_survives_the_disk(run: Path, front: pd.DataFrame) -> None:
    read = read_front(run)
    assert tuple(read.columns) == COLUMNS
    assert read["on_front"].dtype == np.bool_ and read["latency_ms"].dtype == np.float64
    pd.testing.assert_frame_equal(read, typed_front(front))
    assert read.loc[0, "plan_hash"] == ""


def test_names_stay_texts(run: Path, front: pd.DataFrame) -> None:
    front["candidate"] = ["0012", "NA", "null", "1e3", "True", "a,b", 'a"b', "[red]"]
    front.to_csv(run / "front.csv", index=False)
    assert read_front(run)["candidate"].tolist() == front["candidate"].tolist()


def test_rows_are_valid_json(front: pd.DataFrame) -> None:
    front.loc[3, ["peak_memory_bytes", "speedup_low"]] = [np.nan, np.inf]
    rows = json.loads(json.dumps(front_rows(front), allow_nan=False))
    assert [list(row) for row in rows] == [list(COLUMNS)] * len(front)
    assert rows[0]["plan_hash"] is None and rows[0]["metric_test"] == 0.92
    assert rows[3]["peak_memory_bytes"] is None and rows[3]["speedup_low"] is None
    assert rows[6]["metric_test"] is None
    assert rows[6]["file_bytes"] == 400_000 and isinstance(rows[6]["file_bytes"], int)
    assert rows[5]["trusted"] is False


def test_no_front_says_what_to_run(tmp_path: Path, front: pd.DataFrame) -> None:
    for run in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunFolderError, match="autocompress search"):
            read_front(run)
    front.head(0).to_csv(tmp_path / "front.csv", index=False)
    with pytest.raises(RunFolderError, match="no finished trial"):
        read_front(tmp_path)
    (tmp_path / "front.csv").write_bytes(b"")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_front(tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("role", "winner", "unknown role"),
        ("trusted", "maybe", "neither true nor false"),
        ("latency_ms", "fast", "no number"),
    ],
)
def test_wrong_values_are_refused(
    front: pd.DataFrame, column: str, value: str, complaint: str
) -> None:
    front[column] = front[column].astype(object)
    front.loc[2, column] = value
    with pytest.raises(RunFolderError, match=complaint):
        typed_front(front)


def test_missing_columns_are_named(front: pd.DataFrame) -> None:
    with pytest.raises(RunFolderError, match="speedup_low, trusted"):
        typed_front(front.drop(columns=["trusted", "speedup_low"]))


@pytest.mark.parametrize("unit", ["share", "metric"])
def test_fronts_of_earlier_versions_get_the_unit_of_their_drops(
    front: pd.DataFrame, own_front: pd.DataFrame, unit: str
) -> None:
    earlier = (front if unit == "share" else own_front).drop(columns="metric_unit")
    assert (typed_front(earlier)["metric_unit"] == unit).all()
    unjudged = earlier.assign(metric_test=np.nan, drop_test_pp=np.nan)
    assert (typed_front(unjudged)["metric_unit"] == "metric").all()


def test_device_must_be_a_fingerprint(run: Path) -> None:
    assert read_device(run).runtime("onnxruntime").version == "1.32.0"
    for text in ("[]", "{", '{"profile": "cpu"}'):
        (run / "device.json").write_text(text)
        with pytest.raises(RunFolderError):
            read_device(run)
