"""LoRA-XS: only an r×r core trains, between frozen singular directions of each weight.

Bałazy, Banaei, Aberer, Tabor: "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
arXiv 2405.17604 (ECAI 2025).

    W ≈ U Σ Vᵀ (truncated),  B = U,  A = Σ Vᵀ = Uᵀ W,  ΔW = scaling · B R A,  R ~ N(0, 1e-5²)

Because A = Uᵀ W, the update can be read off the base output: A x = Uᵀ (W x). So only U is kept, the input
is not touched again, and any base layer whose output can be read will do:

    y = y₀ + scaling · U R Uᵀ (y₀ − bias)

Where the input is narrower than the output, A x is computed from x instead, which costs less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.adapters.basis import BasisSpec, Kind
from modicum.adapters.config import AdapterConfig, option
from modicum.adapters.contract import Adapter
from modicum.adapters.elastic import ElasticConfig
from modicum.ops.lowrank import Directions, Mode  # noqa: TC001 - dataclass fields are read at run time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.adapters.site import LayerBasis, Site

#: standard deviation of the initial core (the paper's σ)
INITIAL_STD = 1e-5


@dataclass
class LoraXSConfig(ElasticConfig):
    """Configuration of LoRA-XS; the defaults are the paper's method, the rest are its ablations."""

    basis: Kind = option(
        "svd",
        "Frozen directions: 'svd' of each weight, 'random' (orthonormal), 'random_kaiming', or 'stored' (a basis "
        "made beforehand, e.g. from gradients as in LoRA-SB, named by basis_fingerprint).",
        choices=("svd", "random", "random_kaiming", "stored"),
    )
    directions: Directions = option(
        "top", "Which singular directions: 'top', 'middle' or 'bottom'.", choices=("top", "middle", "bottom")
    )
    svd_mode: Mode = option(
        "fast",
        "'fast' (randomized block Krylov, fixed start) or 'exact' decomposition.",
        choices=("fast", "exact"),
    )
    use_sigma: bool = option(
        True, "Whether the input factor A carries the singular values (A = Σ Vᵀ) or not (Vᵀ)."
    )
    core: str = option(
        "full", "Shape of the trained core: 'full' (r×r) or 'diagonal' (r).", choices=("full", "diagonal")
    )
    basis_seed: int = option(0, "Seed of a random basis.")

    def basis_spec(self) -> BasisSpec:
        """What the basis of every adapted layer is made of."""
        return BasisSpec(self.basis, self.directions, self.svd_mode, self.basis_seed)

    def faults(self) -> list[str]:
        """Options that contradict each other."""
        faults = []
        if self.basis != "svd" and (self.directions != "top" or not self.use_sigma):
            faults.append(f"directions and use_sigma belong to basis='svd', not {self.basis!r}")
        if self.basis == "svd" and self.directions != "top" and self.svd_mode != "exact":
            faults.append(f"directions={self.directions!r} needs svd_mode='exact'")
        if self.basis == "stored" and not self.basis_fingerprint:
            faults.append("basis='stored' needs basis_fingerprint, the one `modicum basis show FILE` prints")
        return faults


@final
class LoraXS(Adapter):
    """LoRA-XS on one layer; `R` (r, r), or (r,) for a diagonal core, is all that trains."""

    config_class = LoraXSConfig
    source = "arXiv 2405.17604"
    formula = "ΔW = scaling · U R Uᵀ W, U: top-r left singular vectors of W, R: r×r"
    elastic = True

    def __init__(self, site: Site, config: LoraXSConfig) -> None:
        super().__init__(site, config)
        self.diagonal = config.core == "diagonal"
        self.use_sigma = config.use_sigma
        # the basis belongs to the layer: no copy per adapter, no cast, not in the state dict
        object.__setattr__(self, "basis", site.basis(config))
        # dropout acts on the layer's input, as in LoRA; a narrow input is cheaper to read than a wide output
        self.reads_input = (
            config.dropout > 0 or self.basis.explicit_input or site.in_features < site.out_features
        )
        if self.reads_input:
            self.basis.make_input(site)
        self.R = nn.Parameter(self._initial_core(config))

    basis: LayerBasis

    @classmethod
    def count(cls, in_features: int, out_features: int, rank: int, config: AdapterConfig) -> int:
        """r² trained numbers per layer whatever its size, r for a diagonal core."""
        del in_features, out_features
        return rank if cast("LoraXSConfig", config).core == "diagonal" else rank**2

    def delta_weight(self) -> Tensor:
        """ΔW = scaling · B R A, shape (out, in), float32."""
        b, a = self.lora_factors()
        return self.scaling * (b @ a)

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """`base_output` + scaling · U R (A x), shape (*batch, out)."""
        z = self._inner(x, base_output)
        core = (self.core() * self.scaling).to(z.dtype)
        z = z * core if self.diagonal else F.linear(z, core)
        ut = self.basis.ut[: self.active_rank].to(z.dtype)
        # addmm adds the update in the same pass that computes it
        flat = torch.addmm(
            base_output.reshape(-1, base_output.shape[-1]), z.reshape(-1, self.active_rank), ut
        )
        return flat.view(base_output.shape)

    @classmethod
    def forward_mixed(
        cls, adapters: Sequence[Adapter], rows: Tensor, x: Tensor, base_output: Tensor
    ) -> Tensor:
        """`base_output` with each row's own core applied: the basis products run once for the whole batch.

        Cores of lower rank are padded with zeros: their basis is a prefix of the widest one's.
        """
        cores = cast("Sequence[LoraXS]", adapters)
        widest = max(cores, key=lambda adapter: adapter.active_rank)
        if any(a.basis is not widest.basis or a.use_sigma != widest.use_sigma for a in cores):
            return super().forward_mixed(adapters, rows, x, base_output)
        rank, z = widest.active_rank, widest._inner(x, base_output)  # noqa: SLF001 - same class
        gaps = [rank - a.active_rank for a in cores]
        stack = torch.stack([F.pad(a.scaled_core(), (0, n, 0, n)) for a, n in zip(cores, gaps, strict=True)])
        # the zero core at the end serves base-only rows, whose index is -1
        stack = torch.cat([stack, stack.new_zeros(1, rank, rank)]).to(z.dtype)
        mixed = torch.bmm(z.reshape(z.shape[0], -1, rank), stack[rows].transpose(1, 2))
        ut = widest.basis.ut[:rank].to(z.dtype)
        flat = torch.addmm(base_output.reshape(-1, base_output.shape[-1]), mixed.reshape(-1, rank), ut)
        return flat.view(base_output.shape)

    def core(self) -> Tensor:
        """R at the active rank: its first k rows and columns, or first k numbers for a diagonal core."""
        k = self.active_rank
        return self.R[:k] if self.diagonal else self.R[:k, :k]

    def scaled_core(self) -> Tensor:
        """Scaling · R as a (k, k) matrix, also for a diagonal core."""
        return self.scaling * (torch.diag(self.core()) if self.diagonal else self.core())

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """B' = U R (out, r) and A (r, in), float32: the exactly equal LoRA, scaling · B' A = ΔW."""
        u = self.basis.ut[: self.active_rank].T.float()
        a = self.basis.a[: self.active_rank] if self.basis.a is not None else u.T @ self.site.weight().float()
        a = a.float() if self.use_sigma else a.float() / self._sigma()[:, None]
        return u @ (torch.diag(self.core()) if self.diagonal else self.core()).float(), a

    def _inner(self, x: Tensor, base_output: Tensor) -> Tensor:
        """A x, shape (*batch, r), from the input or from the output."""
        dtype = base_output.dtype
        if self.reads_input:
            assert self.basis.a is not None
            x = self.dropout(x) if self.dropout is not None else x
            z = F.linear(x.to(dtype), self.basis.a[: self.active_rank].to(dtype))
        else:
            ut, bias = self.basis.ut[: self.active_rank].to(dtype), self.site.bias
            z = F.linear(base_output, ut, None if bias is None else -(ut @ bias.to(dtype)))
        return z if self.use_sigma else z / self._sigma().to(dtype)

    def _sigma(self) -> Tensor:
        """Singular values (r,), kept away from zero so that a rank-deficient weight divides by no zero."""
        assert self.basis.sigma is not None
        sigma = self.basis.sigma[: self.active_rank]
        return sigma.clamp_min(sigma.new_tensor(torch.finfo(torch.float32).tiny).sqrt())

    def _initial_core(self, config: LoraXSConfig) -> Tensor:
        if self.basis.initial_core is not None and config.init_weights:
            core = self.basis.initial_core[: self.rank].float() / self.scaling
            core = core if core.ndim == 1 else core[:, : self.rank]
            return core.diag() if core.ndim != (1 if self.diagonal else 2) else core.clone()
        shape = (self.rank,) if self.diagonal else (self.rank, self.rank)
        std = INITIAL_STD if config.init_weights else 1.0 / self.rank
        return torch.randn(shape, generator=self.generator(config)) * std
