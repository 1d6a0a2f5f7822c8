"""Frozen directions shared by adapters: what they are taken from, kept as and compared by.

The basis belongs to the checkpoint, not to the dtype it was loaded in: singular vectors are taken of the
weight rounded to bfloat16. They are computed at a canonical size, of which lower ranks are prefixes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast, final

import torch

from modicum.adapters.basis_cache import BasisCache, read_tensors, write_tensors
from modicum.adapters.fingerprint import TOLERANCE, compare, ensure_same, fingerprint_of, turned_columns
from modicum.errors import BasisMismatchError, ConfigError, CorruptAdapterError, did_you_mean, listing
from modicum.ops.digest import weight_digest
from modicum.ops.lowrank import DIRECTIONS, MODES, captured_energy, left_singular_vectors

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.ops.lowrank import Directions, Mode

__all__ = [
    "TOLERANCE",
    "Basis",
    "BasisCache",
    "BasisSpec",
    "LayerFactors",
    "LayerReport",
    "base_fingerprint",
    "canonical_size",
    "compare",
    "ensure_same",
    "fingerprint_of",
    "layer_factors",
    "turned_columns",
]

Kind = Literal["svd", "random", "random_kaiming", "stored"]
#: weights up to this size are decomposed by one thread
_ONE_THREAD = 1 << 22
KINDS: tuple[str, ...] = ("svd", "random", "random_kaiming", "stored")


@dataclass(frozen=True)
class BasisSpec:
    """Which directions of a weight are meant, and by which procedure."""

    kind: Kind = "svd"
    directions: Directions = "top"
    mode: Mode = "fast"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the words."""
        choices = {"kind": KINDS, "directions": DIRECTIONS, "mode": MODES}
        faults = [
            f"{name} {value!r}{did_you_mean(str(value), known)} must be one of {', '.join(known)}"
            for name, known in choices.items()
            if (value := getattr(self, name)) not in known
        ]
        if faults:
            raise ConfigError("basis: " + "; ".join(faults))

    def token(self) -> str:
        """Short stable text of what matters for this kind, with the version of the procedure."""
        if self.kind == "svd":
            return f"svd-{self.directions}-{self.mode}-v1"
        return "stored-v1" if self.kind == "stored" else f"{self.kind}-s{self.seed}-v1"


@dataclass(frozen=True)
class LayerFactors:
    """The frozen factors of one layer."""

    #: (out, k) float32; orthonormal columns except for `random_kaiming`
    u: Tensor
    #: (k,) float32 singular values, where there are any
    s: Tensor | None = None
    #: (k, in) float32 input factor; None means A = Uᵀ W
    a: Tensor | None = None
    #: (k,) diagonal or (k, k) initial core of a gradient basis
    r0: Tensor | None = None

    def first(self, rank: int) -> LayerFactors:
        """The factors of the first `rank` columns; copies, so that the rest can be freed."""
        if rank == self.u.shape[1]:
            return self
        core = self.r0
        return LayerFactors(
            self.u[:, :rank].clone(),
            None if self.s is None else self.s[:rank].clone(),
            None if self.a is None else self.a[:rank].clone(),
            None if core is None else (core[:rank] if core.ndim == 1 else core[:rank, :rank]).clone(),
        )


def canonical_size(rank: int, out_features: int, in_features: int) -> int:
    """The size a basis is computed at: `rank` rounded up to 16, 32, 64, …, at most min(out, in).

    All ranks up to one canonical size share its computation and its cache entry, and are prefixes of it.
    """
    return min(max(16, 1 << max(rank - 1, 0).bit_length()), out_features, in_features)


@torch.no_grad()
def layer_factors(
    weight: Tensor,
    rank: int,
    spec: BasisSpec,
    *,
    name: str = "",
    cache: BasisCache | Literal["default"] | None = "default",
    digest: str | None = None,
) -> LayerFactors:
    """The factors of the (out, in) `weight`, exactly `rank` columns, on the CPU.

    `svd` depends on the weight rounded to bfloat16 and on nothing else; `random` and `random_kaiming` depend
    on the seed, the layer's `name` and its shape. `digest` spares computing `weight_digest(weight)` again.

    Raises:
        ConfigError: the rank does not fit the layer, or the weight is not loaded or not finite.
        BasisMismatchError: a stored basis is asked for, which cannot be computed from a weight.
    """
    if spec.kind == "stored":
        raise BasisMismatchError(
            f"the basis of {name or 'this layer'} is a stored one, which no weight determines: add its file with "
            "`modicum basis add FILE`"
        )
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise ConfigError(
            f"{name or 'a layer'} of shape {tuple(weight.shape)} has no basis of rank {rank}; lower the rank "
            "(`rank_pattern` for this layer alone) or leave the layer out"
        )
    size = canonical_size(rank, *weight.shape)
    if spec.kind != "svd":
        return _random_factors(weight.shape, rank, size, spec, name)
    if weight.is_meta:
        raise ConfigError(
            f"the weight of {name or 'a layer'} is not loaded (meta device): load the model first"
        )
    store = BasisCache() if cache == "default" else cache
    key = f"{digest or weight_digest(weight)}-{spec.token()}-{size}" if store is not None else ""
    held = store.load(key) if store is not None else None
    if held is None or set(held) != {"u", "s"} or held["u"].shape != (weight.shape[0], size):
        # float16 and float64 pass through bfloat16 too: one checkpoint, one basis
        rounded = weight.to(torch.bfloat16).to("cpu", torch.float32)
        with _threads_for(rounded):
            found = left_singular_vectors(rounded, size, mode=spec.mode, directions=spec.directions)
        held = {"u": found.u, "s": found.s}
        if store is not None:
            store.store(key, held)
    return LayerFactors(held["u"], held["s"]).first(rank)


@contextlib.contextmanager
def _threads_for(weight: Tensor) -> Iterator[None]:
    """One thread while a small weight is decomposed: more only wait for each other, seconds on a busy machine."""
    before = torch.get_num_threads()
    if before == 1 or weight.numel() > _ONE_THREAD:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _random_factors(shape: torch.Size, rank: int, size: int, spec: BasisSpec, name: str) -> LayerFactors:
    """Factors independent of the weight: orthonormal from Gaussian QR, or Kaiming-uniform with a = √5."""
    drawn = []
    for side, features in (("u", shape[0]), ("a", shape[1])):
        seed = hashlib.sha256(f"{spec.seed}\0{name}\0{side}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
        if spec.kind == "random":
            q, r = torch.linalg.qr(torch.randn(size, features, generator=generator, dtype=torch.float64).T)
            drawn.append((q * torch.where(r.diagonal() < 0, -1.0, 1.0))[:, :rank].to(torch.float32))
        else:
            uniform = torch.rand(size, features, generator=generator).mul_(2).sub_(1)
            fan_in = rank if side == "u" else features  # bound 1/√fan_in, as nn.Linear
            drawn.append((uniform[:rank] / math.sqrt(fan_in)).T)
    return LayerFactors(drawn[0].contiguous(), None, drawn[1].T.contiguous())


def base_fingerprint(digests: Mapping[str, str]) -> str:
    """32 hex digits over the weight digests of the adapted layers, independent of their order."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


class LayerReport(NamedTuple):
    """How the factors of one layer fit the layer's weight."""

    name: str
    #: largest entry of |uᵀu − 1|
    orthonormality: float
    #: ‖uᵀW‖² / ‖W‖²
    captured: float
    #: ‖uᵀW‖² / Σ s², 1 when the stored singular values are those of this weight; None without them
    relative: float | None
    #: whether the weight is the one the basis was built from; None when the basis does not say
    same_weight: bool | None


@final
@dataclass(frozen=True, eq=False)
class Basis(Mapping[str, LayerFactors]):
    """The factors of all adapted layers of one model, by layer name."""

    layers: Mapping[str, LayerFactors]
    spec: BasisSpec
    #: layer name -> digest of the weight it was built from; may be empty for an imported basis
    digests: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerFactors:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max((layer.u.shape[1] for layer in self.layers.values()), default=0)

    @property
    def columns(self) -> int:
        """The number of columns in all layers together."""
        return sum(layer.u.shape[1] for layer in self.layers.values())

    @property
    def base_fingerprint(self) -> str | None:
        """Fingerprint of the weights it was built from, None when unknown."""
        return base_fingerprint(self.digests) if self.digests else None

    def fingerprint(self, rank: int | None = None) -> str:
        """The fingerprint of the first `rank` columns of every layer, all by default."""
        basis = self if rank is None else self.truncated(rank)
        items = [(name, layer.u) for name, layer in basis.items()]
        if self.spec.kind == "stored":  # its input factor follows from nothing else
            items += [(f"{name} input", layer.a.T) for name, layer in basis.items() if layer.a is not None]
        return fingerprint_of(items, self.spec)

    def truncated(self, rank: int) -> Basis:
        """The basis of the first `rank` columns of every layer; layers with fewer keep theirs."""
        return self.part({name: min(rank, layer.u.shape[1]) for name, layer in self.items()})

    def part(self, ranks: Mapping[str, int]) -> Basis:
        """The basis of the layers in `ranks` alone, each cut to its rank."""
        missing = [name for name in ranks if name not in self.layers]
        short = [name for name, rank in ranks.items() if name in self and self[name].u.shape[1] < rank]
        if missing or short:
            raise BasisMismatchError(
                f"the basis lacks {listing(missing) or 'no layer'} and has too few columns for "
                f"{listing(short) or 'no layer'}; build it again with these targets and this rank"
            )
        layers = {name: self._cut(self.layers[name], rank) for name, rank in ranks.items()}
        return Basis(layers, self.spec, {name: self.digests[name] for name in ranks if name in self.digests})

    def _cut(self, layer: LayerFactors, rank: int) -> LayerFactors:
        cut = layer.first(rank)
        if self.spec.kind == "random_kaiming":  # its bound depends on the rank
            return replace(cut, u=cut.u * math.sqrt(layer.u.shape[1] / rank))
        return cut

    def save(self, path: str | Path) -> None:
        """Write the basis to one safetensors file, whole or not at all."""
        parts = (
            (f"{name}.{key}", getattr(f, key)) for name, f in self.items() for key in ("u", "s", "a", "r0")
        )
        tensors = {name: tensor for name, tensor in parts if tensor is not None}
        write_tensors(
            Path(path),
            tensors,
            {
                "spec": asdict(self.spec),
                "rank": self.rank,
                "fingerprint": self.fingerprint(),
                "base_fingerprint": self.base_fingerprint or "",
                "digests": dict(self.digests),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Basis:
        """The basis in a file of `save`.

        Raises:
            CorruptAdapterError: the file is truncated, altered, of another format, or not finite.
        """
        tensors, texts = read_tensors(Path(path))
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = tensor
        try:
            spec = BasisSpec(**json.loads(texts["spec"]))
            layers = {name: _checked(LayerFactors(**part)) for name, part in sorted(parts.items())}
            return cls(layers, spec, json.loads(texts["digests"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptAdapterError(
                f"{path} is no complete basis ({error}); make or copy it again"
            ) from error

    def verify(self, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> list[LayerReport]:
        """One report for each layer of the basis among `weights`, which may be a stream of (name, weight)."""
        items = cast(
            "Iterable[tuple[str, Tensor]]", weights.items() if isinstance(weights, Mapping) else weights
        )
        return [self._report(name, weight) for name, weight in items if name in self.layers]

    def _report(self, name: str, weight: Tensor) -> LayerReport:
        layer, rounded = self.layers[name], weight.detach().to(torch.bfloat16)
        if layer.u.shape[0] != weight.shape[0]:
            raise BasisMismatchError(
                f"the basis of {name} has {layer.u.shape[0]} rows, the weight is {tuple(weight.shape)}: "
                "it belongs to another base model"
            )
        u = layer.u.double()
        captured, relative = captured_energy(rounded, layer.u), None
        if layer.s is not None and self.spec.kind == "svd":
            total = float(torch.linalg.vector_norm(rounded.float(), dtype=torch.float64).square())
            values = float(layer.s.double().square().sum())
            relative = captured * total / values if values else 1.0
        error = float((u.T @ u - torch.eye(u.shape[1], dtype=torch.float64)).abs().max())
        known = self.digests.get(name)
        return LayerReport(
            name, error, captured, relative, None if known is None else known == weight_digest(weight)
        )


def _checked(layer: LayerFactors) -> LayerFactors:
    k = layer.u.shape[1]
    shapes = [
        layer.u.dtype == torch.float32,
        layer.s is None or layer.s.shape == (k,),
        layer.a is None or layer.a.shape[0] == k,
        layer.r0 is None or layer.r0.shape in ((k,), (k, k)),
    ]
    if not all(shapes):
        raise ValueError("shapes do not fit together")
    return layer
