"""Pre-trains the embedded base model: tokenizer, training, held-out perplexity, model card.

    python scripts/pretrain_embedded.py --data ../shared/data --minutes 60

The run can be stopped and started again: everything it needs is in the work folder.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from embedded_card import render
from embedded_corpus import MIXTURE, Rows, encode, held_out_texts, train_tokenizer, training_texts

if TYPE_CHECKING:
    from collections.abc import Callable

# Scored in metrics.json, so that anybody can see in a second whether the weights are the right ones.
PASSAGE = (
    "The boat was small, but it was dry and it was ours. Every morning we rowed out past the old "
    "stone wall, and every evening we came home with wet feet and a basket of fish. My sister said "
    "that the sea was like a cat: it let you stroke it, but it did not belong to you."
)
FOLDER = "src/modicum/models/embedded"


@dataclass(frozen=True)
class Options:
    """What a run is made of; stored in metrics.json."""

    minutes: float = 60.0
    tokens: int = 0
    threads: int = 2
    seed: int = 0
    vocabulary: int = 4096
    hidden: int = 256
    inner: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    context: int = 256
    long_context: int = 512
    long_from: float = 0.85
    batch_tokens: int = 4096
    optimizer: str = "muon"
    lr: float = 3e-3
    weight_decay: float = 0.1
    decay_from: float = 0.7


def build(options: Options) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.long_context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_((2 * options.layers) ** -0.5)
    return model


def optimizers(model: LlamaForCausalLM, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (on request) and AdamW for the rest."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    ids = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": rest, "weight_decay": 0.0}]
    if options.optimizer == "adamw":
        groups.append({"params": inside, "weight_decay": options.weight_decay})
    made = [torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)]
    if options.optimizer == "muon":
        made.append(
            torch.optim.Muon(
                inside,
                lr=options.lr,
                weight_decay=options.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return made


def learning_rate(options: Options, step: int, progress: float) -> float:
    """Warm-up of 100 steps, then constant, then linear to a fiftieth of the peak."""
    decay = min(1.0, (1.0 - progress) / (1.0 - options.decay_from))
    return options.lr * min(1.0, (step + 1) / 100) * max(decay, 0.02)


@torch.no_grad()
def held_out(
    model: LlamaForCausalLM, stream: np.ndarray, characters: int, context: int, limit: int = 0
) -> dict[str, float]:
    """Perplexity per token and bits per character, in windows of `context` without overlap."""
    total, count = 0.0, 0
    used = stream[: limit or len(stream)]
    for start in range(0, len(used) - 1, context * 8):
        piece = used[start : start + context * 8 + 1].astype(np.int64)
        for rows in _windows(piece, context):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            total += cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            count += rows[:, 1:].numel()
    share = count / (len(stream) - 1)
    return {
        "perplexity": round(math.exp(total / count), 3),
        "bits_per_character": round(total / math.log(2) / (characters * share), 4),
        "tokens": count,
    }


def _windows(piece: np.ndarray, context: int) -> list[torch.Tensor]:
    full = (len(piece) - 1) // context
    made = [torch.from_numpy(piece[i * context : (i + 1) * context + 1])[None] for i in range(full)]
    rest = piece[full * context :]
    batches = [torch.cat(made)] if made else []
    return batches + ([torch.from_numpy(rest)[None]] if len(rest) > 1 else [])


def prepare(data: Path, work: Path, options: Options) -> tuple[PreTrainedTokenizerFast, dict]:
    """The tokenizer and the training streams, made once and then read from the work folder."""
    folder = work / "tokenizer"
    if not (folder / "streams.npz").exists():
        texts = training_texts(data, options.seed)
        tokenizer = train_tokenizer(texts, options.vocabulary)
        tokenizer.save_pretrained(folder)
        streams = {name: encode(tokenizer, documents) for name, documents in texts.items()}
        np.savez(folder / "streams.npz", **streams)
        for name, stream in streams.items():
            ratio = sum(map(len, texts[name])) / len(stream)
            print(f"{name}: {len(stream):,} tokens, {ratio:.2f} characters a token", flush=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, dict(np.load(folder / "streams.npz"))


def publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model (bfloat16) and the tokenizer, each file replaced in one step."""
    staging = folder.with_name(folder.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=64
    )
    copy.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    _only_what_matters(staging / "tokenizer_config.json")
    folder.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        file.chmod(0o644)
        file.replace(folder / file.name)
    staging.rmdir()


def _only_what_matters(file: Path) -> None:
    """Drops from a tokenizer's configuration how it was loaded here."""
    config = json.loads(file.read_text())
    for name in ("is_local", "local_files_only", "name_or_path"):
        config.pop(name, None)
    file.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def passage_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Perplexity of `PASSAGE` after `<|bos|>`."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PASSAGE).input_ids]])
    return round(model(input_ids=ids, labels=ids).loss.exp().item(), 3)


class Run:
    """One training run: the model, its optimizers and how far it has come."""

    def __init__(self, options: Options, streams: dict, work: Path) -> None:
        self.options, self.work = options, work
        self.model = build(options)
        self.optimizers = optimizers(self.model, options)
        self.rows = Rows(streams, options.seed)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.file = work / "checkpoint.pt"
        if self.file.exists():
            self.load()

    def progress(self) -> float:
        """Share of the budget that is used up."""
        if self.options.tokens:
            return self.tokens / self.options.tokens
        return self.seconds / (60 * self.options.minutes)

    def save(self) -> None:
        """Writes the checkpoint in one step."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "drawn": self.rows.drawn,
            "counts": (self.step, self.tokens, self.seconds),
        }
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").replace(self.file)

    def load(self) -> None:
        """Goes back to the last checkpoint."""
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rows.drawn = state["drawn"]
        self.step, self.tokens, self.seconds = state["counts"]

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def train(self, every: int, checkpoint: Callable[[], None]) -> None:
        """Trains until the budget is used up; calls `checkpoint` every `every` seconds."""
        compiled = torch.compile(self.loss, dynamic=False)
        start = saved = time.perf_counter()
        used, last, losses = self.seconds, self.tokens, []
        while (progress := self.progress()) < 1.0:
            options = self.options
            length = options.long_context if progress > options.long_from else options.context
            batch = torch.from_numpy(self.rows.batch(options.batch_tokens // length, length))
            loss = compiled(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            rate = learning_rate(options, self.step, progress)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            now = time.perf_counter()
            self.step, self.tokens = self.step + 1, self.tokens + batch[:, 1:].numel()
            self.seconds = used + now - start
            losses.append(loss.item())
            if self.step % 20 == 0:
                speed = (self.tokens - last) / (now - start)
                print(
                    f"step {self.step} tokens {self.tokens / 1e6:.2f}M loss {np.mean(losses):.3f} "
                    f"lr {rate:.1e} {speed:,.0f} tokens/s {100 * progress:.1f} %",
                    flush=True,
                )
                losses = []
            if now - saved > every:
                saved = now
                self.save()
                checkpoint()
        self.save()


def command(options: Options) -> str:
    """The command line that asks for `options`."""
    default = asdict(Options())
    given = {"data": "../shared/data", "minutes": f"{options.minutes:g}"}
    given |= {k: v for k, v in asdict(options).items() if v != default[k] and k != "minutes"}
    words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    return " ".join(["python scripts/pretrain_embedded.py", *words])


def finish(run: Run, tokenizer: PreTrainedTokenizerFast, data: Path, folder: Path, remark: str) -> None:
    """Publishes the final model, measures what was published and writes numbers and card."""
    publish(run.model, tokenizer, folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = {}
    for name, texts in held_out_texts(data).items():
        stream = encode(tokenizer, texts)
        scores[name] = held_out(model, stream, sum(map(len, texts)), run.options.long_context)
        print(name, scores[name], flush=True)
    metrics = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": {
            "tokens": run.tokens,
            "steps": run.step,
            "minutes": round(run.seconds / 60, 1),
            "passes": {
                name: round(drawn / len(run.rows.streams[name]), 2)
                for name, drawn in sorted(run.rows.drawn.items())
            },
            "mixture": MIXTURE,
            "command": command(run.options),
            "remark": remark,
            "options": asdict(run.options),
        },
        "passage": {"text": PASSAGE, "perplexity": passage_perplexity(model, tokenizer)},
        "held_out": scores,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / "README.md").write_text(render(metrics), encoding="utf-8")


def main() -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/embedded"))
    parser.add_argument("--out", type=Path, default=Path(FOLDER))
    parser.add_argument("--publish-after", type=float, default=15.0, help="minutes")
    parser.add_argument("--checkpoint-every", type=int, default=180, help="seconds")
    parser.add_argument("--remark", default="", help="a sentence for the card")
    for name, value in asdict(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    options = Options(**{name: given[name] for name in asdict(Options())})
    torch.set_num_threads(options.threads)
    tokenizer, streams = prepare(given["data"], given["work"], options)
    run = Run(options, streams, given["work"])
    valid = held_out_texts(given["data"])
    checks = {name: encode(tokenizer, valid[name][:40]) for name in ("books", "tinystories")}

    def checkpoint() -> None:
        for name, stream in checks.items():
            size = sum(map(len, valid[name][:40]))
            score = held_out(run.model, stream, size, options.context, 16384)
            print(f"held out {name}: {score}", flush=True)
        if run.seconds > 60 * given["publish_after"]:
            publish(run.model, tokenizer, given["out"])

    run.train(given["checkpoint_every"], checkpoint)
    finish(run, tokenizer, given["data"], given["out"], given["remark"])


if __name__ == "__main__":
    main()
