"""wgmma as kernel and emulator understand it, against CuTe, which derives it from layouts.

That is where an operand's elements lie in shared memory, the descriptor that says so, and which
thread holds which elements of a product.
"""

from pathlib import Path

import numpy as np
import pytest

NATIVE = Path(__file__).parent / "native"
DEPTH = 16  # of a product


@pytest.fixture(scope="module")
def cute(request):
    from conftest import native_folder
    from native.build import cuda_headers, cutlass_headers, load_module

    headers, cutlass = cuda_headers(), cutlass_headers()
    if headers is None or cutlass is None:
        pytest.skip("needs CUDA's and CUTLASS's headers")
    source = NATIVE / "wgmma_layouts.cpp"
    return load_module(source, native_folder(request.config), "-isystem", str(cutlass), *headers)


@pytest.fixture(scope="module")
def emulated(load_emulated):
    return load_emulated("emulated_wgmma")


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float16)


def in_memory(size, *placed):
    """Shared memory, where elements lie at given bytes, and NaN elsewhere."""
    memory = np.full(size // 2, np.nan, np.float16)
    for operand, elements in placed:
        memory[np.array(operand.addresses) // 2] = elements
    return memory.view(np.uint16)


def gathered(held, elements, columns):
    """[64, columns], of what each thread holds."""
    matrix = np.full((columns, 64), np.nan, np.float32)
    matrix.reshape(-1)[np.array(elements)] = held
    return matrix.T


def test_descriptors(cute, emulated):
    for i, rows in enumerate(cute.keys()):
        for step, operand in enumerate(rows):
            offset = step // 4 * (128 * 128) + i * 64 * 128 + step % 4 * 32
            assert emulated.descriptor(offset) == operand.descriptor
    for i, dims in enumerate(cute.values_256()):
        for step, operand in enumerate(dims):
            offset = i * 4 * (64 * 128) + step * 16 * 128
            assert emulated.descriptor(offset, block_bytes=64 * 128) == operand.descriptor


@pytest.mark.parametrize("q_rows, k_rows, step", [(0, 1, 0), (1, 0, 3), (1, 1, 6)])
def test_scores(cute, emulated, q_rows, k_rows, step):
    a, b = cute.keys()[q_rows][step], cute.keys()[k_rows][(step + 1) % 8]
    q, k = random(64, DEPTH), random(DEPTH, 64).T
    memory = in_memory(128 * 128 * 2, (a, q), (b, k))
    d = emulated.scores(memory, a.descriptor, b.descriptor)
    result = gathered(d, cute.d_elements_64(), 64)
    np.testing.assert_allclose(result, q.astype(np.float64) @ k.T, rtol=1e-6)


@pytest.mark.parametrize("columns, dims, step", [(64, 0, 0), (64, 0, 7), (256, 0, 3), (256, 1, 2)])
def test_values(cute, emulated, columns, dims, step):
    b = getattr(cute, f"values_{columns}")()[dims][step]
    p, v = random(64, DEPTH), random(DEPTH, columns)
    registers = p.T.reshape(-1)[np.array(cute.a_elements())].view(np.uint32)
    memory = in_memory(64 * 512 * 2, (b, v.T))
    d = getattr(emulated, f"values_{columns}")(memory, registers, b.descriptor)
    result = gathered(d, getattr(cute, f"d_elements_{columns}")(), columns)
    np.testing.assert_allclose(result, p.astype(np.float64) @ v, rtol=1e-6)
