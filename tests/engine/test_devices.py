"""Devices: NVML asked through ctypes, against a C library with its structures and codes, and recorded files."""

import asyncio
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from engine.errors import EngineError
from engine.host import inventory, nvml, planning
from engine.host.child import ChildSpec
from engine.host.inventory import Inventory, cpu_device, measure, read_recorded
from engine.host.planning import Planner
from engine.host.service import HostService
from engine.protos import engine_pb2
from tests.engine.sessions import OPTIONS

GIB = 2**30
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml_library.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-o", str(made), str(source)], check=True)
    return str(made)


@needs_compiler
def test_devices_and_slices_are_told_as_nvml_has_them(library: str) -> None:
    found = nvml.find(library)
    whole, sliced, piece = found.devices
    assert found.problem == ""
    assert (whole.id, whole.kind, whole.name, whole.driver) == ("GPU-aaaa", "cuda", "Example H200", "575.01")
    assert (whole.memory_bytes, whole.memory_available_bytes) == (150 * GIB, 149 * GIB)
    assert (whole.compute_capability, whole.temperature_c, whole.utilisation_percent) == ("9.0", 41, 17)
    assert (sliced.id, sliced.memory_available_bytes) == ("GPU-bbbb", 0)
    assert not sliced.HasField("utilisation_percent")  # it does not tell, and that is not nought
    assert (piece.id, piece.slice_of, piece.memory_bytes) == ("MIG-cccc", "GPU-bbbb", 40 * GIB)
    assert piece.compute_capability == "8.0"
    assert not piece.HasField("temperature_c")


@needs_compiler
@pytest.mark.parametrize(
    ("failing", "ids", "problem"),
    [
        ("nvmlInit_v2", [], "nvmlInit_v2: Unknown Error (9)"),
        ("nvmlSystemGetDriverVersion", [], "nvmlSystemGetDriverVersion: Unknown Error (999)"),
        ("nvmlDeviceGetCount_v2", [], "nvmlDeviceGetCount_v2"),
        ("nvmlDeviceGetHandleByIndex_v2", [], "device 0: nvmlDeviceGetHandleByIndex_v2"),
        ("nvmlDeviceGetUUID", [], "device 1: nvmlDeviceGetUUID"),
        ("nvmlDeviceGetName", [], "nvmlDeviceGetName"),
        ("nvmlDeviceGetMemoryInfo", ["GPU-bbbb"], "slice 2 of GPU-bbbb: nvmlDeviceGetMemoryInfo"),
        ("nvmlDeviceGetCudaComputeCapability", ["GPU-aaaa", "GPU-bbbb", "MIG-cccc"], ""),
        ("nvmlDeviceGetTemperature", ["GPU-aaaa", "GPU-bbbb", "MIG-cccc"], ""),
        ("nvmlDeviceGetUtilizationRates", ["GPU-aaaa", "GPU-bbbb", "MIG-cccc"], ""),
        ("nvmlDeviceGetMigMode", ["GPU-aaaa", "GPU-bbbb"], ""),
        ("nvmlDeviceGetMaxMigDeviceCount", ["GPU-aaaa", "GPU-bbbb"], "slices of GPU-bbbb: nvmlDeviceGetMaxMig"),
        (
            "nvmlDeviceGetMigDeviceHandleByIndex",
            ["GPU-aaaa", "GPU-bbbb"],
            "slice 0 of GPU-bbbb: nvmlDeviceGetMigDe",
        ),
        ("nvmlShutdown", ["GPU-aaaa", "GPU-bbbb", "MIG-cccc"], ""),
    ],
)
def test_any_call_may_fail_and_costs_no_more_than_it_tells(
    library: str, monkeypatch: pytest.MonkeyPatch, failing: str, ids: list[str], problem: str
) -> None:
    monkeypatch.setenv("NVML_FAILS", failing)
    found = nvml.find(library)
    assert [device.id for device in found.devices] == ids
    assert problem in found.problem
    assert bool(problem) == bool(found.problem)


@needs_compiler
def test_slices_are_told_to_a_user_who_may_not_see_the_memory_of_the_whole(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVML_UNPRIVILEGED", "1")
    found = nvml.find(library)
    assert [device.id for device in found.devices] == ["GPU-aaaa", "GPU-bbbb", "MIG-cccc"]
    assert [device.memory_bytes // GIB for device in found.devices] == [150, 0, 40]
    assert found.problem == ""


@needs_compiler
def test_a_device_in_mig_mode_without_a_slice_has_nothing_available(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVML_EMPTY", "1")
    found = nvml.find(library)
    assert [device.id for device in found.devices] == ["GPU-aaaa", "GPU-bbbb"]
    assert (found.devices[1].memory_bytes, found.devices[1].memory_available_bytes) == (80 * GIB, 0)
    assert found.problem == ""


def test_a_library_that_is_there_and_cannot_be_loaded_is_not_called_absent(tmp_path: Path) -> None:
    broken = tmp_path / "libnvidia-ml.so.1"
    broken.write_bytes(b"not a library")
    assert f"{broken} cannot be loaded: " in nvml.find(str(broken)).problem


def test_a_plan_for_the_cpu_wakes_no_other_device(
    monkeypatch: pytest.MonkeyPatch, tiny_store: tuple[Path, engine_pb2.FileSet]
) -> None:
    def asked() -> Inventory:
        raise AssertionError("the other devices were asked")

    for module in (planning, inventory):
        monkeypatch.setattr(module, "measure", asked)
    planner, wanted = Planner(tiny_store[0]), deployment(tiny_store[1])
    planner.promise({"notes": wanted}, {})
    assert planner.plan(wanted, {}, "cpu").available_bytes > 0
    with pytest.raises(AssertionError, match="were asked"):
        planner.plan(wanted, {}, "GPU-a")


def test_without_the_library_the_cpu_is_the_only_device_and_the_reason_is_told() -> None:
    found = measure("libnvidia-ml-not-here.so.1")
    assert [device.id for device in found.devices] == ["cpu"]
    assert found.nvml == "libnvidia-ml-not-here.so.1 is not installed"
    assert 0 < found.cpu.memory_available_bytes <= found.cpu.memory_bytes


def test_a_library_of_another_kind_is_said_to_be_none() -> None:
    assert "is not NVML" in nvml.find("libm.so.6").problem


def recorded(**changed: Any) -> dict[str, Any]:
    cpu = {"id": "cpu", "kind": "cpu", "name": "Example", "memory_bytes": GIB, "memory_available_bytes": GIB // 2,
           "cores": 4}  # fmt: skip
    gpu = {"id": "GPU-a", "kind": "cuda", "name": "Example H200", "memory_bytes": 4 * GIB,
           "memory_available_bytes": 4 * GIB, "temperature_c": 40, "deployments": ["x"]}  # fmt: skip
    return {"devices": [cpu | changed, gpu], "recorded_from": "", "nvml": ""}


def test_a_recorded_inventory_is_read_and_says_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(recorded()))
    found = read_recorded(path)
    assert found.recorded_from == str(path)
    assert [MessageToDict(d)["id"] for d in found.devices] == ["cpu", "GPU-a"]
    assert found.devices[1].temperature_c == 40


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (json.dumps(recorded(id="other")), "first device must be the CPU"),
        (json.dumps(recorded(cores="4")), "device 1: cores must be a whole number"),
        (json.dumps(recorded(memory_bytes=-1)), "device 1: memory_bytes"),
        (json.dumps(recorded(memory_bytes=True)), "device 1: memory_bytes"),
        (json.dumps(recorded(colour="red")), "colour is no field"),
        (json.dumps(recorded(name="x" * 300)), "device 1: name"),
        (json.dumps(recorded(memory_available_bytes=2 * GIB)), "no more free memory"),
        (json.dumps({"devices": []}), "list of devices"),
        (json.dumps({"devices": [{}]}), "device 1 lacks id"),
        (json.dumps({"devices": [recorded()["devices"][0]] * 2}), "same id"),
        (json.dumps(recorded() | {"extra": 1}), "unknown field extra"),
        (json.dumps(recorded() | {"nvml": 1}), "nvml must be text"),
        ('{"devices": [], "devices": []}', "twice"),
        ("[]", "not a JSON object"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_inventory_is_refused_by_name(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(EngineError, match=named) as error:
        read_recorded(path)
    assert error.value.code == "INVENTORY_INVALID"


@pytest.fixture
def cpu(tmp_path: Path) -> Inventory:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(recorded()))
    return read_recorded(path)


def deployment(files: engine_pb2.FileSet, name: str = "notes", **options: int) -> engine_pb2.Deployment:
    made = engine_pb2.Deployment(name=name, files=files, options=OPTIONS)
    made.options.MergeFrom(engine_pb2.DeploymentOptions(**options))
    return made


def on_gpu(files: engine_pb2.FileSet, name: str = "notes", **options: Any) -> engine_pb2.Deployment:
    made = deployment(files, name)
    made.options.backend = ""
    made.options.MergeFrom(engine_pb2.DeploymentOptions(**{"device": "GPU-a"} | options))
    return made


def test_two_deployments_that_load_at_once_are_not_promised_the_same_bytes(
    cpu: Inventory, tiny_store: tuple[Path, engine_pb2.FileSet]
) -> None:
    store, files = tiny_store
    held: dict[str, int] = {}
    first, second = deployment(files, "first"), deployment(files, "second")
    room = Planner(store, cpu).plan(first, {}).total_bytes * 3 // 2  # for one, not for two
    cpu.cpu.memory_available_bytes = room
    planner = Planner(store, cpu, lambda pid: held.get(pid, 0))
    alone = planner.plan(first, {})
    assert alone.fits
    assert (alone.available_bytes, alone.recorded_from) == (room, cpu.recorded_from)
    planner.promise({"first": first}, {})
    beside = planner.plan(second, {"first": 0})
    assert beside.available_bytes == alone.available_bytes - alone.total_bytes
    assert not beside.fits
    held["7"] = alone.total_bytes  # it holds all of it now: the machine's own figure has that already
    assert planner.plan(second, {"first": 7}).fits
    assert (
        planner.plan(first, {"first": 7}).available_bytes == room + alone.total_bytes
    )  # it makes room for itself
    assert planner.plan(second, {}).available_bytes == room  # what has failed is owed nothing
    planner.promise({}, {})
    assert planner.plan(second, {"first": 0}).available_bytes == room


def test_two_deployments_promised_in_one_go_are_both_counted(
    cpu: Inventory, tiny_store: tuple[Path, engine_pb2.FileSet]
) -> None:
    planner = Planner(tiny_store[0], cpu, lambda pid: 0)
    both = {name: deployment(tiny_store[1], name) for name in ("a", "b")}
    planner.promise(both, {})
    one = planner.plan(deployment(tiny_store[1], "c"), {"a": 0}).available_bytes
    two = planner.plan(deployment(tiny_store[1], "c"), {"a": 0, "b": 0}).available_bytes
    assert one > two


def test_a_worker_is_told_as_many_pages_as_were_planned(tiny_store: tuple[Path, engine_pb2.FileSet]) -> None:
    store, files = tiny_store
    planner = Planner(store)
    asked = engine_pb2.Deployment(name="notes", files=files)
    planner.promise({"notes": asked}, {})
    told = planner.complete(asked)
    assert told.options.kv_blocks == planner.plan(asked, {}).options.kv_blocks > 0
    assert asked.options.kv_blocks == 0
    other = engine_pb2.Deployment(name="other", files=files)
    assert planner.complete(other) == other


def test_a_plan_on_a_cuda_device_counts_its_memory_and_the_hosts_apart(
    cpu: Inventory, tiny_store: tuple[Path, engine_pb2.FileSet]
) -> None:
    cpu.cpu.memory_available_bytes = 8 * GIB
    planner = Planner(tiny_store[0], cpu)
    for asked, named in ((deployment(tiny_store[1]), "GPU-a"), (on_gpu(tiny_store[1]), "")):
        plan = planner.plan(asked, {}, named)
        assert (plan.device, plan.options.device, plan.options.backend) == ("GPU-a", "GPU-a", "triton")
        assert (plan.fits, plan.recorded_from) == (True, cpu.recorded_from)
        assert plan.available_bytes == 4 * GIB
        parts = (
            plan.weights_bytes + plan.kv_bytes + plan.activation_bytes + plan.loading_bytes + plan.process_bytes
        )
        assert plan.total_bytes == parts
        assert plan.host_available_bytes == planner.plan(deployment(tiny_store[1]), {}, "cpu").available_bytes
        assert plan.host_total_bytes > 0
        assert "on GPU-a; of the host" in plan.summary


def test_what_does_not_fit_on_the_device_or_on_the_host_is_told_which(
    cpu: Inventory, tiny_store: tuple[Path, engine_pb2.FileSet]
) -> None:
    cpu.cpu.memory_available_bytes = 8 * GIB
    planner = Planner(tiny_store[0], cpu)
    large = planner.plan(on_gpu(tiny_store[1], kv_blocks=2**22), {})
    assert (large.fits, "lower kv_blocks" in large.advice) == (False, True)
    cpu.cpu.memory_available_bytes = 1
    short = planner.plan(on_gpu(tiny_store[1]), {})
    assert (short.fits, "memory of the host" in short.advice) == (False, True)


def test_deployments_on_a_device_are_promised_its_memory_and_of_the_hosts_what_they_load_with(
    cpu: Inventory, tiny_store: tuple[Path, engine_pb2.FileSet]
) -> None:
    store, files = tiny_store
    cpu.cpu.memory_available_bytes = 8 * GIB
    planner = Planner(store, cpu, lambda pid: 0)
    first = on_gpu(files)
    alone = planner.plan(first, {})
    planner.promise({"notes": first}, {})
    beside = planner.plan(on_gpu(files, "second"), {"notes": 0})
    assert beside.available_bytes == alone.available_bytes - alone.total_bytes
    assert beside.host_available_bytes == alone.host_available_bytes - alone.host_total_bytes
    shown = {device.id: device.memory_available_bytes for device in planner.inventory({"notes": 0}).devices}
    assert shown["GPU-a"] == beside.available_bytes
    on_cpu = planner.plan(deployment(files, "other"), {"notes": 0})
    assert on_cpu.available_bytes == beside.host_available_bytes
    gpu = cpu.devices[1]
    gpu.memory_available_bytes -= alone.total_bytes  # its worker holds all of it now
    assert planner.plan(on_gpu(files, "second"), {"notes": 7}).available_bytes == gpu.memory_available_bytes
    assert planner.plan(first, {"notes": 7}).available_bytes == alone.available_bytes  # it makes room for itself


@pytest.mark.parametrize(
    ("changed", "asked", "code", "named"),
    [
        ({}, {"device": "GPU-none"}, "DEVICE_NOT_FOUND", "there is no device GPU-none"),
        ({"compute_capability": "7.5"}, {}, "DEVICE_UNSUPPORTED", "compute capability 7.5; the kernels need 8.0"),
        ({"compute_capability": "8.6"}, {"kv_dtype": "float8"}, "DEVICE_UNSUPPORTED", "no float8"),
        ({"memory_available_bytes": 0}, {}, "DEVICE_UNSUPPORTED", "belongs to its slices"),
        ({}, {"backend": "native"}, "OPTIONS_INVALID", "computes on the CPU"),
    ],
)
def test_a_device_that_cannot_serve_is_refused_by_name(
    cpu: Inventory,
    tiny_store: tuple[Path, engine_pb2.FileSet],
    changed: dict[str, Any],
    asked: dict[str, Any],
    code: str,
    named: str,
) -> None:
    cpu.devices[1].MergeFrom(engine_pb2.Device(**changed))
    cpu.devices[1].memory_available_bytes = changed.get("memory_available_bytes", 4 * GIB)
    with pytest.raises(EngineError, match=named) as error:
        Planner(tiny_store[0], cpu).plan(on_gpu(tiny_store[1], **asked), {})
    assert error.value.code == code


def test_only_a_worker_of_a_cuda_device_sees_it(tmp_path: Path) -> None:
    places = tmp_path, tmp_path, b"", 1.0, 1.0, (), None
    seen = {
        (role, device): ChildSpec(role, "notes", *places, device).environment["CUDA_VISIBLE_DEVICES"]
        for role in ("worker", "text")
        for device in ("GPU-a", "")
    }
    assert seen == {("worker", "GPU-a"): "GPU-a", ("worker", ""): "", ("text", "GPU-a"): "", ("text", ""): ""}


def test_files_that_tell_nothing_are_promised_nothing(cpu: Inventory, tmp_path: Path) -> None:
    planner = Planner(tmp_path, cpu)
    lost = engine_pb2.Deployment(
        name="x", files=engine_pb2.FileSet(files=[engine_pb2.File(path="config.json", size=1, sha256="ab" * 32)])
    )
    planner.promise({"x": lost}, {})
    assert planner.inventory({"x": 0}).cpu.memory_available_bytes == GIB // 2
    with pytest.raises(EngineError) as error:
        planner.plan(lost, {})
    assert error.value.code == "FILE_MISSING"


async def test_a_driver_that_hangs_delays_no_plan(
    tiny_store: tuple[Path, engine_pb2.FileSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wakes = threading.Event()

    def hang() -> Inventory:
        wakes.wait(60)
        return Inventory((cpu_device(),))

    monkeypatch.setattr(planning, "measure", hang)
    service = HostService(tmp_path, tiny_store[0])
    context: Any = None  # which only a refusal would need
    asked = [
        asyncio.create_task(service.GetInventory(engine_pb2.GetInventoryRequest(), context)) for _ in range(40)
    ]  # more than there are threads to wait in
    try:
        wanted = engine_pb2.PlanDeploymentRequest(deployment=deployment(tiny_store[1]))
        answer = await service.PlanDeployment(wanted, context)
        assert answer.plan.total_bytes > 0
        assert not any(task.done() for task in asked)
    finally:
        wakes.set()
    assert {answer.devices[0].id for answer in await asyncio.gather(*asked)} == {"cpu"}
