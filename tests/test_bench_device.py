"""What the harness asks of a device: graphs, who waits for whom, input sets, ceilings, NVML."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from bench_cases import QuickCpu, make, on_device, plain_layer_norm, variant
from simulated_device import SimulatedDevice

from benchmarks.core import ceilings
from benchmarks.core.harness import run_case
from vitfast.check.case import Work
from vitfast.measure import device as devices
from vitfast.measure import nvml
from vitfast.measure.device import HOST_SHARE, Arranged, Cuda, NotCaptured, arrange, input_sets, issue


def test_a_host_that_waits_for_room_in_the_queue_is_called_the_limit():
    place = SimulatedDevice()
    fast_host = issue(lambda: place.work(20e-6, 100e-6), place)
    assert not fast_host.host_bound and fast_host.device_ms == pytest.approx(0.1, rel=0.01)
    assert fast_host.issue_ms == pytest.approx(0.02) and fast_host.wall_ms == pytest.approx(0.1, rel=0.01)
    slow_host = issue(lambda: place.work(50e-6, 5e-6), place)
    assert slow_host.host_bound and slow_host.device_ms == slow_host.wall_ms == pytest.approx(0.05, rel=0.01)
    edge = HOST_SHARE * 100e-6
    assert issue(lambda: place.work(edge * 1.04, 100e-6), place).host_bound
    assert not issue(lambda: place.work(edge * 0.96, 100e-6), place).host_bound


def test_a_queue_that_is_full_is_taken_for_a_slow_host():
    """A host that is 300 launches ahead waits; measured over many calls it would look as slow as the device."""
    place = SimulatedDevice()

    def call():
        place.work(10e-6, 100e-6)
        place.now = max(place.now, place.busy_until - 300 * 100e-6)

    assert not issue(call, place).host_bound


def arranged_on(place, calls, graph=None, sets=1):
    return arrange(calls, {name: True for name in calls} | (graph or {}), place, sets)


def test_only_the_host_bound_variant_gets_a_graph():
    """Else the others would look slower only for having been issued one by one."""
    place = SimulatedDevice()
    calls = {"short": lambda: place.work(50e-6, 5e-6), "long": lambda: place.work(50e-6, 200e-6)}
    found = arranged_on(place, calls, sets=3)
    assert [each.facts["graph"] for each in found.values()] == [True, True]
    assert [each.facts["host_bound"] for each in found.values()] == [False, False]
    assert found["short"].facts["wall_ms"] == pytest.approx(0.05, rel=0.01)
    # every replay goes through all input sets, and lasts long enough for its own launch not to count
    assert [each.call.times % 3 for each in found.values()] == [0, 0]
    assert place.captures == [each.call.times for each in found.values()]
    assert found["short"].call.times * 0.05 >= 1.0 and found["long"].call.times * 0.2 >= 1.0


def test_graphs_are_made_where_the_device_is_the_limit():
    place = SimulatedDevice()
    found = arranged_on(place, {"a": lambda: place.work(10e-6, 200e-6), "b": lambda: place.work(50e-6, 200e-6)})
    assert place.captures == [] and all(each.facts["graph"] is False for each in found.values())


def test_a_failed_capture_or_foreign_graphs_go_unsaid():
    place = SimulatedDevice()
    calls = {
        "torch": lambda: place.work(50e-6, 5e-6),
        "synchronises": lambda: place.work(50e-6, 5e-6, can_be_captured=False),
        "own graphs": lambda: place.work(50e-6, 5e-6),
    }
    found = arranged_on(place, calls, {"own graphs": False})
    assert found["torch"].facts["graph"] and "why_no_graph" not in found["torch"].facts
    assert found["synchronises"].facts["why_no_graph"] == "it synchronises"
    assert found["own graphs"].facts["why_no_graph"] == "brings its own"
    for name in ("synchronises", "own graphs"):
        facts, call = found[name].facts, found[name].call
        assert facts["graph"] is False and facts["host_bound"] and call is calls[name]


def test_a_cpu_is_asked_for_graphs():
    calls = {"a": print}
    assert arrange(calls, {"a": True}, devices.Cpu(), 1) == {
        "a": Arranged(print, {"graph": False, "host_bound": False, "wall_ms": None})
    }


def test_a_row_of_a_device_lacks_graphs_memory_or_state():
    place = SimulatedDevice(cache_bytes=7000)
    case = make(
        {"torch": on_device(place, 50e-6, 10e-6), "vitfast": on_device(place, 80e-6, 5e-6, ours=True),
         "own graphs": on_device(place, 30e-6, 20e-6, graph=False)}, mode="forward+backward",
    )  # fmt: skip
    row = run_case(case, seconds=0.05, place=place)
    found = row["variants"]
    # without the graph the host's time would make ours the slowest
    assert found["vitfast"]["ratio"] == pytest.approx(2.0, rel=0.02) and not found["vitfast"]["within_noise"]
    assert found["vitfast"]["graph"] and found["torch"]["graph"] and not found["vitfast"]["host_bound"]
    assert found["vitfast"]["wall_ms"] == pytest.approx(0.08, rel=0.02)
    assert found["own graphs"]["host_bound"] and found["own graphs"]["ms"] == pytest.approx(0.03, rel=0.02)
    assert found["vitfast"]["peak_allocated_mib"] == 1.0 and found["vitfast"]["peak_reserved_mib"] == 2.0
    assert row["before"] == {"busy": False} and row["after"] == {"busy": True}
    # twice the cache, at 4000 bytes a call
    assert row["sets"] == 4 and all(times % 4 == 0 for times in place.captures)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's peak")
def test_memory_of_a_model_on_a_cpu_is_not_in_the_row_or_that_of_another():
    """64 MiB in pieces, after as many were freed; of a model only."""
    place = QuickCpu()

    def pieces():
        return [torch.ones(2**18) for _ in range(64)]

    for _ in range(2):
        assert 60 < place.peak_mib(pieces)["peak_resident_mib"] < 100
    as_model, as_op = (make({"vitfast": variant(plain_layer_norm, ours=True)}, kind=kind) for kind in ("model", "op"))
    found = [run_case(case, seconds=0.0, place=place)["variants"]["vitfast"] for case in (as_model, as_op)]
    assert found[0]["peak_resident_mib"] >= 0 and "peak_resident_mib" not in found[1]


def test_memory_is_asked_of_inference():
    place = SimulatedDevice()
    row = run_case(make({"torch": on_device(place, 1e-6, 1e-4)}), seconds=0.01, place=place)
    assert "peak_allocated_mib" not in row["variants"]["torch"]


@pytest.mark.parametrize(
    "one_set, call, cache, sets",
    [
        (100, 1000, 4000, 8),  # what weights and results push out of the cache counts as well
        (100, 0, 400, 8),
        (100, 8000, 4000, 1),
        (100, 1, 4000, 16),  # never more than the device wants
        (2**30, 2**20, 2**30, 3),  # nor than memory has room for
        (2**40, 2**20, 2**30, 1),
    ],
)
def test_input_sets_stay_in_the_cache_or_fill_the_memory(one_set, call, cache, sets):
    place = SimulatedDevice(cache)
    place.most_sets = 16
    place.free_bytes = lambda: 24 * 2**30
    assert input_sets(place, one_set, call) == sets


class FakeGraph:
    """In place of torch.cuda.CUDAGraph: records what is computed inside, and computes it again."""

    empty, ended, last = False, True, None

    def pool(self):
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

    def replay(self):
        if not self.empty:
            self.last.copy_(torch.ones_like(self.last))


@pytest.fixture
def fake_cuda(monkeypatch):
    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    state = {"graph": FakeGraph(), "undone": [], "sync": "default"}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: state["graph"])
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **how: state.get("capture", contextlib.nullcontext()))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: state["undone"].append("stream"))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: state["sync"])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: state.update(sync=mode))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        undo = lambda index, pool, name=name: state["undone"].append((name, index, pool))  # noqa: E731
        monkeypatch.setattr(torch._C, name, undo, raising=False)
    return state


@pytest.mark.parametrize("results", [lambda t: t, lambda t: (torch.tensor(3), t)])
def test_a_graph_holds_another_number_of_calls(fake_cuda, results):
    calls = []

    def call():
        calls.append(fake_cuda["graph"])
        fake_cuda["graph"].last = torch.zeros(3)
        return results(fake_cuda["graph"].last)

    replay = Cuda(torch.device("cuda")).capture(call, 7)
    assert len(calls) == 7 + devices.WARM_UP_CALLS
    replay()
    assert fake_cuda["graph"].last.tolist() == [1, 1, 1]


def test_a_graph_that_computes_nothing_is_timed(fake_cuda):
    """Work that goes to a stream of its own is not captured, and its replay would take no time."""
    fake_cuda["graph"].empty = True
    with pytest.raises(NotCaptured, match="computes nothing"):
        Cuda(torch.device("cuda")).capture(lambda: torch.zeros(3), 2)


@pytest.mark.parametrize("ended", [True, False])
def test_a_failed_capture_hides_its_cause_or_breaks_the_next(fake_cuda, ended):
    """Where ending it fails, torch stays on its stream and pool; to give a pool back twice would end python."""

    @contextlib.contextmanager
    def capture():
        try:
            yield
        except ValueError as problem:
            if ended:
                raise
            raise RuntimeError("operation failed due to a previous error during capture") from problem

    def fails_after_warm_up():
        calls.append(1)
        if len(calls) > devices.WARM_UP_CALLS:
            raise ValueError("the cause\nmore")

    calls = []
    fake_cuda["capture"], fake_cuda["graph"].ended = capture(), ended
    with pytest.raises(NotCaptured, match="^ValueError: the cause$"):
        Cuda(torch.device("cuda")).capture(fails_after_warm_up, 2)
    pools = [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1))]
    assert fake_cuda["undone"] == ["stream", *([] if ended else pools)]


def test_waiting_for_the_device_is_only_found_in_the_capture(fake_cuda):
    modes = []

    def synchronises():
        modes.append(fake_cuda["sync"])
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(NotCaptured, match="synchronizing"):
        Cuda(torch.device("cuda")).capture(synchronises, 2)
    assert modes == ["error"] and fake_cuda["sync"] == "default"


# work and ceilings


CEILINGS = {
    "copy": {"gbps": 100.0},
    "matmul": {"fp32": {"tflops": 1.0}, "tf32": {"tflops": 4.0}, "bf16": {"absent": "not multiplied"}},
}


def test_work_is_held_against_the_wrong_ceiling():
    compute, memory = Work(flops=10**12, bytes=10**9), Work(flops=10**9, bytes=10**9)
    assert ceilings.roofline(compute, CEILINGS, "fp32") == (pytest.approx(1000.0), "compute")
    assert ceilings.roofline(compute, CEILINGS, "fp32", tf32=True) == (pytest.approx(250.0), "compute")
    assert ceilings.roofline(memory, CEILINGS, "fp32") == (pytest.approx(10.0), "memory")
    assert ceilings.roofline(memory, CEILINGS, "bf16") is None and ceilings.roofline(memory, {}, "fp32") is None


def test_percent_is_not_that_of_the_row_s_own_work():
    place = SimulatedDevice()
    case = make({"torch": on_device(place, 1e-6, 1e-3)}, work=Work(flops=5 * 10**8, bytes=10**7))
    found = run_case(case, seconds=0.01, place=place, ceilings=CEILINGS)["variants"]["torch"]
    assert found["tflops"] == pytest.approx(0.5, rel=0.01) and found["gbps"] == pytest.approx(10, rel=0.01)
    assert found["percent"] == pytest.approx(50, rel=0.01) and found["limit"] == "compute"


def test_ceilings_of_a_cpu_are_missing_or_end_the_run(monkeypatch):
    monkeypatch.setattr(ceilings, "copy", lambda place, seconds: 1 / 0)
    # any CPU computes it, if slowly
    real = ceilings._check_supported
    monkeypatch.setattr(ceilings, "_check_supported", lambda place, name: name == "bf16" or real(place, name))
    told = []
    tiny = {"seconds": 0.02, "size": 64, "widths": (16,), "batch": 1}
    found = ceilings.measure("cpu", **tiny, progress=told.append)
    assert found["copy"] == {"absent": "ZeroDivisionError: division by zero"}
    assert found["matmul"]["fp32"]["tflops"] > 0 and "absent" in found["matmul"]["fp8"]
    assert [row["name"] for row in found["gemm"]] == ["qkv", "proj", "fc1", "fc2"]
    assert [row["n"] for row in found["gemm"]] == [48, 16, 64, 16]
    assert [row["k"] for row in found["gemm"]] == [16, 16, 16, 64]
    assert all(row["tflops"] > 0 and row["gbps"] > 0 for row in found["gemm"]) and len(told) == 7
    json.dumps(found)


def test_ceilings_count_other_bytes_or_multiplications():
    place = SimulatedDevice()

    def takes(device_s):
        def call(*_, **__):
            place.work(1e-6, device_s)

        return call

    rates = ceilings.sustained(takes(1e-3), place, 2.0)
    assert rates.mean == pytest.approx(1000, rel=0.01) == rates.first and rates.seconds == pytest.approx(2.0, rel=0.05)


def test_a_setting_of_tf32_outlives_the_ceilings(monkeypatch):
    seen = {}
    monkeypatch.setattr(ceilings, "_check_supported", lambda place, name: None)
    before = torch.get_float32_matmul_precision()
    for name in ("fp32", "tf32"):
        monkeypatch.setattr(
            ceilings, "sustained",
            lambda call, place, seconds, name=name: seen.update({name: torch.get_float32_matmul_precision()})
            or ceilings.Rates(1, [1.0]),
        )  # fmt: skip
        ceilings.matmul(devices.Cpu(), name, 8, 0.01)
    assert seen == {"tf32": "high", "fp32": "highest"} and torch.get_float32_matmul_precision() == before


def test_throttle_reasons_stay_numbers():
    assert nvml.decode(0) == [] and nvml.decode(0x24) == ["software power cap", "software thermal slowdown"]
    assert nvml.decode(0x401) == ["idle", "unknown 0x400"]


STATE = {
    "sm_mhz": 1980.0, "memory_mhz": 3201.0, "sm_max_mhz": 1980.0, "power_w": 431.5, "power_limit_w": 700.0,
    "temperature_c": None, "throttle": ["software power cap"],
}  # fmt: skip


@pytest.fixture
def fresh_nvml(monkeypatch):
    monkeypatch.setattr(nvml, "_uuid", lambda device: "GPU-1")
    nvml._reader.cache_clear()
    yield
    nvml._reader.cache_clear()


class FakeNvml:
    """The driver's library as ctypes shows it, on a device that does not tell its temperature."""

    def __getattr__(self, name):
        answers = {
            ("nvmlDeviceGetClockInfo", 1): 1980, ("nvmlDeviceGetClockInfo", 2): 3201,
            ("nvmlDeviceGetMaxClockInfo", 1): 1980, ("nvmlDeviceGetPowerUsage",): 431500,
            ("nvmlDeviceGetEnforcedPowerLimit",): 700000, ("nvmlDeviceGetCurrentClocksThrottleReasons",): 4,
        }  # fmt: skip

        def ask(device, *arguments):
            *arguments, answer = arguments
            key = (name, *(argument.value for argument in arguments))
            if key not in answers:
                return 3
            answer._obj.value = answers[key]
            return 0

        return ask

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        return 0 if uuid.value == b"GPU-1" else 6

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"580.1"
        return 0


def test_nvml_is_misread(monkeypatch, fresh_nvml):
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: FakeNvml())
    assert nvml.state(torch.device("cuda")) == STATE
    assert nvml.source(torch.device("cuda")) == {"nvml": "NVML", "driver": "580.1"}
    with pytest.raises(OSError, match="nvmlDeviceGetHandleByUUID returned 6"):
        nvml.Library("GPU-2", FakeNvml())


@pytest.mark.parametrize("old_driver", [False, True])
def test_nvidia_smi_is_misread(monkeypatch, fresh_nvml, old_driver):
    answers = dict(zip((query[0] for query in nvml.QUERIES.values()),
                       ("1980", "3201", "1980", "431.50", "700.00", "[N/A]"), strict=True))  # fmt: skip
    answers |= {nvml.SMI_REASONS[old_driver]: "0x0000000000000004", "driver_version": "580.1"}

    def smi(command, **options):
        assert command[:2] == ["nvidia-smi", "--id=GPU-1"]
        queries = command[2].removeprefix("--query-gpu=").split(",")
        if not answers.keys() >= set(queries):
            raise subprocess.CalledProcessError(2, command)
        return subprocess.CompletedProcess(command, 0, stdout=", ".join(answers[query] for query in queries) + "\n")

    monkeypatch.setattr(subprocess, "run", smi)
    assert nvml.state(torch.device("cuda")) == STATE
    assert nvml.source(torch.device("cuda")) == {"nvml": "nvidia-smi", "driver": "580.1"}


def test_a_machine_without_nvml_fails(monkeypatch, fresh_nvml):
    def none(command, **options):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", none)
    assert nvml.state(torch.device("cuda")) is None
    assert nvml.source(torch.device("cuda"))["nvml"].startswith("absent: libnvidia-ml")
