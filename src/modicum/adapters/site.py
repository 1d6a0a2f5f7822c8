"""One base layer as a method sees it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from modicum.adapters.basis import LayerFactors, canonical_size, layer_factors
from modicum.errors import TargetError
from modicum.ops.affine import pack, unpack
from modicum.ops.digest import weight_digest
from modicum.quant.base import BaseFormat, format_of

if TYPE_CHECKING:
    from modicum.adapters.basis import BasisSpec
    from modicum.adapters.config import AdapterConfig
    from modicum.quant.steps import Steps


class LayerBasis(nn.Module):
    """The frozen factors of one base layer, shared by all its adapters and never saved with them.

    `ut` (k, out) holds the output directions as rows, so that the first r rows are the rank-r basis without
    a copy; `a` (k, in) the input factor, given by the basis or made on request as Uᵀ W; `sigma` (k,) the
    singular values, where the kind of basis has them.
    """

    ut: Tensor
    a: Tensor | None
    sigma: Tensor | None

    def __init__(self, factors: LayerFactors, site: Site) -> None:
        super().__init__()
        self.explicit_input = factors.a is not None
        self.set(factors, site)

    def set(self, factors: LayerFactors, site: Site) -> None:
        """Take `factors` in place of the present ones (in place: adapters keep their reference)."""
        remake_input = not self.explicit_input and getattr(self, "a", None) is not None
        self.initial_core = factors.r0
        for name, value in (("ut", factors.u.T.contiguous()), ("a", factors.a), ("sigma", factors.s)):
            self.register_buffer(name, None if value is None else value.to(site.device), persistent=False)
        if remake_input:
            self.make_input(site)

    def make_input(self, site: Site) -> None:
        """Keep A = Uᵀ W (k, in) as well, for adapters that read the layer's input."""
        if self.a is None:
            self.a = self.ut @ site.weight().to(self.ut.dtype)

    @property
    def rank(self) -> int:
        """The largest rank this basis can serve."""
        return self.ut.shape[0]


class Site:
    """Name, shape, weight, bias and bases of one base layer.

    The weight is always the unmerged one: while adapters are merged, what undoes them is kept here.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        fmt = format_of(module)
        if fmt is None:
            raise TargetError(
                f"{name} is a {type(module).__name__}, which cannot be adapted; linear layers can"
            )
        fmt.prepare(module)
        self.name = name
        self.module = module
        self.format: BaseFormat = fmt
        self.out_features, self.in_features = fmt.shape(module)
        #: what undoes the merges into the layer, None while nothing is merged
        self.saved: Any = None
        self.bases: nn.ModuleDict = nn.ModuleDict()
        self._specs: dict[str, BasisSpec] = {}
        self._given: dict[str | None, tuple[str, LayerFactors]] = {}
        self._digest: str | None = None
        self._mask: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (out,), if it has one."""
        return cast("Tensor | None", getattr(self.module, "bias", None))

    @property
    def device(self) -> torch.device:
        """Where the base weight lives."""
        return self.format.device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the base weight, of its dequantized form where it is packed."""
        return self.format.dtype(self.module)

    @property
    def is_meta(self) -> bool:
        """Whether the base weight holds no numbers yet."""
        return self.device.type == "meta"

    def weight(self) -> Tensor:
        """The unmerged weight, (out, in), in the base layer's dtype; do not write to it."""
        if self.saved is not None:
            return self.format.saved_weight(self.module, self.saved)
        return self.format.weight(self.module)

    def mask(self, rows: slice) -> Tensor:
        """Which numbers of some rows of the unmerged weight are not exactly 0, bool (rows, in).

        Read off a dense weight; of any other, which would have to be decoded whole each time, one bit is kept for each.
        """
        if self.format.mergeable:
            return self.weight()[rows] != 0
        if self._mask is None or self._mask.device != self.device:
            self._mask = pack((self.weight() != 0).to(torch.uint8), 1)
        return unpack(self._mask[rows], 1, self.in_features).bool()

    def steps(self) -> Steps:
        """The unmerged weight as whole steps of its grid; for formats that can be recoded."""
        return self.format.steps(self.module, self.saved)

    def digest(self) -> str:
        """Digest of the unmerged weight rounded to bfloat16, computed once."""
        if self._digest is None:
            self._digest = weight_digest(self.weight())
        return self._digest

    def start_digest(self) -> str:
        """Digest of where training on the grid starts: the unmerged weight, and what rounding took away of it."""
        residuals = self.steps().residuals
        return self.digest() if residuals is None else f"{self.digest()} {weight_digest(residuals)}"

    def basis(self, config: AdapterConfig) -> LayerBasis:
        """The shared basis that an adapter of `config` uses here; grown in place when it was too small."""
        spec, rank = config.basis_spec(), config.rank_for(self.name)
        assert spec is not None
        if config.basis_fingerprint in self._given:
            key, factors = self._given[config.basis_fingerprint]
            if key not in self.bases:
                self.bases[key] = LayerBasis(factors, self)
            return cast("LayerBasis", self.bases[key])
        # random_kaiming scales with the rank, so its ranks are no prefixes of each other
        size = (
            rank
            if spec.kind == "random_kaiming"
            else canonical_size(rank, self.out_features, self.in_features)
        )
        key = f"{spec.token()}-{size}"
        if key not in self.bases:
            self._specs[key] = spec
            self.bases[key] = LayerBasis(self._factors(spec, rank), self)
        basis = cast("LayerBasis", self.bases[key])
        if basis.rank < rank:
            basis.set(self._factors(spec, rank), self)
        return basis

    def give(self, fingerprint: str, factors: LayerFactors) -> None:
        """Use `factors` for adapters whose config names `fingerprint`, instead of computing them."""
        key = f"given-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}"
        self._given[fingerprint] = (key, factors)

    def fill(self) -> None:
        """Make the bases anew: for a layer that held no numbers (meta device) when it was adapted."""
        self._digest = self._mask = None
        for key, spec in self._specs.items():
            basis = cast("LayerBasis", self.bases[key])
            basis.set(self._factors(spec, basis.rank), self)

    def _factors(self, spec: BasisSpec, rank: int) -> LayerFactors:
        if not self.is_meta:
            return layer_factors(self.weight(), rank, spec, name=self.name, digest=self.digest())
        with torch.device("meta"):
            a = None if spec.kind == "svd" else torch.empty(rank, self.in_features)
            sigma = torch.empty(rank) if spec.kind == "svd" else None
            return LayerFactors(torch.empty(self.out_features, rank), sigma, a)
