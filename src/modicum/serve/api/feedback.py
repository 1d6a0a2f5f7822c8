"""What users say of answers: `POST /v1/feedback`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from modicum.serve.api.access import Caller
from modicum.serve.api.body import read_object

if TYPE_CHECKING:
    from modicum.serve.service import Service


def router(service: Service) -> APIRouter:
    """The route for feedback, for any key: each is heard on its own answers alone."""
    routes = APIRouter()

    @routes.post("/v1/feedback")
    async def feedback(request: Request, key: Caller) -> dict[str, Any]:
        """`{"response_id": "chatcmpl-…", "thumbs": "up"}`, or `experiment` and `user` in place of the response.

        It is on the disk when this is answered; said twice of the same answer, the last word counts.
        """
        return await service.experiments.feedback(key.name, await read_object(request))

    return routes
