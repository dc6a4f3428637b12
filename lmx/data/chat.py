"""Chat templates: a conversation to the text a checkpoint was trained on, and which of its characters the assistant wrote.

A template is code from whoever published the checkpoint, so it runs in Jinja2's immutable sandbox and sees nothing but plain JSON values. The
language and its additions (`raise_exception`, `strftime_now`, `tojson` without HTML escapes, `{% generation %}`, `{% break %}`) are those that
templates on the Hugging Face hub are written for.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

Message = Mapping[str, Any]

# Around what the assistant wrote, while spans are sought: two of the code points that Unicode keeps out of every text.
BEGIN, END = "\ufdd0", "\ufdd1"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates read a message's reasoning under


@dataclass(frozen=True)
class Chat:
    """A rendered conversation."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Ranges of characters of `text` inside the template's `{% generation %}` blocks: what the assistant wrote."""


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    now: datetime | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
      template: Jinja2 source.
      messages: `{"role": ..., "content": ...}` and what else the template reads (`tool_calls`, say), of JSON values. Keys whose value is None
        are left out; a message's reasoning is there under all the names that templates know.
      add_generation_prompt: end with what comes before the assistant's next words.
      tools: JSON schemas of functions the model may call.
      now: what `strftime_now` shows; the clock by default.
      variables: anything else the template reads: `bos_token`, `documents`, `enable_thinking`.

    Raises:
      ValueError: no messages, values that are not JSON, a template that does not compile, fails, or refuses the conversation.
    """
    return _render(template, messages, add_generation_prompt, tools, now, variables, marked=False)


def render_spans(template: str, messages: Sequence[Message], **how: Any) -> Chat:
    """As `render`, and where in the text the assistant's words are.

    Raises:
      ValueError: as `render`; and when the template has no `{% generation %}` block, or changes what it holds afterwards (a filter over it, say).
    """
    if not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template):
        raise ValueError(
            "the chat template marks nothing with {% generation %}, so what the assistant wrote is not known; put the block in"
        )
    plain = render(template, messages, **how)
    tools, now, prompt = how.pop("tools", None), how.pop("now", None), how.pop("add_generation_prompt", False)
    parts = re.split(f"([{BEGIN}{END}])", _render(template, messages, prompt, tools, now, how, marked=True))
    spans, place, depth, start = [], 0, 0, 0
    for part in parts:
        if part == BEGIN:
            start, depth = (place if depth == 0 else start), depth + 1
        elif part == END:
            depth -= 1
            if depth == 0:
                spans.append((start, place))
        else:
            place += len(part)
    if depth or "".join(part for part in parts if part not in (BEGIN, END)) != plain:
        raise ValueError("the chat template changes the text of a {% generation %} block after it; its spans are not known")
    return Chat(plain, tuple(spans))


def _render(template, messages, add_generation_prompt, tools, now, variables, *, marked) -> str:
    from jinja2 import TemplateError

    if isinstance(messages, Mapping | str) or not messages:
        raise ValueError(f"messages={messages!r} must be a list of at least one message, {{'role': ..., 'content': ...}}")
    conversation = [_message(message, i) for i, message in enumerate(messages)]
    clock = now or datetime.now()
    try:
        return _compiled(template, marked).render(
            messages=conversation,
            tools=None if tools is None else [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)],
            add_generation_prompt=add_generation_prompt,
            strftime_now=lambda form: clock.strftime(form),
            **{"documents": None, **{name: _plain(value, name) for name, value in variables.items()}},
        )
    except TemplateError as error:
        raise ValueError(f"the chat template does not take this conversation: {error}") from error
    except (TypeError, ArithmeticError, LookupError, AttributeError) as error:  # what its own expressions raise
        raise ValueError(f"the chat template fails on this conversation ({type(error).__name__}: {error})") from error


def _message(message: Message, i: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{i}]={message!r} must be a dict, such as {{'role': 'user', 'content': 'Hello'}}")
    message = {key: _plain(value, f"messages[{i}][{key!r}]") for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any, where: str) -> Any:
    """JSON values rebuilt, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, str):  # an enumeration's member, say
        return str.__str__(value)
    hint = "; a tool is given as its JSON schema" if callable(value) else ""
    raise ValueError(f"{where} is a {type(value).__name__}, but a chat template sees only text, numbers, lists and dicts{hint}")


@lru_cache(64)
def _compiled(source: str, marked: bool):
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` … `{% endgeneration %}`: what is inside, between marks where they are wanted."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller) -> str:
            return f"{BEGIN}{caller()}{END}" if marked else caller()

    class Namespace(jinja2.utils.Namespace):
        """As Jinja2's, but nothing with a leading underscore can be set on it: that way out of the sandbox stays shut."""

        def __init__(*args, **attributes):
            attributes = dict(*args[1:], **attributes)
            for name in attributes:
                _no_underscore(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name, value):
            _no_underscore(name)
            super().__setitem__(name, value)

    def _no_underscore(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "namespace": Namespace}
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template does not compile, line {error.lineno}: {error.message}") from error
