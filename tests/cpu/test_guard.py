"""What the guard sees, without a GPU: lines by frame, calls inside calls, threads, what allow covers."""

import ctypes
import functools
import subprocess
import threading

import pytest
import torch

from dsv4.engine.guard import allow, allowed, cupti, structs
from dsv4.engine.guard.calls import CallLog, Sighting, judged
from dsv4.engine.guard.copies import Operands
from dsv4.engine.guard.watch import Watch, _install_hook
from dsv4.engine.guard.where import Where, here, is_internal, places, shown_path

# ------------------------------------------------------------------------------------------------------------- where


def line_of(function) -> int:
    return function.__code__.co_firstlineno


def test_a_callback_names_the_line_behind_a_c_call():
    seen = []
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda a, b: seen.append(here()) or 0)

    def calls_c():
        ctypes.CDLL(None).qsort((ctypes.c_int * 2)(2, 1), 2, 4, compare)

    calls_c()
    stack = seen[0].stack
    assert stack[0].endswith("<lambda>") and stack[1] == f"tests/cpu/test_guard.py:{line_of(calls_c) + 1} calls_c"
    assert seen[0].thread == "MainThread"


def test_a_thread_that_python_did_not_start_has_no_line():
    libc = ctypes.CDLL(None)
    look = functools.cache(here)  # callable from C without a Python frame of its own
    routine = ctypes.CFUNCTYPE(None)(look)
    thread = ctypes.c_void_p()
    assert libc.pthread_create(ctypes.byref(thread), None, routine, None) == 0
    assert libc.pthread_join(thread, None) == 0
    where = look()
    assert where.place == "no Python frame" and "not started by Python" in where.thread
    assert "no Python frame on thread" in str(where)


def test_internal_frames_are_passed_over():
    assert is_internal(torch.__file__) and is_internal(threading.__file__) and is_internal("<string>")
    assert is_internal(cupti.__file__) and not is_internal(__file__) and not is_internal(pytest.__file__)
    frames = [(cupti.__file__, 1, "call"), (torch.__file__, 2, "item"), (__file__, 3, "step"), (__file__, 4, "main")]
    assert places(frames) == ("tests/cpu/test_guard.py:3 step", "tests/cpu/test_guard.py:4 main")
    assert places(frames[:2]) == (f"{shown_path(torch.__file__)}:2 item",), "the innermost line where all is internal"


def test_paths_outside_the_repository_are_cut():
    assert shown_path("/usr/local/lib/python3.12/dist-packages/pack/mod.py") == "dist-packages/pack/mod.py"


# ------------------------------------------------------------------------------------------------------------- calls

NAMES = {cupti.DRIVER: {1: "cuMemAlloc_v2", 2: "cuGraphLaunch", 3: "cuStreamSynchronize", 4: "cuMemcpyHtoDAsync_v2"},
         cupti.RUNTIME: {1: "cudaMalloc_v3020", 2: "cudaGraphLaunch_v10000", 3: "cudaLaunchKernel_v7000",
                         4: "cudaMemcpyAsync_v3020", 5: "cudaGetDevice_v3020"}}  # fmt: skip


def call(log, domain, cbid, *inside, params=None, name=b""):
    """One API call with what happens inside it, as CUPTI tells of it."""
    for site in (0, 1):
        if site:
            for action in inside:
                action()
        data = structs.CallbackData(site=site, function_name=name, params=params)
        log(domain, cbid, ctypes.addressof(data))


def test_calls_inside_calls_are_told_once():
    log = CallLog(NAMES)
    call(log, cupti.RUNTIME, 1, lambda: call(log, cupti.DRIVER, 1))
    call(log, cupti.DRIVER, 1)
    assert log.calls == {"cudaMalloc": 1, "cuMemAlloc": 1}
    assert [seen.name for seen in log.sightings] == ["cudaMalloc", "cuMemAlloc"]


def test_graph_launches_are_counted_and_what_they_hide_is_seen():
    log = CallLog(NAMES)
    call(log, cupti.RUNTIME, 2, lambda: call(log, cupti.DRIVER, 2, lambda: call(log, cupti.DRIVER, 3)))
    call(log, cupti.DRIVER, 2)
    assert log.graph_launches == 2
    assert [(seen.kind, seen.name) for seen in log.sightings] == [("sync", "cuStreamSynchronize")]


def test_a_quiet_call_is_counted_only():
    log = CallLog(NAMES)
    call(log, cupti.RUNTIME, 5)
    assert log.calls == {"cudaGetDevice": 1} and not log.sightings


def test_a_call_newer_than_the_library_is_known_by_what_it_says_of_itself():
    log = CallLog(NAMES)
    call(log, cupti.RUNTIME, 99, name=b"cudaMallocSomewhere")
    assert [(seen.kind, seen.name) for seen in log.sightings] == [("alloc", "cudaMallocSomewhere")]


def test_loads_and_waits_without_a_call_of_their_own():
    log = CallLog(NAMES)
    call(log, cupti.RUNTIME, 2, lambda: log(cupti.RESOURCE, cupti.MODULE_LOADED, 0))
    call(log, cupti.RUNTIME, 5, lambda: log(cupti.SYNCHRONIZE, 1, 0))
    call(log, cupti.DRIVER, 3, lambda: log(cupti.SYNCHRONIZE, 1, 0))  # told by the call itself
    assert [(seen.kind, seen.name) for seen in log.sightings] == [
        ("load", "a module was loaded inside cudaGraphLaunch"),
        ("sync", "the host waited for the device inside cudaGetDevice"),
        ("sync", "cuStreamSynchronize"),
    ]


def test_an_exit_without_its_entry_is_harmless():
    log = CallLog(NAMES)
    data = structs.CallbackData(site=1)
    log(cupti.RUNTIME, 1, ctypes.addressof(data))
    call(log, cupti.RUNTIME, 5)
    assert log.calls == {"cudaGetDevice": 1}


def test_threads_are_told_apart():
    log = CallLog(NAMES)

    def library():
        call(log, cupti.RUNTIME, 1)

    worker = threading.Thread(target=lambda: library(), name="a library's worker")
    call(log, cupti.RUNTIME, 2, worker.start, worker.join)  # another thread is inside a graph launch
    (seen,) = log.sightings
    assert (seen.kind, seen.where.thread) == ("alloc", "a library's worker")
    assert any(place.startswith(f"tests/cpu/test_guard.py:{line_of(library) + 1} ") for place in seen.where.stack)


def test_what_a_capture_records_is_kept_in_order():
    log = CallLog(
        {cupti.RUNTIME: {**NAMES[cupti.RUNTIME], 6: "cudaStreamBeginCapture_v10000", 7: "cudaMallocAsync_v11020"}}
    )
    for cbid in (3, 6, 3, 1, 5, 7, 4):
        call(log, cupti.RUNTIME, cbid)
    assert [(made.kind, made.name) for made in log.captured] == [
        ("kernel", "cudaLaunchKernel"),
        ("alloc", "cudaMallocAsync"),
        ("copy", "cudaMemcpyAsync"),
    ]


def test_captured_nodes_keep_their_line():
    log = CallLog(NAMES)
    graph = structs.GraphData(node=0x77, node_type=0)
    data = structs.ResourceData(descriptor=ctypes.addressof(graph))
    log(cupti.RESOURCE, cupti.NODE_CREATED, ctypes.addressof(data))
    where, reason = log.nodes[0x77]
    assert where.place.startswith("tests/cpu/test_guard.py:") and reason is None


def seen(name, copied=None, kind="copy", reason=None):
    return Sighting(kind, name, Where(("a.py:1 f",)), reason, copied)


def test_copies_are_judged_by_form_and_memory():
    memory = {1: "device", 2: "pinned", 3: "pageable"}.__getitem__
    assert judged([seen("cudaMemcpyAsync", Operands((1, 2), 8))], memory) == []
    (pageable,) = judged([seen("cudaMemcpyAsync", Operands((1, 3), 8))], memory)
    assert pageable.kind == "pageable copy" and "8 bytes" in pageable.what and pageable.where.place == "a.py:1"
    (waits,) = judged([seen("cudaMemcpy", Operands((1, 2), 8))], memory)
    assert waits.kind == "sync" and "waits" in waits.what
    (unread,) = judged([seen("cudaMemcpyToArrayAsync")], memory)
    assert "cannot read" in unread.what
    (sync,) = judged([seen("cuStreamSynchronize", kind="sync", reason="the first token")], memory)
    assert sync.kind == "sync" and sync.allowed == "the first token"


def test_what_a_listener_raises_is_kept_not_thrown_into_c():
    subscription = cupti.Subscription(None, lambda domain, cbid, data: 1 / 0)
    subscription._callback(None, 1, 1, None)
    assert [type(error) for error in subscription.errors] == [ZeroDivisionError]


# ------------------------------------------------------------------------------------------------------------- allow


def test_allow_gives_the_reason_to_its_own_thread():
    other = []
    with allow(reason="warm up"), allow(reason="inner"):
        assert allowed.reason_here() == "inner"
        thread = threading.Thread(target=lambda: other.append(allowed.reason_here()))
        thread.start()
        thread.join()
    assert allowed.reason_here() is None and other == [None]


def test_allow_wants_a_reason():
    with pytest.raises(ValueError, match="allow needs a reason"):
        allow(reason=" ")


def test_allow_ends_when_the_code_inside_fails():
    with pytest.raises(ZeroDivisionError), allow(reason="warm up"):
        1 / 0  # noqa: B018
    assert allowed.reason_here() is None


def test_a_process_started_in_a_watched_stretch_is_found(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(watch, "allow_begins", lambda reason: None)
    monkeypatch.setattr(watch, "allow_ends", lambda: None)
    _install_hook()
    _install_hook()  # one hook, however often
    allowed.LISTENERS.append(watch)
    try:
        subprocess.run(["true"], check=True)
        with allow(reason="a tool of the test"):
            subprocess.run(["true"], check=True)
    finally:
        allowed.LISTENERS.remove(watch)
    subprocess.run(["true"], check=True)
    first, second = [finding for finding in watch._processes if finding.kind == "process"]
    assert first.what == "a process was started: true" and first.where.place.startswith("tests/cpu/test_guard.py:")
    assert (first.allowed, second.allowed) == (None, "a tool of the test")
