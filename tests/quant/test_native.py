"""The library for dequantization: bit for bit `decode`, on any number of threads, and not needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.ops.affine import BITS, Grid, decode, pack
from modicum.quant import int4pack, native
from modicum.quant.native import build

needs_library = pytest.mark.skipif(not native.available(), reason=f"no library: {native.why_not()}")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
#: out, in, q, p: one register, its rest, groups over the ends of planes, padded rows, one column, one group
SHAPES = [
    (64, 256, 1, 32),
    (3, 40, 1, 5),
    (6, 39, 2, 13),
    (4, 7, 2, 1),
    (5, 129, 1, 43),
    (2, 1000, 1, 1000),
    (8, 1, 8, 1),
]


def bits_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)


def case(bits, out, columns, block, scale_type, offset_type, spread=1.0):
    codes = torch.randint(0, 2**bits, (out, columns), dtype=torch.uint8)
    shape = (out // block[0], columns // block[1])
    scales = (torch.randn(shape) * spread).to(scale_type)
    offsets = None if offset_type is None else (torch.randn(shape) * spread).to(offset_type)
    return codes, Grid(scales, offsets)


def same(codes, grid, bits, block, dtype):
    # not a number is what it is left as, whatever its bits
    weight = torch.full(codes.shape, torch.nan, dtype=dtype)
    native.dequantize(pack(codes, bits), *grid, bits, block[0], weight)
    wanted = decode(codes, grid, bits, block).to(dtype)
    return torch.equal(bits_of(weight.nan_to_num(7.0)), bits_of(wanted.nan_to_num(7.0)))


@needs_library
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_that_of_decode(bits, shape):
    torch.manual_seed(0)
    out, columns, *sizes = shape
    block = tuple(sizes)
    for scale_type in TYPES:
        for offset_type in (None, *TYPES):
            codes, grid = case(bits, out, columns, block, scale_type, offset_type)
            assert all(same(codes, grid, bits, block, dtype) for dtype in TYPES), (scale_type, offset_type)


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BITS),
    st.integers(1, 5),
    st.integers(1, 70),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_any_shape(bits, rows, group, groups, q, seed):
    torch.manual_seed(seed)
    codes, grid = case(bits, rows * q, group * groups, (q, group), torch.bfloat16, torch.float32)
    assert same(codes, grid, bits, (q, group), torch.bfloat16)


@needs_library
@pytest.mark.parametrize("spread", [1e-45, 1e-39, 3e-8, 6e4, 1e38])
@pytest.mark.parametrize("bits", BITS)
def test_subnormal_huge_infinite_and_broken_numbers_are_rounded_alike(bits, spread):
    codes, grid = case(bits, 16, 96, (1, 32), torch.float32, torch.float32, spread)
    grid.scales[0, 0], grid.scales[1, 1], grid.scales[2, 2] = torch.inf, -torch.inf, torch.nan
    assert grid.offsets is not None
    grid.offsets[3, 0], grid.offsets[4, 1] = torch.nan, torch.inf
    for scale_type in TYPES:
        typed = Grid(grid.scales.to(scale_type), grid.offsets)
        assert all(same(codes, typed, bits, (1, 32), dtype) for dtype in TYPES)


@needs_library
def test_any_alignment():
    codes, grid = case(4, 8, 24, (1, 3), torch.bfloat16, torch.float32)
    packed = pack(codes, 4)
    for shift in range(1, 8):
        moved = (
            torch.zeros(packed.numel() + shift, dtype=torch.uint8)[shift:].view(packed.shape).copy_(packed)
        )
        memory = torch.full((codes.numel() + 2 * shift,), 7.0, dtype=torch.bfloat16)
        native.dequantize(moved, *grid, 4, 1, memory[shift:-shift].view(codes.shape))
        assert torch.equal(memory[shift:-shift].view(codes.shape), decode(codes, grid, 4, (1, 3)).bfloat16())
        assert torch.equal(memory[:shift], memory[-shift:])
        assert memory[0] == 7


@needs_library
@pytest.mark.skipif(not int4pack.available(), reason="this processor's kernel has another layout")
@pytest.mark.parametrize(("group", "columns"), [(32, 96), (64, 64), (128, 2304), (256, 2560)])
@pytest.mark.parametrize("exact", [True, False], ids=["bf16 offsets", "with a remainder"])
def test_layout_of_the_packed_kernel(group, columns, exact):
    codes, grid = case(
        4, 192, columns, (1, group), torch.bfloat16, torch.bfloat16 if exact else torch.float32
    )
    pair, rest = int4pack.kernel_grid(grid)
    assert (rest is None) is exact
    packed = int4pack.packed(codes)
    for dtype in TYPES:
        weight, eager = torch.empty(128, columns, dtype=dtype), torch.empty(128, columns, dtype=dtype)
        native.dequantize_int4(packed, pair, rest, 64, weight)
        int4pack.dequantize(packed, pair, rest, 64, eager)
        wanted = decode(codes, grid, 4, (1, group)).to(dtype)[64:]
        assert torch.equal(bits_of(weight), bits_of(wanted))
        assert torch.equal(eager, wanted)


@needs_library
def test_threads_change_nothing():
    codes, grid = case(3, 301, 640, (1, 64), torch.bfloat16, torch.float32)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        weight = torch.empty(codes.shape)
        native.dequantize(pack(codes, 3), *grid, 3, 1, weight)
        found.append(weight)
    torch.set_num_threads(1)
    assert all(torch.equal(weight, decode(codes, grid, 3, (1, 64))) for weight in found)


@needs_library
def test_what_does_not_fit_is_refused():
    codes, grid = case(4, 8, 64, (1, 32), torch.bfloat16, torch.bfloat16)
    packed, out = pack(codes, 4), torch.empty(8, 64)
    for wrong in (
        (packed[:, 1:], *grid, 4, 1, out),
        (packed, *grid, 4, 2, out),
        (packed, grid.scales, grid.scales[:4], 4, 1, out),
        (packed, *grid, 5, 1, out),
        (packed.int(), *grid, 4, 1, out),
        (packed, *grid, 4, 1, torch.empty(64, 8).T),
    ):
        with pytest.raises(ValueError, match=r"belong together|uint8"):
            native.dequantize(*wrong)
    pair = torch.zeros(2, 64, 2, dtype=torch.bfloat16)
    codes = torch.zeros(64, 32, dtype=torch.uint8)
    for start, wrong in ((32, pair), (0, pair.float()), (64, pair), (-64, pair)):
        with pytest.raises(ValueError, match="belong together"):
            native.dequantize_int4(codes, wrong, None, start, torch.empty(64, 64))
    assert not native.takes(grid.scales.double())
    native.dequantize(packed[:0], grid.scales[:0], None, 4, 1, out[:0])


SCRIPT = """
import torch
from modicum.ops.affine import Grid, decode, pack
from modicum.quant import matmul, native
assert native._loaded.cache_info().currsize == 0, "importing compiled"
codes, scales = torch.randint(0, 16, (8, 64), dtype=torch.uint8), torch.rand(8, 2).bfloat16()
x, wanted = torch.randn(3, 64), decode(codes, Grid(scales, None), 4, (1, 32))
y = matmul.linear(x, pack(codes, 4), scales, None, None, 4, (1, 32), False)
assert torch.allclose(y, x @ wanted.T, atol=1e-5)
print(native.available(), native.why_not())
"""


def started(**environment: str) -> subprocess.Popen[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in {"CXX", "MODICUM_NATIVE"}}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_library
def test_processes_that_compile_at_once_leave_one_file(tmp_path):
    running = [started(MODICUM_CACHE=str(tmp_path)) for _ in range(2)]
    for process in running:
        output, errors = process.communicate(timeout=100)
        assert output.split() == ["True", "None"], errors
    (kept,) = (tmp_path / "native").iterdir()
    assert kept.suffix == ".so"


def test_without_a_compiler_products_are_the_same(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no licence >&2\nexit 1\n")
    broken.chmod(0o755)
    cases = {
        "no/such/compiler": {"CXX": "no/such/compiler --fast"},
        "no licence": {"CXX": str(broken)},
        "MODICUM_NATIVE=0": {"MODICUM_NATIVE": "0"},
    }
    running = {
        expected: started(MODICUM_CACHE=str(tmp_path), **environment)
        for expected, environment in cases.items()
    }
    for expected, process in running.items():
        output, errors = process.communicate(timeout=100)
        assert output.startswith("False"), errors
        assert expected in output
    assert not list(tmp_path.glob("native/*"))


@needs_library
def test_a_damaged_file_is_replaced_and_a_cache_that_cannot_be_written_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "other"))
    build.load()
    (made,) = build.cache_folder().glob("dequantize-*.so")
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path))
    build.cache_folder().mkdir()
    (build.cache_folder() / made.name).write_bytes(b"no library")
    build.load()
    assert (build.cache_folder() / made.name).stat().st_size > 1000
    (tmp_path / "file").touch()
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "file"))
    build.load()


def test_where_libraries_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path / "native"
    monkeypatch.delenv("MODICUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_folder() == tmp_path / "xdg" / "modicum" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder().parts[-3:] == (".cache", "modicum", "native")


@pytest.mark.parametrize(
    ("rows", "out", "columns", "group"), [(1, 64, 128, 32), (3, 192, 512, 64), (2, 5000, 1408, 32)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_remainder_is_added_with_one_rounding(rows, out, columns, group, threads):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).bfloat16()
    rest = torch.randn(out, columns // group, generator=generator)
    y = torch.randn(rows, out, generator=generator).bfloat16()
    wanted = y.double() + x.double().view(rows, -1, group).sum(-1) @ rest.double().T
    kept = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert native.add_remainder(y, x, rest)
    finally:
        torch.set_num_threads(kept)
    assert ((y.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all()
    assert not native.add_remainder(y, x, rest.half())


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 24, 100, 256])
def test_sums_and_copies_of_neighbours(size, dtype):
    for rows, few in ((1, 1), (3, 5), (2, 517), (9, 1100)):
        x = torch.randn(rows, few * size, generator=torch.Generator().manual_seed(few)).to(dtype)
        base, short = x.flip(0), x[:, ::size].contiguous()
        # a power of two rounds once; what else is summed in another order differs in the last digit
        sums = (0.25 * x.double().unflatten(1, (few, size)).sum(-1)).float().to(dtype)
        off = (native.pool(x, size, 0.25).float() - sums.float()).abs().max()
        assert off <= (0.01 if dtype == torch.bfloat16 else 1e-5) * sums.float().abs().max()
        copies = short.repeat_interleave(size, 1)
        assert torch.equal(native.repeat(short, size, 1.0), copies)
        wanted = (base.float() + 0.75 * copies.float()).to(dtype)
        assert torch.equal(native.repeat(short, size, 0.75, base), wanted)


@needs_library
def test_neighbours_are_the_same_on_any_number_of_threads():
    x, base = torch.randn(70, 2048).bfloat16(), torch.randn(70, 4096).bfloat16()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append((native.pool(x, 2, 0.5), native.repeat(x, 2, 0.5, base)))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(found[0][0], x.float().unflatten(1, (-1, 2)).mean(-1).bfloat16())


@needs_library
def test_neighbours_that_are_not_taken():
    x = torch.ones(2, 512)
    assert native.takes_neighbours(x, 2)
    assert not native.takes_neighbours(x.half(), 2)
    assert not native.takes_neighbours(x, 512)
    assert not native.takes_neighbours(torch.ones(2, 512, device="meta"), 2)
    for call in (lambda: native.pool(x, 512, 1.0), lambda: native.repeat(x.half(), 2, 1.0)):
        with pytest.raises(ValueError, match="takes_neighbours"):
            call()
    assert native.pool(x[:0], 2, 1.0).shape == (0, 256)
