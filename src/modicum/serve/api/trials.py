"""What an admin does with experiments: made, started, weighed, stopped, promoted, rolled back, and reported."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict

from modicum.serve.api.access import Admin
from modicum.serve.api.errors import ApiError
from modicum.serve.engine.interface import AdapterUnavailableError, OverloadedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modicum.serve.experiments.tables import Experiment
    from modicum.serve.service import Service

#: experiments that are listed with what they found, the newest
_LISTED = 100


class Winner(BaseModel):
    """The arm to promote, if not the winner; where production must point, if not where it did at the start."""

    model_config = ConfigDict(extra="forbid", strict=True)

    arm: str | None = None
    expected: int | None = None

    def options(self) -> dict[str, Any]:
        """The arguments of `Experiments.promote`."""
        return {
            "arm": self.arm,
            **({"expected": self.expected} if "expected" in self.model_fields_set else {}),
        }


class User(BaseModel):
    """A user of a tenant."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tenant: str
    user: str


async def servable(service: Service, versions: Iterable[str]) -> None:
    """Returns when every version was in memory: nobody waits for it, and what cannot be served is not promoted.

    Raises:
        ApiError: 409, one cannot be served.
    """
    for version in versions:
        try:
            # where all slots are in use it is loaded later
            with contextlib.suppress(OverloadedError):
                await service.engine.load(version)
        except AdapterUnavailableError as error:
            raise ApiError(409, f"{version} cannot be served: {error}", code="adapter_unavailable") from error


def router(service: Service) -> APIRouter:
    """The routes about experiments, below the admin's. Those that change one answer with its report."""
    routes = APIRouter()
    experiments = service.experiments

    def report(name: str) -> dict[str, Any]:
        return asdict(experiments.report(name))

    @routes.get("/experiments")
    def listed(_: Admin) -> dict[str, Any]:
        return {"experiments": [asdict(one) for one in experiments.reports(_LISTED)]}

    @routes.post("/experiments", status_code=201)
    def create(body: Annotated[dict[str, Any], Body()], key: Admin) -> dict[str, Any]:
        return report(experiments.create(body, key.name).name)

    @routes.get("/experiments/{name:path}")
    def found(name: str, _: Admin) -> dict[str, Any]:
        return report(name)

    @routes.delete("/experiments/{name:path}")
    def delete(name: str, key: Admin) -> dict[str, Any]:
        experiments.delete(name, key.name)
        return {"name": name, "deleted": True}

    @routes.post("/users/purge")
    def purge(body: User, _: Admin) -> dict[str, Any]:
        """What is known of a user is erased from all experiments."""
        return {"erased": experiments.purge(body.tenant, body.user)}

    _changes(routes, service)
    return routes


def _changes(routes: APIRouter, service: Service) -> None:
    """From draft to promoted, and back."""
    experiments = service.experiments

    def report(one: Experiment) -> dict[str, Any]:
        return asdict(experiments.report(one.name))

    @routes.post("/experiments/{name:path}/start")
    async def start(name: str, key: Admin) -> dict[str, Any]:
        arms = experiments.find(name).arms
        await servable(service, [arm.version for arm in arms if arm.version is not None])
        return await run_in_threadpool(lambda: report(experiments.start(name, key.name)))

    @routes.post("/experiments/{name:path}/weights")
    def weigh(name: str, body: Annotated[dict[str, Any], Body()], key: Admin) -> dict[str, Any]:
        """`{"new": 5}`; arms that are not named keep theirs."""
        return report(experiments.weigh(name, body, key.name))

    @routes.post("/experiments/{name:path}/stop")
    def stop(name: str, key: Admin) -> dict[str, Any]:
        return report(experiments.stop(name, key.name))

    @routes.post("/experiments/{name:path}/promote")
    def promote(name: str, key: Admin, body: Winner | None = None) -> dict[str, Any]:
        return report(experiments.promote(name, key.name, **(body or Winner()).options()))

    @routes.post("/experiments/{name:path}/rollback")
    def rollback(name: str, key: Admin) -> dict[str, Any]:
        return report(experiments.rollback(name, key.name))
