"""The server itself."""

import json
import logging.config
from dataclasses import fields
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag
from modicum.cli._serve import _options as of
from modicum.serve.settings import EngineSettings, Settings

_ENGINE = EngineSettings("")
_SERVER = Settings(_ENGINE)


def start(
    model: Annotated[str, typer.Argument(help="The base model: a folder, a hub name, or 'embedded'.")],
    store: of.Store = None,
    state: of.State = None,
    host: of.Host = _SERVER.host,
    port: of.Port = _SERVER.port,
    allow_host: of.AllowHost = None,
    base_name: of.BaseName = _SERVER.base_name,
    dtype: of.Dtype = _ENGINE.dtype,
    device: of.Device = _ENGINE.device,
    max_batch: of.MaxBatch = _ENGINE.max_batch,
    max_batch_tokens: of.MaxBatchTokens = _ENGINE.max_batch_tokens,
    max_length: of.MaxLength = None,
    cache_tokens: of.CacheTokens = _ENGINE.cache_tokens,
    max_queue: of.MaxQueue = _ENGINE.max_queue,
    slots: of.Slots = _ENGINE.slots,
    max_rank: of.MaxRank = _ENGINE.max_rank,
    prefix_caching: of.PrefixCaching = _ENGINE.prefix_caching,
    kind: of.Kind = _ENGINE.kind,
    own_process: of.OwnProcess = None,
    replicas: of.Replicas = _ENGINE.replicas,
    request_timeout: of.RequestTimeout = _SERVER.request_timeout,
    grace: of.Grace = _SERVER.grace,
    max_body_bytes: of.MaxBody = _SERVER.max_body_bytes,
    log_format: of.LogFormat = _SERVER.log_format,
    log_access: of.LogAccess = _SERVER.log_access,
    log_prompts: of.LogPrompts = _SERVER.log_prompts,
    prices: of.Prices = None,
    traces: of.Traces = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve MODEL and every adapter in the store over the OpenAI API, until Ctrl-C or SIGTERM.

    Prints its address as soon as it answers. The `model` of a request is the base model's name, an adapter (`ada`,
    `ada@3`, `ada@canary`), or an experiment.
    """
    given: dict[str, Any] = dict(locals())
    given |= {"hosts": tuple(given.pop("allow_host") or ())}
    engine = EngineSettings(**{field.name: given[field.name] for field in fields(EngineSettings)})
    rest = [field.name for field in fields(Settings) if field.name != "engine"]
    settings = Settings(engine, **{name: given[name] for name in rest})
    try:
        from modicum.serve.logs import configuration
        from modicum.serve.server import Server as HttpServer
        from modicum.serve.server import bind, open_service
    except ModuleNotFoundError as error:
        from modicum.errors import MissingExtraError

        raise MissingExtraError("serving needs more: pip install 'modicum[serve]'") from error
    logging.config.dictConfig(configuration(log_format, access=log_access))
    with bind(settings) as listener, open_service(settings) as service:
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        shown = {"url": f"{url}/v1", "open": not service.keys.exist()}
        HttpServer(service, listener).run(lambda: typer.echo(json.dumps(shown) if as_json else _told(shown)))


def _told(shown: dict[str, Any]) -> str:
    if not shown["open"]:
        return f"serving at {shown['url']}"
    return (
        f"serving at {shown['url']} to everybody on this machine, admin's routes too (modicum serve keys add)"
    )
