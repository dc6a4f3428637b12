import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from lmx.data.chat import Chat, render, render_spans

TEMPLATES = Path(__file__).parents[1] / "data_files/chat_templates"
CONVERSATIONS = json.loads((TEMPLATES / "conversations.json").read_text())
# What transformers' apply_chat_template made of them (its version is in the file) at this time; None where it raised.
EXPECTED = json.loads((TEMPLATES / "expected.json").read_text())["chats"]
NOW = datetime(2025, 2, 3, 4, 5, 6)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "hello"}
MARKED = "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_renders_as_transformers_does(template):
    source = (TEMPLATES / f"{template}.jinja").read_text()
    compared = 0
    for name, case in CONVERSATIONS.items():
        expected = EXPECTED[f"{template}/{name}"]
        how = {**case["how"], **TOKENS, "now": NOW}
        if expected["text"] is None:
            with pytest.raises(ValueError, match="chat template"):
                render(source, case["messages"], **how)
            continue
        assert render(source, case["messages"], **how) == expected["text"], name
        if "spans" in expected:
            spans = tuple((start, end) for start, end in expected["spans"])
            assert render_spans(source, case["messages"], **how) == Chat(expected["text"], spans), name
        compared += 1
    assert compared >= 4


def test_all_of_the_recorded_chats_are_here():
    assert len(EXPECTED) == len(CONVERSATIONS) * len(list(TEMPLATES.glob("*.jinja"))) > 150
    assert sum(entry["text"] is None for entry in EXPECTED.values()) == 35


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ strftime_now.__globals__.x }}",
        "{{ namespace.__init__.__globals__.x }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ ('%s' | attr('__class__')).x }}",
        "{{ range(100000000) | list }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(ValueError, match="chat template"):
        render(source, [USER])


def test_messages_are_not_changed_and_none_is_left_out():
    message = {"role": "assistant", "content": "a", "tool_calls": None, "reasoning": "r"}
    before = dict(message)
    assert render("{{ messages[0] | tojson(sort_keys=true) }}", [message]) == (
        '{"content": "a", "reasoning": "r", "reasoning_content": "r", "role": "assistant", "thinking": "r"}'
    )
    assert message == before


@pytest.mark.parametrize(
    ("messages", "how", "said"),
    [
        ([], {}, "at least one message"),
        (USER, {}, "must be a list"),
        ("hello", {}, "must be a list"),
        (["hello"], {}, r"messages\[0\]='hello' must be a dict"),
        ([{"role": "user", "content": [b"x"]}], {}, r"messages\[0\]\['content'\]\[0\] is a bytes"),
        ([USER], {"tools": [print]}, r"tools\[0\].*JSON schema"),
        ([USER], {"colour": object()}, "colour is a object"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, how, said):
    with pytest.raises(ValueError, match=said):
        render("{{ messages }}", messages, **how)


def test_errors_of_a_template_say_what_it_said():
    with pytest.raises(ValueError, match="only dragons may speak"):
        render("{{ raise_exception('only dragons may speak') }}", [USER])
    with pytest.raises(ValueError, match="does not compile, line 2"):
        render("\n{% if %}", [USER])
    with pytest.raises(ValueError, match=r"fails on this conversation \(TypeError"):
        render("{{ 'a' + 1 }}", [USER])


def test_spans_in_loops_macros_and_nested_blocks():
    messages = [USER, {"role": "assistant", "content": "dé"}]
    chat = render_spans(MARKED, messages)
    assert chat.text == "user:hello;assistant:dé;"
    assert [chat.text[a:b] for a, b in chat.spans] == ["hello", "dé"]
    nested = "{% generation %}a{% generation %}b{% endgeneration %}c{% endgeneration %}d"
    assert render_spans(nested, messages) == Chat("abcd", ((0, 3),))
    # A block in a macro lies where the macro's text comes to lie.
    macro = "{% macro said(m) %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endmacro %}{% for m in messages %}{{ said(m) }}{% endfor %}"
    chat = render_spans(macro, messages)
    assert (chat.text, [chat.text[a:b] for a, b in chat.spans]) == ("<hello><dé>", ["hello", "dé"])


def test_spans_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match=re.escape("{% generation %}")):
        render_spans("{{ messages[0].content }}", [USER])
    with pytest.raises(ValueError, match="changes the text"):
        render_spans("{% filter length | string %}{% generation %}abc{% endgeneration %}{% endfilter %}", [USER])
    with pytest.raises(ValueError, match="changes the text"):
        render_spans(MARKED, [{"role": "user", "content": "\ufdd1"}])
