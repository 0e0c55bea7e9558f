from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from measuring import make_profile, of

from autocompress.device import (
    DeviceProfile,
    OnnxRuntimeCpuSettings,
    OpenVinoSettings,
    local_facts,
    make_fingerprint,
    usable_cores,
)
from autocompress.errors import DeviceError, MeasurementError
from autocompress.measure import client
from autocompress.measure.child import Setup
from autocompress.measure.client import Worker
from autocompress.measure.lock import core_keys, hold

ROOT = Path(client.__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
PARENT = """
import os, sys, time
from pathlib import Path
from autocompress.device import DeviceProfile
from autocompress.measure.client import Subject, Worker
profile = DeviceProfile.model_validate_json(sys.argv[1])
scratch, inputs, good, endless = map(Path, sys.argv[2:])
worker = Worker(profile, scratch)
worker.predict(Subject(good, "onnxruntime"), inputs, 8)
# Like a forked data loader, it keeps the child's standard input open after our death.
keeper = os.fork()
if keeper == 0:
    time.sleep(20)
    os._exit(0)
print(worker.pid, keeper, flush=True)
worker.predict(Subject(endless, "onnxruntime"), inputs, 8)
"""

INTERRUPTED = """
import signal, sys, threading
from pathlib import Path
from autocompress.device import DeviceProfile
from autocompress.measure.client import Subject, Worker
# A shell that starts pytest in the background makes it ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
profile = DeviceProfile.model_validate_json(sys.argv[1])
scratch, inputs, good, endless = map(Path, sys.argv[2:])
with Worker(profile, scratch) as worker:
    worker.predict(Subject(good, "onnxruntime"), inputs, 8)
    main = threading.get_ident()
    threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT]).start()
    try:
        worker.predict(Subject(endless, "onnxruntime"), inputs, 8)
    except KeyboardInterrupt:
        print("interrupted", worker.pid)
    print(worker.predict(Subject(good, "onnxruntime"), inputs, 8)[0].shape)
"""


def gone(pid: int, within_s: float = 5) -> bool:
    """Whether a process has ended, though perhaps nobody has reaped it yet."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def kill_soon(worker: Worker, number: signal.Signals) -> threading.Thread:
    """Send a signal to the worker's child half a second after it has started."""

    def wait_and_kill() -> None:
        while worker.pid is None:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(worker.pid, number)

    thread = threading.Thread(target=wait_and_kill)
    thread.start()
    return thread


@pytest.mark.parametrize("batch_size", [1, 8, 37, 100])
def test_predict_runs_the_whole_split(worker: Worker, models, split, batch_size: int) -> None:
    outputs = worker.predict(of(models.two_outputs()), split, batch_size)
    np.testing.assert_array_equal(outputs[0], -split[0])
    assert all(output.shape[0] == 37 for output in outputs)


def test_a_stored_split_gives_the_same_outputs(worker: Worker, models, split) -> None:
    path = worker.store(split)
    assert worker.store([split[0].copy()]) == path
    assert worker.store([split[0] + 1]) != path
    model = models.dense(32)
    np.testing.assert_array_equal(
        worker.predict(of(model), path, 8)[0], worker.predict(of(model), split, 8)[0]
    )


def test_a_rewritten_model_is_loaded_anew(worker: Worker, models, split, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(models.dense(8).read_bytes())
    first = worker.predict(of(path), split, 8)[0]
    path.write_bytes(models.dense(12).read_bytes())
    assert not np.allclose(first, worker.predict(of(path), split, 8)[0])


def test_compare_keeps_every_sample(worker: Worker, profile: DeviceProfile, models, split) -> None:
    paired = worker.compare(of(models.dense(256)), of(models.dense(64)), split, seed=0)
    assert paired.trusted == (paired.reason == "")
    assert len(paired.baseline_samples_ms) == len(paired.candidate_samples_ms) == paired.rounds
    assert paired.speedup_low <= paired.speedup <= paired.speedup_high
    assert paired.speedup == paired.baseline_ms / paired.candidate_ms
    assert paired.candidate_p50_ms <= paired.candidate_p95_ms <= paired.candidate_p99_ms
    assert paired.device == make_fingerprint(profile, local_facts(profile)).id


def test_a_missed_target_is_marked_untrusted(worker: Worker, models, split) -> None:
    paired = worker.compare(of(models.dense(64)), of(models.dense(256)), split, final=True, seed=0)
    assert not paired.trusted and "time limit" in paired.reason
    assert paired.elapsed_s >= 0.5


def test_errors_of_the_runtime_carry_their_reason(worker: Worker, models, split) -> None:
    with pytest.raises(MeasurementError, match=r"corrupt\.onnx"):
        worker.predict(of(models.corrupt()), split, 8)
    with pytest.raises(MeasurementError, match="first axis must be the batch"):
        worker.predict(of(models.without_batch()), split, 8)
    with pytest.raises(MeasurementError, match="another number of inputs"):
        worker.predict(of(models.dense(8)), [*split, *split], 8)
    with pytest.raises(MeasurementError, match="cannot run the model"):
        worker.predict(of(models.dense(8)), [split[0].astype(np.float64)], 8)
    with pytest.raises(MeasurementError, match="no such file"):
        worker.predict(of(Path("missing.onnx")), split, 8)
    pid = worker.pid
    worker.predict(of(models.dense(8)), split, 8)
    assert worker.pid == pid


def test_a_lacking_runtime_names_its_extra(lacking_profile: DeviceProfile, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"autocompress\[tensorrt\]"):
        Worker(lacking_profile, tmp_path)


def test_a_runtime_that_the_profile_does_not_list_is_refused(worker: Worker, models, split) -> None:
    with pytest.raises(DeviceError, match="allowed: onnxruntime"):
        worker.predict(of(models.dense(8), "openvino-f32"), split, 8)


def test_a_model_that_allocates_without_end_costs_one_request(
    models, split, tmp_path: Path
) -> None:
    greedy = make_profile(hang_limit_s=20, memory_limit_bytes=3 * 2**28)
    with Worker(greedy, tmp_path) as worker:
        with pytest.raises(MeasurementError, match=r"(?i)greedy\.onnx|alloc"):
            worker.compare(of(models.dense(8)), of(models.greedy()), split, seed=0)
        assert worker.predict(of(models.dense(8)), split, 8)[0].shape == (37, 16)


def test_two_runtimes_are_timed_in_turn_in_one_process(models, split, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    both = make_profile(
        OnnxRuntimeCpuSettings(name="onnxruntime"),
        OpenVinoSettings(name="openvino", precision="f32"),
    )
    with Worker(both, tmp_path) as worker:
        model = models.dense(64)
        paired = worker.compare(of(model), of(model, "openvino-f32"), split, seed=0)
        assert paired.speedup > 0 and paired.rounds >= 1
        outputs = [worker.predict(of(model, name), split, 8)[0] for name in both.runtime_names]
        np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_crash_costs_one_request(
    profile: DeviceProfile, models, split, tmp_path: Path, number: signal.Signals
) -> None:
    with Worker(profile, tmp_path) as worker:
        worker.predict(of(models.dense(8)), split, 8)
        killer = kill_soon(worker, number)
        with pytest.raises(MeasurementError, match=f"killed by {number.name}"):
            worker.compare(of(models.dense(8)), of(models.endless()), split, seed=0)
        killer.join()
        assert worker.predict(of(models.dense(8)), split, 8)[0].shape == (37, 16)


def test_a_hang_costs_one_request(
    short_profile: DeviceProfile, models, split, tmp_path: Path
) -> None:
    with Worker(short_profile, tmp_path) as worker:
        worker.predict(of(models.dense(8)), split, 8)
        pid = worker.pid
        with pytest.raises(MeasurementError, match="no sign of life for 4 s"):
            worker.predict(of(models.endless()), split, 8)
        assert pid is not None and gone(pid, 1)
        assert worker.predict(of(models.dense(8)), split, 8)[0].shape == (37, 16)


def test_an_interrupt_leaves_no_answer_behind(
    profile: DeviceProfile, models, split, worker: Worker, tmp_path: Path
) -> None:
    paths = [tmp_path, worker.store(split), models.dense(8), models.endless()]
    arguments = [sys.executable, "-c", INTERRUPTED, profile.model_dump_json(), *map(str, paths)]
    # In a process of its own: what other tests load may not bear a signal.
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.stdout.split() == ["interrupted", "None", "(37,", "16)"], done.stderr


def test_a_device_in_use_is_waited_for_and_then_refused(
    short_profile: DeviceProfile, models, split, tmp_path: Path
) -> None:
    keys = core_keys(short_profile.pinned_cores(usable_cores()))
    refused = pytest.raises(DeviceError, match=rf"held by process {os.getpid()}\b")
    with Worker(short_profile, tmp_path, lock_wait_s=0.3) as hasty, hold(keys, 30), refused:
        hasty.predict(of(models.dense(8)), split, 8)
    with Worker(short_profile, tmp_path) as patient:
        patient.predict(of(models.dense(8)), split, 8)
        with ExitStack() as stack:
            stack.enter_context(hold(keys, 30))
            # Waiting for longer than the hang limit is no hang.
            release = threading.Timer(4.5, stack.close)
            release.start()
            assert patient.predict(of(models.dense(8)), split, 8)[0].shape == (37, 16)
            release.join()


def test_the_child_dies_with_a_killed_parent(
    profile: DeviceProfile, models, split, worker: Worker, tmp_path: Path
) -> None:
    paths = [tmp_path, worker.store(split), models.dense(8), models.endless()]
    arguments = [sys.executable, "-c", PARENT, profile.model_dump_json(), *map(str, paths)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as parent:
        assert parent.stdout is not None
        pid, keeper = map(int, parent.stdout.readline().split())
        try:
            time.sleep(0.3)
            assert not gone(pid, 0.1)
            parent.kill()
            assert gone(pid)
        finally:
            os.kill(keeper, signal.SIGKILL)


def test_the_child_ends_with_its_standard_input_even_in_mid_run(
    profile: DeviceProfile, models, split, worker: Worker, tmp_path: Path
) -> None:
    setup = Setup(os.getpid(), profile)
    request = {
        "operation": "predict",
        "model": str(models.endless()),
        "runtime": "onnxruntime",
        "inputs": str(worker.store(split)),
        "batch_size": 8,
        "outputs": str(tmp_path / "outputs.npz"),
        "lock_wait_s": 5,
    }
    command = [sys.executable, "-m", "autocompress.measure.worker", setup.to_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        assert child.stdin is not None
        print(json.dumps(request), file=child.stdin, flush=True)
        time.sleep(1)
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(5) == 0


def test_a_closed_worker_leaves_stored_inputs_only(
    profile: DeviceProfile, models, split, tmp_path: Path
) -> None:
    with Worker(profile, tmp_path) as worker:
        worker.predict(of(models.dense(8)), split, 8)
        pid = worker.pid
        stored = worker.store(split)
    assert pid is not None and gone(pid)
    assert list(tmp_path.iterdir()) == [stored]
    with pytest.raises(MeasurementError, match="closed"):
        worker.predict(of(models.dense(8)), split, 8)


def test_the_measuring_side_imports_no_torch() -> None:
    code = (
        "import sys, autocompress.measure.probe, autocompress.measure.memory, "
        "autocompress.measure.worker; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
