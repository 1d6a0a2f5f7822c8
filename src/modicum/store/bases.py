"""Bases in a store: objects found by fingerprint, and what makes the one that a record lacks.

The numbers of a LoRA-XS adapter mean something in one basis only. A basis is kept as a record of the method
`basis` under a name made of its kind and a digest of its fingerprint, so that it is versioned, logged, verified,
exported and synchronized like an adapter, and stored once for all of them. A record names its basis by a fingerprint
of the layers and ranks that it uses; a stored basis with more layers or columns serves it too.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import BasisMismatchError, ConfigError, CorruptAdapterError, NotStoredError
from modicum.store.catalogue.listing import Filter
from modicum.store.record import Record, build

if TYPE_CHECKING:
    import os

    from modicum.adapters.basis import Basis
    from modicum.store.catalogue.lookup import Version
    from modicum.store.catalogue.names import Reference
    from modicum.store.reading import Readable
    from modicum.store.store import Store

METHOD = "basis"
FOLDER = "basis"
_SVD = re.compile(r"svd-(?P<directions>\w+)-(?P<mode>\w+)-v\d+")
_RANDOM = re.compile(r"(?P<kind>random|random_kaiming)-s(?P<seed>-?\d+)-v\d+")


@dataclass(frozen=True)
class BasisState:
    """Whether the basis that a record needs is in the store."""

    fingerprint: str
    #: `name@version` of the basis that serves it
    stored: str | None
    #: what to run to have it in the store; None where it is
    command: str | None = None


@dataclass(frozen=True)
class MissingBasis:
    """A basis that versions need and the store lacks."""

    fingerprint: str
    #: how many versions need it, and one of them
    versions: int
    example: str
    command: str


def put_basis(store: Store, file: str | os.PathLike) -> Version:
    """The version that the basis in a file of `modicum basis build --output` is stored as; once, however often put.

    Raises:
        CorruptAdapterError: the file is damaged, or no basis.
        ConfigError: there is no such file.
    """
    from modicum.adapters.basis import Basis

    if not Path(file).is_file():
        raise ConfigError(f"no basis file at {file}; `modicum basis build MODEL --output FILE` writes one")
    basis = Basis.load(Path(file))
    name = basis_name(basis.fingerprint())
    record = to_record(basis)
    try:
        found = store.show(name)
        if store.get(str(found)) == record:
            return found
    except NotStoredError:
        pass
    return store.put(name, record)


def basis_name(fingerprint: str) -> str:
    """What the basis with this fingerprint is called in a store: `basis/svd-top-fast-v1-90a3fe7cd21b`."""
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
    return f"{FOLDER}/{fingerprint.partition(':')[0]}-{digest}"


def to_record(basis: Basis) -> Record:
    """The basis as a record."""
    parts = ((f"{name}.{key}", getattr(f, key)) for name, f in basis.items() for key in ("u", "s", "a", "r0"))
    return build(
        METHOD,
        {name: tensor.numpy() for name, tensor in parts if tensor is not None},
        "float32",
        base_fingerprint=basis.base_fingerprint,
        basis_fingerprint=basis.fingerprint(),
        metadata={"spec": asdict(basis.spec), "digests": dict(basis.digests)},
    )


def from_record(record: Record) -> Basis:
    """The basis in a record of `to_record`.

    Raises:
        CorruptAdapterError: it is none.
    """
    import torch

    from modicum.adapters.basis import Basis, BasisSpec, LayerFactors

    layers: dict[str, dict[str, Any]] = {}
    for name, values in record.tensors():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = torch.from_numpy(values.copy())
    try:
        factors = {name: LayerFactors(**parts) for name, parts in layers.items()}
        return Basis(factors, BasisSpec(**record.metadata["spec"]), record.metadata["digests"])
    except (KeyError, TypeError) as error:
        raise CorruptAdapterError(
            f"a record of the method {record.method!r} is no basis ({error!r})"
        ) from error


def basis_state(store: Readable, version: str | Reference) -> BasisState | None:
    """Whether the store has the basis that a version needs; None for versions that need none.

    Raises:
        NotStoredError, CorruptAdapterError: see `Store.get`.
    """
    found = store.show(version)
    if found.method == METHOD or not isinstance(found.basis_fingerprint, str):
        return None
    return _state(store, store.get(str(found)))


def basis_of(store: Readable, version: str | Reference) -> Basis:
    """The basis that a version needs, or that it is.

    Raises:
        BasisMismatchError: it needs none, or the store does not have it; the message says what makes it.
    """
    record = store.get(version)
    if record.method == METHOD:
        return from_record(record)
    if not isinstance(record.basis_fingerprint, str):
        raise BasisMismatchError(f"{version} needs no basis: its method is {record.method}")
    state = _state(store, record)
    if state.stored is None:
        raise BasisMismatchError(f"the basis of {version} is not in the store. {state.command}")
    return from_record(store.get(state.stored))


def missing_bases(store: Readable) -> list[MissingBasis]:
    """Every basis that versions need and the store lacks."""
    query = (
        "SELECT k.basis, count(*), min(n.name) FROM versions v JOIN kinds k ON k.id = v.kind "
        "JOIN names n ON n.id = v.name WHERE k.basis IS NOT NULL AND k.method != ? GROUP BY k.basis ORDER BY k.basis"
    )
    rows = store._read(lambda view: view.rows(query, METHOD))  # noqa: SLF001 - a question of the same floor
    found = []
    for text, count, name in rows:
        fingerprint = json.loads(text)
        if not isinstance(fingerprint, str):
            continue
        versions = store.ls(Filter(name=name))
        example = next((str(one) for one in versions if one.basis_fingerprint == fingerprint), None)
        if example is None:  # removed since
            continue
        state = _state(store, store.get(example))
        if state.command is not None:
            found.append(MissingBasis(fingerprint, count, example, state.command))
    return found


def _state(store: Readable, record: Record) -> BasisState:
    wanted = record.basis_fingerprint
    ranks = _ranks(record)
    kind = wanted.partition(":")[0]
    for version in store.versions(Filter(name=f"{FOLDER}/*", method=METHOD)):
        listed = version.basis_fingerprint
        if listed == wanted or (
            str(listed).partition(":")[0] == kind and _serves(store, version, ranks, wanted)
        ):
            return BasisState(wanted, str(version))
    return BasisState(wanted, None, _command(record, ranks, kind))


def _serves(store: Readable, version: Version, ranks: dict[str, int], wanted: str) -> bool:
    """Whether the stored basis, cut to these layers and ranks, is the wanted one up to rounding."""
    from modicum.adapters.basis import TOLERANCE, compare

    basis = from_record(store.get(str(version)))
    try:
        part = basis.part(ranks)
        return compare(wanted, part.fingerprint(), part.columns) <= TOLERANCE
    except BasisMismatchError:
        return False


def _ranks(record: Record) -> dict[str, int]:
    """The rank of every adapted layer: the core R has r rows."""
    pairs = zip(record.layout.names, record.layout.shapes, strict=True)
    return {name.rpartition(".")[0]: shape[0] for name, shape in pairs if shape and name.endswith(".R")}


def _command(record: Record, ranks: dict[str, int], kind: str) -> str:
    model = shlex.quote(str(record.config.get("base_model_name_or_path") or "MODEL"))
    words = ["modicum basis build", model, f"--rank {max(ranks.values(), default=16)}"]
    if svd := _SVD.fullmatch(kind):
        words.append(f"--mode {svd['mode']}")
        words += [f"--directions {svd['directions']}"] if svd["directions"] != "top" else []
    elif random := _RANDOM.fullmatch(kind):
        words.append(f"--kind {random['kind']} --seed {random['seed']}")
    else:
        return (
            "Nothing rebuilds it: put the file it was trained with (`basis.save`, or `modicum import --basis`): "
            "modicum store put-basis FILE"
        )
    ends = dict.fromkeys(name.rpartition(".")[2] for name in ranks)
    words += [f"--targets {shlex.quote(end)}" for end in ends]
    return " ".join([*words, "--output basis.safetensors"]) + " && modicum store put-basis basis.safetensors"
