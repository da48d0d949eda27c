"""csrc's folders are its layers: what each may include, by the #include lines of all its files.

docs/architecture.md shows the same in words, the README of each folder too.
"""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"

_CUDA = ("cuda", "cooperative_groups.h", "cute/", "cutlass/")
# Of each folder: the folders, or single files, that it may include, and how the headers from
# elsewhere begin that it may. The C++ standard library is everybody's.
LAYERS = {
    "core": (["core"], ()),
    "plan": (["core", "plan"], ()),
    "cpu": (["core", "plan", "cpu"], ("torch/headeronly/",)),
    "cuda/kernel": (["core", "cuda/kernel"], (*_CUDA, "emulated_ptx.h")),
    "cuda": (["core", "plan", "cuda", "cuda/kernel"], _CUDA),
    "cuda/instantiate": (["cuda/launch_kernel.h"], ()),
    "binding": (
        ["core", "plan", "cpu", "cuda", "binding"],
        ("torch/", "cuda_runtime.h", "dlfcn.h"),
    ),
    ".": (["binding"], ("torch/", "Python.h")),  # ops.cpp
}


def source_files():
    """Relative to csrc/, CUTLASS's excepted."""
    found = (p.relative_to(CSRC) for kind in ("h", "cpp", "cu") for p in CSRC.rglob(f"*.{kind}"))
    return {path for path in found if path.parts[0] != "cutlass"}


def wrong_includes(file, text, files):
    """What the file at `file` that holds `text` must not include, or not so, a sentence each."""
    folders, elsewhere = LAYERS[file.parent.as_posix()]
    for mark, name in re.findall(r'^\s*#\s*include\s*(["<])([^">]+)', text, re.M):
        if mark == "<":
            if not re.fullmatch(r"[a-z_]+", name) and not name.startswith(elsewhere):
                yield f"{file} must not include <{name}>"
            continue
        beside = file.parent / name
        target = beside if beside in files else Path(name)
        below = target.is_relative_to(file.parent) and file.parent != Path(".")
        written = target.relative_to(file.parent) if below else target
        if target not in files:
            yield f'{file} includes "{name}", which is neither beside it nor in csrc/'
        elif not {target.as_posix(), target.parent.as_posix()} & set(folders):
            yield f'{file} must not include "{name}"'
        elif name != written.as_posix():
            yield f'{file} must include "{name}" as "{written}"'


def test_every_include_goes_down():
    files = source_files()
    assert {file.parent.as_posix() for file in files} == LAYERS.keys()
    texts = {file: (CSRC / file).read_text() for file in files}
    assert [w for file, text in texts.items() for w in wrong_includes(file, text, files)] == []


@pytest.mark.parametrize(
    "file, include",
    [
        ("core/schedule.h", '"plan/cost_model.h"'),
        ("core/schedule.h", "<cuda_runtime.h>"),
        ("core/schedule.h", '"core/mask.h"'),  # "mask.h"
        ("plan/cost_model.h", "<torch/headeronly/core/ScalarType.h>"),
        ("plan/cost_model.h", '"cuda/launch.h"'),
        ("cpu/decode_cpu.cpp", "<torch/csrc/stable/ops.h>"),
        ("cpu/decode_cpu.cpp", '"cuda/launch.h"'),
        ("cpu/decode_cpu.cpp", '"../core/mask.h"'),
        ("cuda/launch.cu", '"cpu/decode_cpu.h"'),
        ("cuda/launch.cu", '"binding/check.h"'),
        ("cuda/launch.cu", "<torch/csrc/stable/tensor.h>"),
        ("cuda/kernel/mainloop.h", '"plan/cost_model.h"'),
        ("cuda/kernel/mainloop.h", '"cuda/launch.h"'),
        ("cuda/launch.cu", '"cuda/kernel/traits.h"'),  # "kernel/traits.h"
        ("cuda/instantiate/lean.cu", '"cuda/launch.h"'),
        ("binding/decode.cpp", '"ops.cpp"'),
        ("binding/decode.cpp", '"cuda/kernel/traits.h"'),
        ("binding/decode.cpp", "<cute/arch/util.hpp>"),
        ("binding/decode.cpp", '"no_such.h"'),
        ("ops.cpp", '"core/params.h"'),
    ],
)
def test_wrong_includes_are_found(file, include):
    """And in the same file, what is right is not."""
    text = f"// a file\n#include <vector>\n#  include {include}  // why\n"
    assert len(list(wrong_includes(Path(file), text, source_files()))) == 1


def test_every_folder_has_a_readme():
    assert [f for f in LAYERS if f != "." and not (CSRC / f / "README.md").is_file()] == []


def test_nvcc_is_not_silenced():
    """It only warns where code of the GPU calls what is the host's, and then leaves out that call
    and what depends on it: kernels were wrong which were right when another compiler made them."""
    sources = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cu"), CSRC.parent / "setup.py"]
    silenced = [
        str(path.relative_to(CSRC.parent))
        for path in sources
        if "cutlass" not in path.parts
        and re.search(r"diag[_-]suppress|disable-warnings|nv_diagnostic", path.read_text())
    ]
    assert silenced == []
