"""Refusing what would be silently wrong: another base model, another basis, damaged numbers, wrong targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from modicum.adapters import basis as bases
from modicum.adapters import registry
from modicum.errors import (
    BaseMismatchError,
    BasisMismatchError,
    CorruptAdapterError,
    TargetError,
    did_you_mean,
    listing,
)
from modicum.quant.base import format_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from modicum.adapters.config import AdapterConfig
    from modicum.adapters.site import Site


def check_targets(named: Mapping[str, nn.Module], config: AdapterConfig, known: Sequence[str]) -> None:
    """Refuse targets that match nothing, cannot be adapted, or are narrower than the rank; all at once.

    `named`: what the targets matched; `known`: the names of all linear layers, to suggest from.
    """
    faults = []
    if isinstance(config.target_modules, (set, list)):
        ends = sorted({name.rsplit(".", 1)[-1] for name in known})
        faults += [
            f"target {target!r} matches no layer{did_you_mean(target, ends)}; linear layers here: {listing(ends, 12)}"
            for target in sorted(config.target_modules)
            if not any(name == target or name.endswith(f".{target}") for name in [*named, *known])
        ]
    wrong = [(name, type(module).__name__) for name, module in named.items() if format_of(module) is None]
    if wrong:
        faults.append(
            f"{listing([f'{name} ({kind})' for name, kind in wrong])} cannot be adapted: only linear layers can "
            "(embeddings, convolutions and norms go into modules_to_save)"
        )
    misfits = []
    method = registry.get(config.method)
    for name, module in named.items():
        fmt = format_of(module)
        if fmt is not None:
            out, inner = fmt.shape(module)
            reason = method.misfit(inner, out, config.rank_for(name), config)
            misfits += [f"{name} {(out, inner)}: {reason}"] if reason else []
    kinds = {name: format_of(module) for name, module in named.items()} if method.on_grid else {}
    reasons = {name: fmt.grid_fault(named[name]) for name, fmt in kinds.items() if fmt is not None}
    off_grid = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if off_grid:
        faults.append(
            f"{config.method} trains the codes of low-bit layers whose grids hold 0, which {listing(off_grid, 3)} "
            f"{'is' if len(off_grid) == 1 else 'are'} not: quantize the base with `modicum quantize --zero-point "
            "integer --keep-zeros --keep-residuals`"
        )
    if misfits:
        faults.append(
            f"{config.method} does not fit {listing(misfits, 8)}; change its options or exclude the layers"
        )
    if faults:
        raise TargetError("; ".join(faults))


def check_base(config: AdapterConfig, sites: Mapping[str, Site]) -> str:
    """The base fingerprint of `sites`; refuses an adapter that was trained on another one."""
    on_grid = registry.get(config.method).on_grid
    found = bases.base_fingerprint(
        {name: site.start_digest() if on_grid else site.digest() for name, site in sites.items()}
    )
    if config.base_fingerprint not in (None, found):
        dtypes = sorted({str(site.dtype).removeprefix("torch.") for site in sites.values()})
        raise BaseMismatchError(
            f"this adapter was trained on another base model (fingerprint {config.base_fingerprint}, this one is "
            f"{found}, loaded as {', '.join(dtypes)}, {len(sites)} layers). Load "
            f"{config.base_model_name_or_path or 'the base model it names'} in float32 or bfloat16, unmodified and "
            "at the same revision. float16 changes small weights of a checkpoint stored in another dtype; use it "
            "only if the adapter was trained that way"
        )
    return found


def check_basis(config: AdapterConfig, sites: Mapping[str, Site]) -> str | None:
    """The fingerprint of the bases of `sites`, None for methods without; refuses one that differs.

    A basis that was added to the cache takes the place of the computed one if it is the one the adapter names.
    """
    spec, wanted = config.basis_spec(), config.basis_fingerprint
    if spec is None:
        return None
    ranks = {name: config.rank_for(name) for name in sites}
    if spec.kind == "stored":
        if not _give_added(wanted or "", sites, ranks):
            raise BasisMismatchError(
                f"no added basis is {wanted!r} on these layers and ranks; add its file with `modicum basis add FILE`, "
                "and name the fingerprint it has at the rank of the adapter"
            )
        return wanted
    # the first adapter of a large model decomposes every weight once, which takes minutes
    shown = tqdm(sites.items(), desc="basis", disable=None, delay=2, leave=False)
    items = [(name, site.basis(config).ut[: ranks[name]].T) for name, site in shown]
    found = bases.fingerprint_of(items, spec)
    if wanted is None:
        return found
    columns = sum(ranks.values())
    if bases.compare(wanted, found, columns) <= bases.TOLERANCE or _give_added(wanted, sites, ranks):
        return wanted
    turned = bases.turned_columns(wanted, items, spec)
    if turned is None:
        bases.ensure_same(wanted, found, columns)
    for name in {name for name, _ in turned or ()}:
        _give_turned(sites[name], config, [k for layer, k in turned or () if layer == name])
    return wanted


def _give_turned(site: Site, config: AdapterConfig, columns: list[int]) -> None:
    """Let adapters of the config's fingerprint use the basis of `site` with some columns turned."""
    basis, rank = site.basis(config), config.rank_for(site.name)
    u = basis.ut[:rank].T.clone()
    u[:, columns] *= -1
    a = basis.a[:rank] if basis.explicit_input and basis.a is not None else None
    sigma = None if basis.sigma is None else basis.sigma[:rank]
    site.give(config.basis_fingerprint or "", bases.LayerFactors(u, sigma, a))


def _give_added(fingerprint: str, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> bool:
    basis = bases.BasisCache().get(fingerprint, ranks)
    if basis is None:
        return False
    for name, site in sites.items():
        site.give(fingerprint, basis[name])
    return True


def check_state(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Refuse adapter numbers that are missing, misshapen or not finite; everything wrong is listed.

    `expected`: checkpoint key -> shape, of the adapter in memory; other keys of `state` pass.
    """
    missing = [key for key in expected if key not in state]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    broken = [key for key in state if state[key].is_floating_point() and not torch.isfinite(state[key]).all()]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(expected)} tensors are missing ({listing(missing, 3)})")
    if shapes:
        faults.append(f"wrong shapes: {listing(shapes, 3)}")
    if broken:
        faults.append(f"NaN or infinite values in {listing(broken, 3)}")
    if faults:
        raise CorruptAdapterError(
            "this adapter was not loaded: "
            + "; ".join(faults)
            + ". Take the file from its source again, or train "
            "with a lower learning rate if it was saved like this"
        )
