"""A GPU that is not there, for the tests: leanattn's compiled part for the emulator, and as much of
torch.cuda as emulates easily; the rest skips the test that asks for it. See gpu.h."""

import contextlib
import ctypes
import functools
import itertools
import sys
import threading
from importlib.util import spec_from_file_location

import pytest
import torch
from native.build import build_emulated_gpu

NOT_EMULATED = [
    "_sleep",
    "current_device",
    "get_device_properties",
    "reset_peak_memory_stats",
    "set_sync_debug_mode",
]


class EmulatedCuda(str):
    """The device "cuda" to a test, and "cpu" to torch."""

    def __new__(cls):
        return super().__new__(cls, "cpu")

    def __eq__(self, other):
        return other == "cuda"

    def __ne__(self, other):
        return other != "cuda"

    def __hash__(self):
        return hash("cuda")

    def __format__(self, spec):
        return format("cuda", spec)


class EmulatedGpu:
    """Takes the place of leanattn._C and of torch.cuda, for the rest of the process."""

    def __init__(self, folder):
        self._path = build_emulated_gpu(folder)
        sys.meta_path.insert(0, self)
        self.device = EmulatedCuda()
        self._library = ctypes.CDLL(str(self._path))
        self._library.emulated_gpu_launches.restype = ctypes.c_char_p
        self._library.emulated_gpu_tensor_copies.restype = ctypes.c_int64
        for name in ("new_stream", "set_stream", "own_counters"):
            getattr(self._library, f"emulated_gpu_{name}").restype = ctypes.c_void_p
        self._free_memory = ctypes.c_int64.in_dll(self._library, "emulated_gpu_free_memory")
        for name in NOT_EMULATED:
            setattr(torch.cuda, name, self._skip(name))
        EmulatedStream.library = EmulatedGraph.library = self._library
        torch.cuda.Stream = EmulatedStream
        torch.cuda.stream = EmulatedStream.use
        torch.cuda.current_stream = EmulatedStream.current
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.mem_get_info = lambda device=None: (self._free_memory.value, 64 << 20)
        torch.cuda.get_device_capability = self._capability
        torch.cuda.CUDAGraph = EmulatedGraph
        torch.cuda.graph = EmulatedGraph.capture

    def find_spec(self, name, *_):
        """Of sys.meta_path: where leanattn._C is."""
        return spec_from_file_location(name, self._path) if name == "leanattn._C" else None

    def launched(self, call):
        """cases.launched."""
        call()
        self._library.emulated_gpu_launches()
        call()
        return self._library.emulated_gpu_launches().decode().split()

    def tensor_copies(self, call):
        """How many bulk tensor copies `call` makes."""
        before = self._library.emulated_gpu_tensor_copies()
        call()
        return self._library.emulated_gpu_tensor_copies() - before

    def own_counters(self, n=1, device=0):
        """Where the counters of a launch on the current stream are, None for nowhere. Only these
        know of other devices."""
        return self._library.emulated_gpu_own_counters(n, device)

    @contextlib.contextmanager
    def full(self):
        """Without any free memory."""
        free, self._free_memory.value = self._free_memory.value, 0
        yield
        self._free_memory.value = free

    def _capability(self, device=None):
        return divmod(self._library.emulated_gpu_capability(), 10)

    @staticmethod
    def _skip(name):
        def skip(*_, **__):
            pytest.skip(f"needs torch.cuda.{name}, which the emulated GPU does not have")

        return skip


class EmulatedStream:
    """torch.cuda.Stream. What is asked of any is done at once, or captured."""

    library = None
    _in_use = threading.local()

    def __init__(self, device=None, priority=0):
        self._handle = ctypes.c_void_p(self.library.emulated_gpu_new_stream())

    @classmethod
    def current(cls, device=None):
        return getattr(cls._in_use, "stream", None) or cls._default()

    @classmethod
    @functools.cache
    def _default(cls):
        default = cls.__new__(cls)
        default._handle = ctypes.c_void_p(None)
        return default

    @contextlib.contextmanager
    def use(self):
        previous, self._in_use.stream = self.current(), self
        self.library.emulated_gpu_set_stream(self._handle)
        try:
            yield self
        finally:
            self._in_use.stream = previous
            self.library.emulated_gpu_set_stream(previous._handle)

    def wait_stream(self, other):
        self.library.emulated_gpu_wait(self._handle, other._handle)

    def synchronize(self):
        pass

    def __del__(self):
        if self._handle.value:
            self.library.emulated_gpu_destroy_stream(self._handle)


class EmulatedGraph:
    """torch.cuda.CUDAGraph, of leanattn's own launches."""

    library = None
    _numbers = itertools.count()
    _stream = None  # that torch.cuda.graph captures on if none is named

    def __init__(self):
        self._number = ctypes.c_int64(next(self._numbers))

    @contextlib.contextmanager
    def capture(self, pool=None, stream=None, capture_error_mode="global"):
        if stream is None:
            stream = EmulatedGraph._stream = EmulatedGraph._stream or EmulatedStream()
        with stream.use():
            self.library.emulated_gpu_begin_capture(self._number)
            try:
                yield
            finally:
                self.library.emulated_gpu_end_capture()

    def replay(self):
        self.library.emulated_gpu_replay(self._number)

    def __del__(self):
        self.library.emulated_gpu_forget(self._number)
