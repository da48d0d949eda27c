"""Devices, loaders and dtypes of the suite: `device` alone runs a test on the CPU and on CUDA;
`loader` beside it runs CUDA once a loader; `dtype` runs every dtype that the device takes.

With --emulated-gpu the tests marked gpu run, and no others, on a GPU that is emulated on the CPU:
see emulator/gpu.h."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Read as torch is loaded: one worker's threads must not spin on the cores of the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

LOADERS = {"cpu": [None], "cuda": ["tma", "cp_async"]}
DTYPES = {
    "cpu": [torch.float32, torch.float16, torch.bfloat16],
    "cuda": [torch.float16, torch.bfloat16],
}
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def pytest_addoption(parser):
    parser.addoption("--emulated-gpu", action="store_true", help="run the tests marked gpu, on one")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, which may be emulated")
    config.addinivalue_line("markers", "not_emulated: tests what an emulated GPU does not have")
    if not config.getoption("emulated_gpu"):
        return
    from emulator.gpu import EmulatedGpu
    from native.build import emulator_options

    if emulator_options() is None:
        pytest.exit("--emulated-gpu needs CUDA's headers, found by nvcc, which is not there", 0)
    # Before any test imports leanattn, whose compiled part it takes the place of.
    config.emulated_gpu = EmulatedGpu(native_folder(config))
    import cases

    cases.launched = config.emulated_gpu.launched


def pytest_collection_modifyitems(config, items):
    if config.getoption("emulated_gpu"):
        left_out = [item for item in items if item.get_closest_marker("gpu") is None]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_generate_tests(metafunc):
    """One parameter set for each device, loader and dtype that exist together."""
    columns = [name for name in ("device", "loader", "dtype") if name in metafunc.fixturenames]
    if "device" not in columns:
        return
    gpu_only = metafunc.definition.get_closest_marker("gpu") is not None
    rows = {}
    for device in ["cuda"] if gpu_only else ["cpu", "cuda"]:
        for loader in LOADERS[device]:
            for dtype in DTYPES[device]:
                values = {"device": device, "loader": loader, "dtype": dtype}
                names = {**values, "dtype": DTYPE_NAMES[dtype]}
                label = "-".join(names[column] for column in columns if names[column])
                marks = [pytest.mark.gpu] if device == "cuda" else []
                row = [values[column] for column in columns]
                rows.setdefault(label, pytest.param(*row, marks=marks, id=label))
    indirect = [column for column in columns if column != "dtype"]
    metafunc.parametrize(columns, list(rows.values()), indirect=indirect)


@pytest.fixture
def device(request):
    """ "cpu", or "cuda" where there is one."""
    if request.config.getoption("emulated_gpu"):
        if request.node.get_closest_marker("not_emulated"):
            pytest.skip("needs what an emulated GPU does not have")
        return request.config.emulated_gpu.device
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def emulated_gpu(request):
    """The emulated GPU, for what no test sees of a real one."""
    if not request.config.getoption("emulated_gpu"):
        pytest.skip("looks into an emulated GPU")
    return request.config.emulated_gpu


@pytest.fixture
def loader(request, monkeypatch):
    """Force one of the two ways in which the CUDA kernel fetches K and V."""
    name = getattr(request, "param", None)
    if name is not None:
        monkeypatch.setenv("LEANATTN_LOADER", name)
    return name


@pytest.fixture
def force_units(monkeypatch):
    """A function that fixes the number of units (CTAs, or shares on the CPU) of later calls."""

    def force(count):
        monkeypatch.setenv("LEANATTN_NUM_UNITS", str(count))

    return force


@pytest.fixture
def repeats(request):
    """How often to run what must give the same bits each time, though things happen in another
    order: on a GPU they rarely do, on an emulated one always."""
    return 3 if request.config.getoption("emulated_gpu") else 50


@pytest.fixture
def run_python(tmp_path):
    """A function that runs this Python with these arguments in an empty folder, and gives the
    finished process. In the root `import leanattn` would find the sources, which lack the compiled
    part, and not the package that is installed."""

    def run(*arguments, **environment):
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True,
            timeout=300, env={**os.environ, **environment},
        )  # fmt: skip

    return run


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test draws the same numbers in every run and in every order."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """torch on one thread: tiny models only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def native_folder(config):
    """Where compiled C++ is kept."""
    cache = getattr(config, "cache", None)
    return cache.mkdir("native") if cache else Path(tempfile.mkdtemp(prefix="native"))


@pytest.fixture(scope="session")
def headers(request):
    """The C++ headers that the kernels include, as a Python module; see native/headers.cpp."""
    from native.build import load_module

    source = Path(__file__).parent / "native" / "headers.cpp"
    return load_module(source, native_folder(request.config))


@pytest.fixture(scope="session")
def build_emulated(request):
    """A function that compiles CUDA kernels for an emulator, into a Python module's library: see
    emulator/emulator.h."""
    from native.build import EMULATOR, build_module, emulator_options

    options = emulator_options()
    if options is None:
        pytest.skip("needs CUDA's headers")
    folder = native_folder(request.config)
    return lambda name, *more: build_module(EMULATOR / f"{name}.cpp", folder, *options, *more)


@pytest.fixture(scope="session")
def load_emulated(build_emulated):
    """A function that gives such a module."""
    from native.build import import_module

    return lambda name, *options: import_module(build_emulated(name, *options), name)


@pytest.fixture(scope="session")
def emulated_kernel(load_emulated):
    """The decode kernel."""
    return load_emulated("emulated_kernel")
