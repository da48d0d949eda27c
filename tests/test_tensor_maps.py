"""Which caches come by bulk tensor copies: on an emulated GPU, which counts them."""

import pytest
import torch
from cases import check, make_case, run
from paging import paginate

pytestmark = pytest.mark.gpu


@pytest.fixture
def copies(request):
    """A function that counts a call's."""
    if not request.config.getoption("emulated_gpu"):
        pytest.skip("needs an emulated GPU")
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs a GPU with bulk tensor copies")
    return request.config.emulated_gpu.tensor_copies


def with_strides(tensor, **strides):
    """A copy with other strides, of the dimensions d0 to d3."""
    wanted = [strides.get(f"d{i}", stride) for i, stride in enumerate(tensor.stride())]
    room = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, wanted))
    memory = tensor.new_empty(room).as_strided(tensor.shape, wanted)
    return memory.copy_(tensor)


def plain(device, **options):
    return make_case(device, torch.float16, **{"lengths": (300, 77), **options})


def bhsd(device):
    case = plain(device)
    for name in ("k_cache", "v_cache"):
        case[name] = case[name].transpose(1, 2).contiguous().transpose(1, 2)
    return case


def packed(device):
    case = plain(device)
    both = torch.cat([case["k_cache"], case["v_cache"]], -1)
    return {**case, "k_cache": both[..., :64], "v_cache": both[..., 64:]}


def junk_stride_of_one(device):
    """Strides of size-1 dimensions mean nothing: here no tensor map could hold them."""
    case = plain(device, lengths=(300,), heads=(4, 1))
    for name in ("k_cache", "v_cache"):
        case[name] = with_strides(case[name], d0=3, d2=5)
    return case


BY_TENSOR_COPIES = {
    "plain": plain,
    "bhsd": bhsd,
    "packed": packed,
    "junk-stride-of-one": junk_stride_of_one,
    "wide": lambda device: plain(device, dims=(576, 512), heads=(16, 1), values_in_keys=True),
    "odd-dims": lambda device: plain(device, dims=(72, 136)),
    "float8": lambda device: plain(device, cache_dtype=torch.float8_e4m3fn),
    "float8-narrow": lambda device: plain(
        device, dims=(16, 48), heads=(4, 1), cache_dtype=torch.float8_e5m2
    ),
}


@pytest.mark.parametrize("name", BY_TENSOR_COPIES)
def test_they_do(name, device, copies):
    case = BY_TENSOR_COPIES[name](device)
    assert copies(lambda: check(case)) > 0


@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 256])
def test_pages_do(page_size, device, copies):
    case = paginate(plain(device), page_size)
    assert copies(lambda: run(case)) > 0


@pytest.mark.parametrize("page_size", [1, 12, 100])
def test_pages_that_cut_a_box_do_not(page_size, device, copies):
    case = paginate(plain(device), page_size)
    assert copies(lambda: run(case)) == 0


def test_float8_on_8_byte_strides_does_not(device, copies):
    case = plain(device, cache_dtype=torch.float8_e4m3fn)
    for name in ("k_cache", "v_cache"):
        case[name] = with_strides(case[name], d1=2 * 64 + 8, d0=case[name].shape[1] * 136)
    assert copies(lambda: check(case)) == 0


def test_an_empty_batch_needs_none(device, copies, monkeypatch):
    """A tensor map of no sequences is none; asked for by name, it is not missed."""
    monkeypatch.setenv("LEANATTN_LOADER", "tma")
    case = plain(device, lengths=(), capacity=8, query_lengths=())
    case["q"] = torch.ones(5, 4, 64, dtype=torch.float16, device=device)
    assert copies(lambda: check(case)) == 0


def test_cp_async_does_not(device, copies, monkeypatch):
    monkeypatch.setenv("LEANATTN_LOADER", "cp_async")
    case = plain(device)
    assert copies(lambda: check(case)) == 0
