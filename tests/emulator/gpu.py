"""A GPU that is not there, for the tests: leanattn's compiled part for the emulator, and as much of
torch.cuda as emulates easily; the rest skips the test that asks for it. See gpu.h."""

import contextlib
import ctypes
import itertools
import sys
from importlib.util import spec_from_file_location

import pytest
import torch
from native.build import build_emulated_gpu

NOT_EMULATED = [
    "current_device",
    "current_stream",
    "get_device_properties",
    "mem_get_info",
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
        for name in NOT_EMULATED:
            setattr(torch.cuda, name, self._skip(name))
        torch.cuda.Stream = type("Stream", (), {"__new__": self._skip("Stream")})
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.get_device_capability = self._capability
        torch.cuda.CUDAGraph = EmulatedGraph
        EmulatedGraph.library = self._library
        torch.cuda.graph = contextlib.contextmanager(lambda graph: graph.capture())

    def find_spec(self, name, *_):
        """Of sys.meta_path: where leanattn._C is."""
        return spec_from_file_location(name, self._path) if name == "leanattn._C" else None

    def launched(self, call):
        """cases.launched."""
        self._library.emulated_gpu_launches()
        call()
        return self._library.emulated_gpu_launches().decode().split()

    def tensor_copies(self, call):
        """How many bulk tensor copies `call` makes."""
        before = self._library.emulated_gpu_tensor_copies()
        call()
        return self._library.emulated_gpu_tensor_copies() - before

    def _capability(self, device=None):
        return divmod(self._library.emulated_gpu_capability(), 10)

    @staticmethod
    def _skip(name):
        def skip(*_, **__):
            pytest.skip(f"needs torch.cuda.{name}, which the emulated GPU does not have")

        return skip


class EmulatedGraph:
    """torch.cuda.CUDAGraph, of leanattn's own launches."""

    library = None
    numbers = itertools.count()

    def __init__(self):
        self._number = ctypes.c_int64(next(self.numbers))

    def capture(self):
        self.library.emulated_gpu_begin_capture(self._number)
        try:
            yield
        finally:
            self.library.emulated_gpu_end_capture()

    def replay(self):
        self.library.emulated_gpu_replay(self._number)

    def __del__(self):
        self.library.emulated_gpu_forget(self._number)
