"""Rows for causal language models: plain text, prompt and completion, chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modicum.data.checks import Faults, require_columns, template_columns, text_of
from modicum.data.encoded import Encoded, EncodedRow
from modicum.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from modicum.data.files import Rows
    from modicum.data.options import DataOptions, Format

Tokenizer = Any

_ROLES = ("system", "user", "assistant", "tool", "developer")


def encode_language(rows: Rows, options: DataOptions, tokenizer: Tokenizer) -> Encoded:
    """`rows` as tokens with a mask of the tokens that the loss counts.

    Raises:
        DataError: columns are missing, rows are unusable, or the tokenizer has no chat template.
    """
    layout = resolve_format(rows, options)
    if options.packing and layout != "text":
        raise DataError(
            f"packing is for plain text, {rows.source} is {layout}: joined rows would attend to each other; "
            "set data.packing to false (data.group_by_length saves padding instead)"
        )
    encode = {"text": _encode_text, "prompt_completion": _encode_pairs, "chat": _encode_chat}[layout]
    encoded = encode(rows, options, tokenizer)
    if not encoded:
        raise DataError(f"{rows.source} holds no text at all")
    return Encoded(encoded)


def resolve_format(rows: Rows, options: DataOptions) -> Format:
    """The layout of `rows`: the one that is asked for, or the one that their columns show."""
    if options.format != "auto":
        return options.format
    present = rows.columns
    if options.prompt_template or options.completion_template:
        return "prompt_completion"
    if options.messages_column in present:
        return "chat"
    if options.prompt_column in present and options.completion_column in present:
        return "prompt_completion"
    if options.text_column in present:
        return "text"
    if options.prompt_column in present or options.completion_column in present:
        return "prompt_completion"
    wanted = (options.messages_column, options.prompt_column, options.completion_column, options.text_column)
    near = next((hint for name in wanted if (hint := did_you_mean(name, present))), "")
    raise DataError(
        f"{rows.source} has the columns {', '.join(present)}{near}; needed for causal_lm: {options.messages_column!r}, "
        f"or {options.prompt_column!r} and {options.completion_column!r}, or {options.text_column!r}. Name others with "
        "data.prompt_column and data.completion_column, or write data.prompt_template, e.g. 'Q: {question}'"
    )


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer puts in front of a text (a begin mark, or nothing)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    for start in range(len(marked)):
        if marked[start : start + len(plain)] == plain:
            return list(marked[:start])
    return []


def _end_mark(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    # lengths are cut below, by our own rules; the tokenizer's warning about long texts would only confuse
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _encode_text(rows: Rows, options: DataOptions, tokenizer: Tokenizer) -> list[EncodedRow]:
    require_columns(rows, [options.text_column], "plain text")
    faults = Faults(rows)
    texts = [text_of(row, options.text_column, i, faults, empty=True) for i, row in enumerate(rows.rows)]
    faults.finish()
    start, end = special_prefix(tokenizer), _end_mark(tokenizer)
    documents = [start + ids + end for ids in _ids(tokenizer, [text for text in texts if text.strip()])]
    if options.packing:
        documents = [[i for ids in documents for i in ids]]
    width = options.max_length
    pieces = [ids[at : at + width] for ids in documents for at in range(0, len(ids), width)]
    # a single token predicts nothing
    return [EncodedRow(piece) for piece in pieces if len(piece) > 1]


def _encode_pairs(rows: Rows, options: DataOptions, tokenizer: Tokenizer) -> list[EncodedRow]:
    prompts = _filled(rows, options.prompt_template, options.prompt_column, "the prompt")
    completions = _filled(rows, options.completion_template, options.completion_column, "the completion")
    faults = Faults(rows)
    for index, completion in enumerate(completions):
        if not completion.strip():
            faults.add(index, "the completion is empty")
    faults.finish()
    start, end = special_prefix(tokenizer), _end_mark(tokenizer)
    # tokenized apart, so that a prompt has the same tokens here as when a completion is generated
    pairs = zip(_ids(tokenizer, prompts), _ids(tokenizer, completions), completions, strict=True)
    return [
        _fit(start, prompt, completion + end, options, reference=text.strip())
        for prompt, completion, text in pairs
    ]


def _fit(
    start: list[int], prompt: list[int], completion: list[int], options: DataOptions, reference: str | None
) -> EncodedRow:
    """The row cut to `max_length`: first the prompt's beginning goes, down to a quarter, then the completion's end."""
    room = options.max_length - len(start)
    keep = min(len(prompt), max(room - len(completion), room // 4))
    kept_prompt = prompt[len(prompt) - keep :]
    kept_completion = completion[: room - keep]
    ids = start + kept_prompt + kept_completion
    head = len(start) + keep
    # a row without any prompt predicts its own first token from nothing, which the loss leaves out anyway
    trained = [not options.completion_only] * head + [True] * len(kept_completion)
    cut = len(ids) < len(start) + len(prompt) + len(completion)
    return EncodedRow(ids, trained, reference=reference if options.completion_only else None, cut=cut)


def _filled(rows: Rows, template: str | None, column: str, purpose: str) -> list[str]:
    """The strings of one column, or the filled template, row by row."""
    if template is None:
        require_columns(rows, [column], purpose)
        faults = Faults(rows)
        texts = [text_of(row, column, i, faults, empty=True) for i, row in enumerate(rows.rows)]
        faults.finish()
        return texts
    names = template_columns(template)
    require_columns(rows, names, f"{purpose} (template {template!r})")
    faults = Faults(rows)
    for index, row in enumerate(rows.rows):
        missing = [name for name in names if row.get(name) is None]
        if missing:
            faults.add(index, f"no value for {', '.join(missing)}")
    faults.finish()
    return [template.format(**{name: row[name] for name in names}) for row in rows.rows]


def _encode_chat(rows: Rows, options: DataOptions, tokenizer: Tokenizer) -> list[EncodedRow]:
    require_columns(rows, [options.messages_column], "chat")
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which {rows.source} needs. Use an "
            "instruction-tuned base model, set tokenizer.chat_template, or give prompt and completion columns instead"
        )
    faults = Faults(rows)
    for index, row in enumerate(rows.rows):
        fault = _chat_fault(row.get(options.messages_column))
        if fault:
            faults.add(index, fault)
    faults.finish("A message is {'role': 'user', 'content': '...'}")
    marks_turns = "{% generation" in str(template) or "{%- generation" in str(template)
    encode = _chat_by_mask if marks_turns else _chat_last_turn
    return [encode(row[options.messages_column], row.get("tools"), options, tokenizer) for row in rows.rows]


def _chat_fault(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return "no list of messages"
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f"message {number} lacks role or content"
        if message["role"] not in _ROLES:
            return f"message {number} has the role {message['role']!r}{did_you_mean(str(message['role']), _ROLES)}"
    if messages[-1]["role"] != "assistant":
        return f"the last message is by {messages[-1]['role']!r}, must be by 'assistant'"
    return None


def _chat_by_mask(messages: list, tools: Any, options: DataOptions, tokenizer: Tokenizer) -> EncodedRow:
    """All assistant turns are trained; the template marks them."""
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
    if not any(mask):
        raise DataError(
            "the chat template marks no assistant token in a row that ends with an assistant turn"
        )
    # the beginning of a chat goes first, but never into the last assistant turn: something trained always stays
    width = options.max_length
    last = len(mask) - 1 - mask[::-1].index(True)
    while last and mask[last - 1]:
        last -= 1
    begin = max(0, min(len(ids) - width, last - width // 4))
    trained = mask if options.completion_only else [True] * len(ids)
    span = slice(begin, begin + width)
    return EncodedRow(ids[span], trained[span], cut=len(ids) > width)


def _chat_last_turn(messages: list, tools: Any, options: DataOptions, tokenizer: Tokenizer) -> EncodedRow:
    """Only the last assistant turn is trained: what follows the rendered prompt."""
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True
    )
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    if not whole.startswith(prompt):
        # templates that rewrite earlier turns: train on everything after the common beginning
        common = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        prompt = whole[:common]
    prompt_ids, completion_ids = _ids(tokenizer, [prompt, whole[len(prompt) :]])
    return _fit([], prompt_ids, completion_ids, options, reference=str(messages[-1]["content"]).strip())
