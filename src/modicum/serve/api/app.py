"""All routes of a server as one ASGI application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from modicum.serve.api import admin, errors, feedback, health, openai, page, trials
from modicum.serve.api.gate import Gate

if TYPE_CHECKING:
    from modicum.serve.service import Service


def build(service: Service) -> Gate:
    """The application of a service; it opens and closes nothing."""
    # what FastAPI shows of itself loads scripts from elsewhere, and names versions
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.closing = False
    errors.install(app)
    for part in (openai, health, admin, trials, feedback, page):
        app.include_router(part.router(service))
    return Gate(app, service.settings)
