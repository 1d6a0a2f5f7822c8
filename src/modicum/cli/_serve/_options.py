"""The options of a server; what they are without is said in `modicum.serve.settings`."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

State = Annotated[
    Path | None,
    Option(
        "--state",
        envvar="MODICUM_STATE",
        help="Folder for keys, usage and experiments; without, `modicum` in the user's state folder.",
    ),
]
Store = Annotated[
    str | None,
    Option(
        "--store", "-s", envvar="MODICUM_STORE", help="The store of adapters; without, the base model alone."
    ),
]
Host = Annotated[str, Option(help="Address to listen on; a wider one than this machine's needs keys.")]
Port = Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
AllowHost = Annotated[
    list[str] | None, Option(help="A name that it answers to besides this machine's, e.g. behind a proxy.")
]
BaseName = Annotated[str, Option(help="What the base model is called in `model`.")]
Dtype = Annotated[str, Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1 …")]
MaxBatch = Annotated[int, Option(min=1, help="Sequences in one step.")]
MaxBatchTokens = Annotated[int, Option(min=1, help="Tokens in one step; long prompts are cut into pieces.")]
MaxLength = Annotated[
    int | None, Option(min=1, help="Tokens of the longest sequence; without, what model and cache allow.")
]
CacheTokens = Annotated[int, Option(min=1, help="Tokens whose keys and values are kept.")]
MaxQueue = Annotated[int, Option(min=0, help="Requests that wait; more are refused with 429.")]
Slots = Annotated[int, Option(min=1, help="Adapters in memory.")]
MaxRank = Annotated[int, Option(min=1, help="The largest rank of an adapter.")]
PrefixCaching = Annotated[
    bool, Option(help="Compute equal beginnings of prompts once, per tenant and version.")
]
Kind = Annotated[
    Literal["embedded", "vllm"],
    Option("--engine", help="What generates: Transformers, or vLLM."),
]
OwnProcess = Annotated[
    bool | None,
    Option(
        "--own-process/--no-own-process",
        help="Run the engine in a process of its own, which answers more and takes more memory; without, if the model "
        "is on a processor.",
    ),
]
Replicas = Annotated[int, Option(min=1, help="Engines; several run under Ray Serve.")]
RequestTimeout = Annotated[float, Option(min=0.01, help="Seconds that a request may take.")]
Grace = Annotated[float, Option(min=0, help="Seconds that running requests get when the server stops.")]
MaxBody = Annotated[int, Option(min=1024, help="Bytes of the longest body of a request.")]
LogFormat = Annotated[Literal["json", "text"], Option(help="How lines of the log look.")]
LogAccess = Annotated[bool, Option("--log-access", help="Write down every HTTP request.")]
LogPrompts = Annotated[bool, Option("--log-prompts", help="Write down what users ask.")]
Prices = Annotated[Path | None, Option(help="YAML file with prices of tokens and of the machine.")]
Traces = Annotated[str | None, Option(help="Send traces to: otlp.")]
