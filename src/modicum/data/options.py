"""What a recipe can say about data; the only place where these options are declared."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["causal_lm", "seq_cls", "regression"]
Format = Literal["auto", "text", "prompt_completion", "chat"]
Split = Literal["train", "validation", "test"]

TASKS: tuple[Task, ...] = ("causal_lm", "seq_cls", "regression")


class Section(BaseModel):
    """A section of a recipe: immutable, and unknown names are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataOptions(Section):
    """Where rows come from, which columns mean what, and how rows become tokens."""

    train: str | None = Field(
        None,
        description="Training rows: a file (.jsonl, .json, .csv, .parquet, .txt; .gz and .xz too), a folder, "
        "'bundled:NAME', or a name on the Hugging Face hub.",
    )
    validation: str | None = Field(
        None, description="Validation rows; by default the validation split of a bundled task or of a folder."
    )
    test: str | None = Field(
        None, description="Test rows, never used to select anything; defaults like `validation`."
    )
    validation_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the training rows set aside when there is no validation source.",
    )
    hub_config: str | None = Field(None, description="Configuration name of a hub data set.")
    format: Format = Field("auto", description="Layout of rows for causal_lm; 'auto' looks at the columns.")
    text_column: str = Field("text", description="Column of plain text.")
    prompt_column: str = Field("prompt", description="Column of the prompt.")
    completion_column: str = Field("completion", description="Column of the completion.")
    messages_column: str = Field("messages", description="Column of the chat messages.")
    prompt_template: str | None = Field(
        None,
        description="Builds the prompt from columns, e.g. 'Q: {question}\\nA:'; replaces `prompt_column`.",
    )
    completion_template: str | None = Field(
        None,
        description="Builds the completion from columns, e.g. ' {answer}'; replaces `completion_column`.",
    )
    text_columns: list[str] | None = Field(
        None,
        description="One or two text columns for seq_cls and regression; found by usual names when unset.",
    )
    label_column: str = Field(
        "label", description="Column of the class index (seq_cls) or number (regression)."
    )
    label_names: list[str] | None = Field(
        None, description="Names of the classes in order; lets the label column hold names."
    )
    max_length: int = Field(512, ge=2, description="Longest row in tokens.")
    packing: bool = Field(
        False, description="Plain text only: join documents, separated by the end mark, into full rows."
    )
    completion_only: bool = Field(True, description="Train on completions (or assistant turns) only.")
    group_by_length: bool = Field(False, description="Put rows of similar length into one batch.")
    max_rows: int | None = Field(None, ge=1, description="At most so many training rows, drawn by `seed`.")
    max_eval_rows: int | None = Field(
        None, ge=1, description="At most so many validation and test rows each, drawn by `seed`."
    )
    seed: int = Field(0, description="Seed of every draw of rows; independent of the training seed.")
