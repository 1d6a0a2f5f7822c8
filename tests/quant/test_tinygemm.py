"""The int4 kernel of NVIDIA GPUs: its layout and everything around it on a processor, the kernel itself where it runs.

`emulated` reads the words as PyTorch's CUDA source does, lane by lane, not with the code that is tested.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from modicum.quant import int4pack, matmul, native, tinygemm
from modicum.quant.affine import AffineLinear
from modicum.quant.spec import AffineSpec

WIDTHS = [32, 64, 96, 128, 192, 256, 320, 384]
gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs an NVIDIA GPU: the kernel is unproven until this has run on one",
)


def random_codes(out=24, columns=128, device="cpu"):
    generator = torch.Generator().manual_seed(out + columns)
    return torch.randint(0, 16, (out, columns), dtype=torch.uint8, generator=generator).to(device)


def read(words: torch.Tensor) -> torch.Tensor:
    """The codes in the words (out/8, in/(16 i), 32, i/2), as lane t of a warp expands word by word."""
    rows, many, lanes, pairs = words.shape
    codes = torch.zeros(rows * 8, many * pairs * 32, dtype=torch.uint8)
    for n, k, lane, pair in itertools.product(range(rows), range(many), range(lanes), range(pairs)):
        word = int(words[n, k, lane, pair]) & 0xFFFFFFFF
        # the low nibbles of both halves, then the next: columns 2l and 2l + 1 of each half tile of 8
        for step in range(4):
            first = (k * pairs + pair) * 32 + 8 * step + 2 * (lane % 4)
            codes[8 * n + lane // 4, first] = word >> (4 * step) & 15
            codes[8 * n + lane // 4, first + 1] = word >> (16 + 4 * step) & 15
    return codes


def emulated(x, packed, group, pair):
    """The kernel's product: weights by a fused multiply-add with one rounding to bfloat16, sums in float32."""
    codes = read(tinygemm.words(packed))
    assert x.dtype == pair.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert pair.shape == (x.shape[1] // group, len(codes), 2)
    scales, offsets = (pair[..., i].T.double().repeat_interleave(group, 1) for i in (0, 1))
    weight = ((codes.double() - 8) * scales + offsets).to(torch.bfloat16)
    return (x.float() @ weight.float().T).to(torch.bfloat16)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The kernel for processors replaced by the emulated one for GPUs, and no library."""
    kernel = int4pack.KERNELS["cuda"]._replace(product=emulated, available=lambda _: True)
    monkeypatch.setitem(int4pack.KERNELS, "cpu", kernel)
    monkeypatch.setattr(native, "takes", lambda *_: False)


def made_layer(group=32, out=40, columns=192, merged=False, device="cpu", bias=True):
    torch.manual_seed(group + out)
    layer = AffineLinear(
        columns, out, AffineSpec(4, (1, group), offset_dtype="float32"), bias, torch.bfloat16, device
    )
    layer.codes.random_(0, 256)
    layer.scales.uniform_(0.01, 0.02)
    layer.offsets.normal_(std=0.02)
    if not merged:
        layer.offsets = layer.offsets.bfloat16().float()
    if layer.bias is not None:
        layer.bias.requires_grad_(False).normal_()
    return layer


@pytest.mark.parametrize("columns", WIDTHS)
def test_the_layout_is_the_one_the_kernel_reads(columns):
    codes = random_codes(16, columns)
    packed = tinygemm.packed(codes)
    assert packed.shape == (16, columns // 2)
    assert torch.equal(read(tinygemm.words(packed)), codes)
    assert torch.equal(tinygemm.unpacked(packed), codes)
    # eight rows are a run of their own
    assert torch.equal(tinygemm.unpacked(packed[8:]), codes[8:])


@pytest.mark.parametrize("columns", WIDTHS)
def test_shapes_types_and_arguments_are_those_of_torch(columns):
    assert tinygemm.packed(random_codes(16, columns)).shape == (16, columns // 2)
    with FakeTensorMode():
        raw = torch.empty(16, columns // 2, dtype=torch.uint8, device="cuda")
        theirs = torch.ops.aten._convert_weight_to_int4pack(raw, tinygemm.tiles(columns))
        codes = torch.empty(16, columns // 2, dtype=torch.uint8, device="cuda")
        mine = tinygemm.words(codes)
        assert (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)
        x = torch.empty(3, columns, dtype=torch.bfloat16, device="cuda")
        pair = torch.empty(columns // 32, 16, 2, dtype=torch.bfloat16, device="cuda")
        y = tinygemm.product(x, codes, 32, pair)
        assert (y.shape, y.dtype, y.device) == ((3, 16), torch.bfloat16, x.device)


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "int4pack" in str(func):
            self.calls.append((str(func), [getattr(a, "shape", a) for a in args]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_take_the_kernel_on_a_gpu(rows, rest):
    with FakeTensorMode(), _Seen() as seen:
        x = torch.empty(1, rows, 192, dtype=torch.bfloat16, device="cuda")
        codes = torch.empty(40, 96, dtype=torch.uint8, device="cuda")
        pair = torch.empty(6, 40, 2, dtype=torch.bfloat16, device="cuda")
        remainder = torch.empty(40, 6, device="cuda") if rest else None
        bias = torch.empty(40, dtype=torch.bfloat16, device="cuda")
        y = matmul._forward(x, codes, pair, remainder, bias, 4, 1, 32, True)
    assert (y.shape, y.dtype, y.device) == ((1, rows, 40), torch.bfloat16, x.device)
    assert seen.calls == [("aten._weight_int4pack_mm.default", [(rows, 192), (5, 3, 32, 2), 32, (6, 40, 2)])]


def test_many_rows_and_other_types_do_not():
    assert [rows for rows in range(40) if int4pack.takes(rows, torch.bfloat16)] == list(range(1, 17))
    assert not int4pack.takes(1, torch.float16)
    assert not int4pack.takes(1, torch.float32)


@pytest.mark.parametrize(
    ("device", "changes", "suits"),
    [
        ("cuda", {}, True),
        ("cuda", {"out_features": 40}, True),
        ("cpu", {"out_features": 40}, False),
        ("cpu", {}, True),
        ("cuda", {"out_features": 68}, False),
        ("cuda", {"block": (1, 256)}, True),
        ("cuda", {"block": (1, 512)}, False),
        ("cuda", {"block": (1, 16)}, False),
        ("cuda", {"block": (2, 32)}, False),
        ("cuda", {"block": (1, 128), "in_features": 320}, False),
        ("cuda", {"bits": 3}, False),
        ("cuda", {"scales": torch.float32}, False),
        ("mps", {}, False),
        ("xpu", {}, False),
        ("meta", {}, False),
    ],
)
def test_what_the_door_lets_through(device, changes, suits):
    case = {"out_features": 64, "in_features": 512, "bits": 4, "block": (1, 32), "scales": torch.bfloat16}
    assert int4pack.suits(device, **{**case, **changes}) is suits


def test_without_a_gpu_there_is_no_kernel():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not int4pack.available("cuda")
    assert not int4pack.fits(64, 512, 4, (1, 32), torch.bfloat16, torch.device("cuda"))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("group", "columns"), [(32, 96), (64, 192), (128, 256)])
def test_a_layer_in_this_layout(group, columns, merged, monkeypatch):
    monkeypatch.setattr(matmul, "PANEL", 64 * columns)
    layer = made_layer(group, 136, columns, merged)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    weight = layer.dequantized()
    # every other row of a larger tensor: not contiguous
    x = torch.randn(10, columns).bfloat16()[::2]
    with torch.no_grad():
        y = layer(x)
    assert layer.packed
    assert (layer.offsets is not None) is merged
    assert torch.equal(layer.dequantized(), weight)
    wanted = x.double() @ weight.double().T + layer.bias.double()
    # one rounding of each weight, of the product and of each sum: no update is lost in the first
    assert (y - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    for rows in (5, 40):
        x = torch.randn(rows, columns).bfloat16().requires_grad_()
        grad = torch.randn(rows, 136).bfloat16()
        layer(x).backward(grad)
        wanted = grad.double() @ weight.double()
        assert (x.grad - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    assert layer.packed
    for name, value in layer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_remainder_of_offsets_counts():
    layer = made_layer(32, 8, 64, bias=False)
    layer.codes.fill_(0x88)
    # 1 + 2^-9 has more digits than bfloat16; what is left of two groups is the remainder of the first
    layer.offsets = torch.tensor([1 + 2**-9, -1.0]).expand(8, 2).clone()
    with torch.no_grad():
        y = layer(torch.ones(1, 64, dtype=torch.bfloat16))
    assert layer.packed
    assert torch.equal(y, torch.full((1, 8), 32 * 2**-9, dtype=torch.bfloat16))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_is_copied_or_pickled_has_the_layout_on_disk():
    layer = made_layer()
    layer.pack_layout()
    assert layer.packed
    other = copy.deepcopy(layer)
    assert not other.packed
    assert torch.equal(other.dequantized(), layer.dequantized())


def test_dequantizing_compiles():
    codes, columns = random_codes(16, 192), 192
    pair, rest = torch.randn(6, 16, 2).bfloat16(), torch.randn(16, 6)
    kernel = int4pack.KERNELS["cuda"]
    wanted, found = torch.empty(2, 16, columns)
    packed = kernel.packed(codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(int4pack.KERNELS, "cpu", kernel)
        int4pack.dequantize(packed, pair, rest, 0, wanted)
        torch.compile(int4pack.dequantize, fullgraph=True, backend="aot_eager")(packed, pair, rest, 0, found)
    assert torch.equal(found, wanted)


@gpu
def test_a_gpu_agrees_with_the_layout():
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) < (8, 0) or torch.version.hip:
        pytest.skip("this GPU has no such kernel")
    assert int4pack.available(device)
    for columns in WIDTHS:
        codes = random_codes(24, columns, device)
        raw = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        theirs = torch.ops.aten._convert_weight_to_int4pack(raw, tinygemm.tiles(columns))
        assert torch.equal(tinygemm.words(tinygemm.packed(codes)), theirs)


@gpu
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("group", "columns"), [(32, 96), (64, 320), (128, 4096), (256, 1024)])
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 64])
def test_a_layer_on_a_gpu(rows, group, columns, merged):
    layer = made_layer(group, 1032, columns, merged, "cuda")
    if not int4pack.available(layer.codes.device):
        pytest.skip("this GPU has no such kernel")
    weight, before = layer.dequantized(), layer.state_dict()
    x = torch.randn(rows, columns, device="cuda").bfloat16().requires_grad_()
    with torch.no_grad():
        y = layer(x)
        assert layer.packed is (rows <= int4pack.FEW_ROWS)
        layer.pack_layout()
        again = layer(x)
    wanted = x.detach().double() @ weight.double().T + layer.bias.double()
    assert (y - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    assert (again - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    grad = torch.randn_like(y)
    layer(x).backward(grad)
    wanted = grad.double() @ weight.double()
    assert (x.grad - wanted).abs().max() <= 2e-2 * wanted.abs().max()
    moved = layer.to("cpu")
    assert torch.equal(moved.dequantized(), weight.cpu())
    assert all(torch.equal(value, before[name].cpu()) for name, value in moved.state_dict().items())
