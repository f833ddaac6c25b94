"""Chat templates: jinja2 in a sandbox, with the globals and filters that templates on the hub expect.

Behaves like transformers' `render_jinja_template` (utils/chat_template_utils.py). A template is code from a checkpoint: it
runs in `ImmutableSandboxedEnvironment` and sees plain data only, so a picture's or an array's methods are out of its reach.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2 import ext, meta, nodes, parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qvlmoe_jax.errors import ProcessorError

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names for it in circulation; the first is what templates read
_BARE: dict[type, Callable[[Any], Any]] = {str: str.__str__, int: int.__int__, float: float.__float__}
_FAILURES = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip
_CUT = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A compiled template. `special_tokens` (`eos_token`, ...) are visible in it by name; `variables` is all that it reads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        if not isinstance(source, str):
            raise ProcessorError(f"the chat template is a {type(source).__name__}, expected the text of a jinja2 template")
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.variables = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ProcessorError(f"the chat template does not compile: {error}; expected a jinja2 template") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.special_tokens)  # a compiled template does not pickle; data workers get a copy

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text.

        Args:
          messages: one conversation; keys whose value is None are dropped, as APIs return `content=None`.
          add_generation_prompt: ends with the header of the assistant's turn.
          continue_final_message: ends inside the last message, without its end token.
          tools, documents: as the template reads them, JSON schemas and dicts.
          variables: anything else the template reads (`add_vision_id`, `enable_thinking`, ...).
        Raises:
          ProcessorError: the template refuses the messages, or does not read a variable (a misspelt option).
        """
        if unknown := sorted(set(variables) - self.variables):
            readable = ", ".join(sorted(self.variables - {"messages", "add_generation_prompt", *self.special_tokens}))
            raise ProcessorError(
                f"unknown option {unknown[0]!r}: neither the processor's nor one that the chat template reads ({readable})"
            )
        if tools is not None and not isinstance(tools, (list, tuple)):
            raise ProcessorError(f"tools are {tools!r:.80}, expected a list of dicts that hold a function's JSON schema")
        for tool in tools or ():
            if not isinstance(tool, Mapping):
                raise ProcessorError(f"tools contain a {type(tool).__name__}, expected dicts that hold a function's JSON schema")
        chat = [_with_reasoning({key: v for key, v in _plain(m).items() if v is not None}) for m in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise ProcessorError("continue_final_message and add_generation_prompt exclude each other; give one of them")
            _mark_end(chat)
        try:
            text = self._template.render(
                messages=chat,
                tools=None if tools is None else _plain(list(tools)),
                documents=None if documents is None else _plain(list(documents)),
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **_plain(variables)},
            )
        except _FAILURES as error:
            raise ProcessorError(f"the chat template refuses the messages: {error}") from error
        return _cut_at_mark(text) if continue_final_message else text


class _Generation(ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own spelling

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own filter escapes HTML, which a prompt must not hold
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def _plain(value: Any) -> Any:
    """JSON types only; a picture or an array becomes `"<its type>"`. Templates ask whether media keys exist, no more."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    for kind, bare in _BARE.items():  # subclasses (enums, ...) carry methods
        if isinstance(value, kind):
            return bare(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_end(chat: list[dict[str, Any]]) -> None:
    """Appends a mark to the last message's text, to find after rendering where it ended."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CUT
        return
    for part in reversed(content or []):
        if "text" in part:
            part["text"] += _CUT
            return
    raise ProcessorError("continue_final_message is set, but the last message has no text; expected text to continue")


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CUT.strip())
    if at < 0:
        raise ProcessorError("continue_final_message is set, but the chat template does not print the last message's text")
    kept = text[:at]
    return kept if text.startswith(_CUT, at) else kept.rstrip()  # the template strips messages
