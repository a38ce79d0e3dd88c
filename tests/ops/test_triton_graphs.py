"""Which launches become CUDA graphs, and what the driver is asked for: with a driver that notes it, and no GPU."""

from __future__ import annotations

import ctypes
import gc
import threading
import warnings

import pytest
import torch

from efficient_densenet.ops.triton import graphs

LAUNCHES = 100  # of each key below


class Captured:
    """In place of a graph. Its launches are what `start` returns."""

    def __init__(self, start):
        self.starts = start(17)

    def replay(self, stream):
        if self.starts == "no replay":
            raise torch.OutOfMemoryError("there is none left")


@pytest.fixture
def captured(monkeypatch):
    """The keys of all captures, in their order."""
    keys = []

    def graph(start):
        keys.append(start.key)
        return Captured(start)

    monkeypatch.setattr(graphs, "Graph", graph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return keys


def replayed(made, key, launches=LAUNCHES, start=lambda stream: None):
    def started(stream):
        return start(stream)

    started.key = key
    return made.replayed(key, launches, started, 0)


def test_addresses_that_repeat_become_graphs(captured):
    made = graphs.Graphs()
    assert [replayed(made, 1) for _ in range(4)] == [False, True, True, True] and captured == [1]
    assert not any(replayed(made, key, launches=1) for key in (2, 2, 2)) and captured == [1]


@pytest.mark.parametrize("blocks", [1, 5, 16, 40])
def test_identical_blocks_are_captured_once_each(blocks, captured):
    """They share a recording, and each has addresses of its own, which come back in each step."""
    made = graphs.Graphs()
    steps = [[replayed(made, ("a recording", block)) for block in range(blocks)] for _ in range(6)]
    assert steps == [[False] * blocks] + 5 * [[True] * blocks]
    assert captured == [("a recording", block) for block in range(blocks)]


def test_addresses_that_do_not_repeat_are_neither_captured_nor_remembered_for_ever(captured):
    made = graphs.Graphs()
    assert not any(replayed(made, key) for key in range(2 * graphs._MOST_SEEN))
    assert not captured and len(made._seen) == graphs._MOST_SEEN


def test_what_has_no_room_is_not_captured(captured):
    """As many as there is room for are graphs, and stay it; all others start kernel by kernel, without a capture."""
    made, room = graphs.Graphs(), graphs._MOST_LAUNCHES // LAUNCHES
    for step in range(5):
        found = [replayed(made, key) for key in range(room + 10)]
        assert sum(found) == (room if step else 0)
    assert captured == list(range(room)) and made._launches == room * LAUNCHES
    assert not any(replayed(made, "large", graphs._MOST_LAUNCHES + 1) for _ in range(3))


def test_graphs_that_nobody_replays_make_room(captured, monkeypatch):
    """As after the size of the images has changed."""
    monkeypatch.setattr(graphs, "_UNUSED", 50)
    made, room = graphs.Graphs(), graphs._MOST_LAUNCHES // LAUNCHES
    first, second = ([(size, block) for block in range(room)] for size in (224, 256))
    for key in (*first, *first):
        replayed(made, key)
    for _ in range(5):
        found = [replayed(made, key) for key in second]
    assert all(found) and captured == [*first, *second] and made._launches == room * LAUNCHES
    assert len(made._kept) == room


def test_launches_go_into_the_graph_of_somebody_else(captured, monkeypatch):
    made = graphs.Graphs()
    assert replayed(made, 1) + replayed(made, 1) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not replayed(made, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert replayed(made, 1)
    monkeypatch.setattr(torch.version, "hip", "7.0")  # where no graph has been tried
    assert not replayed(made, 1)


@pytest.mark.parametrize("failing", ["capture", "replay"])
def test_without_memory_for_a_graph_kernels_start_one_by_one(failing, captured):
    """With one warning, and few are tried. Those that there are go on."""
    made = graphs.Graphs()
    assert replayed(made, "before") + replayed(made, "before") == 1

    def start(stream):
        if failing == "capture":
            raise torch.OutOfMemoryError("there is none left")
        return "no replay"

    with pytest.warns(
        UserWarning, match="a CUDA graph of them cannot be made or replayed: there is none left"
    ) as caught:
        assert not any(replayed(made, key, start=start) for _ in range(3) for key in range(10))
    assert len(caught) == 1 and len(captured) == 1 + graphs._MOST_FAILURES
    assert replayed(made, "before") and made._launches == LAUNCHES


def test_what_ends_a_capture_once_does_not_forbid_the_next(captured):
    made, attempts = graphs.Graphs(), []

    def start(stream):
        attempts.append(stream)
        if len(attempts) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(UserWarning, match="not permitted"):
        assert [replayed(made, 1, start=start) for _ in range(4)] == [False, False, True, True]


class Driver:
    """Notes what it is asked for, through the conventions of C; one function may fail."""

    def __init__(self, failing=None):
        self.asked, self.handles = [], iter(range(2**40, 2**41))  # more than 32 bits, as handles are
        for name, types in graphs._ARGUMENTS.items():
            function = ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._answer(name, name == failing))
            setattr(self, name, function)

    def _answer(self, name, fails):
        def answer(*arguments):
            if name == "cuGetErrorString":
                arguments[1][0] = b"the capture was invalidated"
                return 0
            given = []
            for argument in arguments:
                if isinstance(argument, ctypes._Pointer):
                    argument[0] = None if fails else next(self.handles)
                    argument = argument[0]
                given.append(argument)
            self.asked.append((name, *given))
            return 901 if fails else 0

        return answer


@pytest.fixture
def driver(monkeypatch):
    def use(failing=None):
        found = Driver(failing)
        monkeypatch.setattr(graphs, "_driver", lambda: found)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        graphs._stream.cache_clear()
        return found

    yield use
    graphs._stream.cache_clear()


def test_what_the_driver_is_asked_for(driver):
    """Handles keep their 64 bits, the capture is that of a stream of our own, and nothing is left."""
    found, started = driver(), []
    graph = graphs.Graph(started.append)
    graph.replay(2**41 + 5)
    graph.replay(0)
    del graph
    gc.collect()
    stream, captured, executable = (2**40 + i for i in range(3))
    assert started == [stream]
    assert found.asked == [
        ("cuStreamCreate", stream, 1),
        ("cuStreamBeginCapture_v2", stream, 1),
        ("cuStreamEndCapture", stream, captured),
        ("cuGraphInstantiateWithFlags", executable, captured, 0),
        ("cuGraphDestroy", captured),
        ("cuGraphLaunch", executable, 2**41 + 5),
        ("cuGraphLaunch", executable, None),
        ("cuGraphExecDestroy", executable),
    ]
    found.asked.clear()
    graphs.Graph(started.append)
    assert found.asked[0][0] == "cuStreamBeginCapture_v2" and started == [stream, stream]


@pytest.mark.parametrize(
    ("failing", "after"),
    [
        ("cuStreamBeginCapture_v2", []),
        ("cuStreamEndCapture", []),
        ("cuGraphInstantiateWithFlags", ["cuGraphDestroy"]),
        (None, ["cuStreamEndCapture", "cuGraphDestroy"]),  # a launch
    ],
)
def test_a_capture_that_fails_leaves_nothing(failing, after, driver):
    found = driver(failing)

    def start(stream):
        if failing is None:
            raise RuntimeError("a kernel does not start")

    with pytest.raises(RuntimeError, match="does not start" if failing is None else f"{failing}: the capture was"):
        graphs.Graph(start)
    names = [name for name, *_ in found.asked]
    assert names[names.index(failing or "cuStreamBeginCapture_v2") + 1 :] == after


def test_a_driver_that_is_not_known_leaves_the_kernels(monkeypatch):
    def missing():
        raise AttributeError("undefined symbol: cuGraphInstantiateWithFlags")

    monkeypatch.setattr(graphs, "_driver", missing)
    monkeypatch.setattr(graphs, "_stream", lambda device: 17)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = graphs.Graphs()
    with pytest.warns(UserWarning, match="undefined symbol"):
        assert not any(replayed(made, 1) for _ in range(4))


def test_threads_capture_each_key_once(captured):
    made, results = graphs.Graphs(), []

    def run():
        for _ in range(50):
            for key in range(20):
                results.append(replayed(made, key))

    threads = [threading.Thread(target=run) for _ in range(4)]
    with warnings.catch_warnings(action="error"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(captured) == list(range(20)) and results.count(False) == 20
