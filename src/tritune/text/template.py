"""Prompt templates as data: the fields of one row -> the text in front of its answer. Knows no tokenizer and no task.

A template is Jinja, cut down to what a row of texts needs: fields, `if`, slices and a few filters. Loops, calls,
attributes and assignments are refused when the template is read, so what a template can cost is bounded by its own
length, and a template from a stranger's adaptation cannot reach anything but the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from jinja2 import StrictUndefined, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tritune.errors import Mismatch, Problem
from tritune.spec import Given

MAX_TEMPLATE_CHARACTERS = 20_000
MAX_RENDERED_CHARACTERS = 1_000_000
MAX_DEPTH = 40

ROW = "row"
"""`row["a column"]` reaches a column whose name is not an identifier."""

FILTERS = frozenset(
    {"capitalize", "default", "first", "last", "length", "lower", "title", "trim", "upper", "wordcount"}
)
"""None of them makes a text longer than a small multiple, so a chain of them cannot grow without bound."""

_NODES = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.If,
    nodes.CondExpr,
    nodes.Compare,
    nodes.Operand,
    nodes.Not,
    nodes.And,
    nodes.Or,
    nodes.Neg,
    nodes.Concat,
    nodes.Filter,
    nodes.Keyword,
    nodes.Test,
    nodes.Getitem,
    nodes.Slice,
)
_RESERVED = frozenset(
    {
        ROW,
        "self",
        "loop",
        "true",
        "false",
        "none",
        "True",
        "False",
        "None",
        "and",
        "or",
        "not",
        "in",
        "is",
        "if",
        "else",
    }
)


class Message(TypedDict):
    """One turn of a conversation, in the form chat templates read."""

    role: Literal["user", "assistant"]
    content: str


Chat = Callable[[Sequence[Message]], str]
"""Turns -> the text up to where the assistant's answer starts. Only the base's tokenizer knows how."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered conversation. `control`: written by the chat template, so its special tokens are meant."""

    text: str
    control: bool


class TemplateSpec(Given):
    """A prompt template, stored with every adaptation.

    Attributes:
        kind: "jinja": the rendered text is the prompt; "chat": it is the user's turn, and the base's own chat template
            wraps it.
        context: Jinja source of one example, ending where its answer starts. White space at the end of what it renders
            to is taken off, because an answer brings its own leading space.
        separator: between instruction, solved examples and the example to answer. Not used by "chat".
        instruction: plain text (no Jinja) in front of everything; "chat" puts it in front of the first turn.
    """

    kind: Literal["jinja", "chat"] = "jinja"
    context: str
    separator: str = "\n\n"
    instruction: str = ""


class Template:
    """A template ready to render.

    Raises:
        Mismatch: the source is too long, is not valid Jinja, or uses something a template may not.
    """

    def __init__(self, spec: TemplateSpec) -> None:
        self.spec = spec
        # Globals (range, dict, lipsum ...) are for templates that compute; a prompt only shows a row.
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
        environment.globals.clear()
        if len(spec.context) > MAX_TEMPLATE_CHARACTERS:
            _refuse([f"it is {len(spec.context)} characters long; expected at most {MAX_TEMPLATE_CHARACTERS}"])
        try:
            tree = environment.parse(spec.context)
            _refuse(_forbidden(tree))
            self._template = environment.from_string(spec.context)
        except TemplateError as error:
            _refuse([f"line {getattr(error, 'lineno', 1)}: {error.message}"])
        except (RecursionError, SyntaxError):
            _refuse(["it is nested too deeply"])
        except ValueError as error:  # a number of thousands of digits
            _refuse([str(error)])
        self.fields = _fields(tree)

    def render(self, fields: Mapping[str, str]) -> str:
        """The context of one example, without white space at its end.

        Raises:
            Mismatch: a field is missing, the template does not suit this row, or the text is longer than a million
                characters.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate({**fields, ROW: fields}):
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS:
                    _refuse([f"a row renders to more than {MAX_RENDERED_CHARACTERS} characters"])
                pieces.append(piece)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            _refuse([f"it cannot be rendered with the fields {_quoted(fields)}: {error}"])
        return "".join(pieces).rstrip()

    def text(self, fields: Mapping[str, str], shots: Sequence[tuple[Mapping[str, str], str]] = ()) -> str:
        """Instruction, solved examples (fields, answer) and the example to answer, as one text."""
        parts = [self.spec.instruction] if self.spec.instruction else []
        parts += [f"{self.render(shot)} {answer}" for shot, answer in shots]
        parts.append(self.render(fields))
        return self.spec.separator.join(parts)

    def messages(self, fields: Mapping[str, str], shots: Sequence[tuple[Mapping[str, str], str]] = ()) -> list[Message]:
        """The same as turns: every solved example is a user turn and the assistant's answer to it.

        The instruction joins the first user turn: not every chat template knows a system turn.
        """
        turns: list[Message] = []
        for shot, answer in shots:
            turns.append({"role": "user", "content": self.render(shot)})
            turns.append({"role": "assistant", "content": answer})
        turns.append({"role": "user", "content": self.render(fields)})
        if self.spec.instruction:
            turns[0]["content"] = f"{self.spec.instruction}\n\n{turns[0]['content']}"
        return turns


def chat_pieces(chat: Chat, messages: Sequence[Message]) -> tuple[Piece, ...]:
    """A conversation as the base writes it, the turns' own text kept apart from the chat template's.

    The chat template sees a mark in place of every turn's text: so nothing in a text can end a turn or start another,
    and an encoder can tell where special tokens are meant.

    Raises:
        Mismatch: the chat template does not show every turn exactly once and in order.
    """
    # Private-use characters: no tokenizer gives them a meaning, and trimming leaves them alone.
    marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
    rest = chat([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
    pieces: list[Piece] = []
    for message, mark in zip(messages, marks, strict=True):
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            _refuse([f"the base's chat template does not show turn {len(pieces) // 2 + 1} exactly once and in order"])
        pieces += [Piece(before, True), Piece(message["content"], False)]
    return tuple(piece for piece in (*pieces, Piece(rest, True)) if piece.text)


def default_template(text_field: str, label_field: str) -> TemplateSpec:
    """The text, and the label column's name as the question: few tokens, and no words of a particular language."""
    # A column name becomes part of a template here, so nothing of it may read as Jinja.
    question = " ".join(re.sub(r"[{}%#_]", " ", label_field).split()) or "Label"
    return TemplateSpec(context=f"{reference(text_field)}\n{question[0].upper()}{question[1:]}:")


def reference(field: str) -> str:
    """The Jinja expression that shows this field."""
    if field.isidentifier() and field not in _RESERVED:
        return f"{{{{ {field} }}}}"
    quoted = field.replace("\\", "\\\\").replace('"', '\\"')
    quoted = quoted.replace("\r", "\\r").replace("\n", "\\n")  # Jinja reads every line end as \n
    return f'{{{{ {ROW}["{quoted}"] }}}}'


def _forbidden(tree: nodes.Template) -> list[str]:
    """What this template uses and may not."""
    found: list[str] = []
    stack: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > MAX_DEPTH:
            return ["it is nested too deeply"]
        what = _refusal(node)
        if what:
            found.append(f"line {node.lineno}: {what}")
        children = [child for child in node.iter_child_nodes() if not _is_row_name(node, child)]
        stack += [(child, depth + 1) for child in reversed(children)]
    return found


def _refusal(node: nodes.Node) -> str:
    if not isinstance(node, _NODES):
        return f"{type(node).__name__.lower()} is not allowed in a template; fields, 'if', slices and filters are"
    if isinstance(node, nodes.Filter) and node.name not in FILTERS:
        return f"the filter '{node.name}' is not allowed; these are: {', '.join(sorted(FILTERS))}"
    if isinstance(node, nodes.Name) and node.name == ROW:
        return f"'{ROW}' stands for the whole row; write {ROW}[\"column\"]"
    if isinstance(node, nodes.Getitem) and not _is_row_item(node) and not isinstance(node.arg, nodes.Slice):
        return f'only {ROW}["column"] and slices such as text[:500] may stand in brackets'
    return ""


def _is_row_item(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.node, nodes.Name)
        and node.node.name == ROW
        and isinstance(node.arg, nodes.Const)
        and isinstance(node.arg.value, str)
    )


def _is_row_name(parent: nodes.Node, child: nodes.Node) -> bool:
    return _is_row_item(parent) and isinstance(child, nodes.Name)


def _fields(tree: nodes.Template) -> tuple[str, ...]:
    """The fields a template mentions, in order and once each."""
    named = {(name.lineno, name.name): name.name for name in tree.find_all(nodes.Name) if name.name != ROW}
    items = [item.arg.value for item in tree.find_all(nodes.Getitem) if _is_row_item(item)]  # type: ignore[attr-defined]
    return tuple(dict.fromkeys([*named.values(), *items]))


def _quoted(names: Mapping[str, str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _refuse(problems: Sequence[str]) -> None:
    Mismatch.check("This prompt template cannot be used.", [Problem("template", what) for what in problems])
