"""Templates render as transformers renders them, and can do nothing else."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jaxgrpo import chat_template
from jaxgrpo.chat_template import render

# In the manner of Qwen3's: tools, a search from the end, thoughts taken out of what was said.
THINKS = """\
{%- macro tool(function) %}
    {{- '<tool_call>\\n' + (function | tojson) + '\\n</tool_call>' }}
{%- endmacro %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for each in tools %}{{ tool(each) }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- set said = message.content %}
    {%- if ns.searching and message.role == 'user' and said is string
            and not (said.startswith('<tool>') and said.endswith('</tool>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- generation %}
            {{- '<|im_start|>assistant\\n' + (said if loop.index0 < ns.last else message.content) }}
        {%- endgeneration %}
    {%- else %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
ODD = """
  {% for m in messages -%}
  {{ loop.cycle('a', 'b') }} {{ m.content | e }} {{ {'<é>': m.role} | tojson }}
  {{ m | tojson(indent=1) }}
  {{ m.content | replace('a', '') | indent(2) | upper | title | wordwrap(10) }} {{ bos_token }}
    {% endfor %}
{{ missing }} {{ dict(a=1).items() | list }} {{ strftime_now('%%') }} {{ '%s-%r' % (1, 'x') }}
{{ '{0}'.format('x') ~ 1 ~ none }} {{ range(3) | list }} {{ documents is none }}
{{ lipsum is callable }}
"""


def chat(rng):
    words = [
        "a",
        "<think>",
        "</think>",
        "\n",
        " ",
        "<tool>x</tool>",
        "é",
        "<|im_end|>",
        "&",
        "{{ x }}",
    ]
    return [
        {"role": role, "content": "".join(rng.choices(words, k=rng.randrange(9)))}
        for role in ["system"] * rng.randrange(2)
        + rng.choices(["user", "assistant", "other"], k=rng.randrange(5))
        + ["user"]
    ]


@pytest.mark.parametrize("template", [THINKS, ODD])
def test_it_renders_as_transformers_does(template):
    hf = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", chat_template=template
    )
    rng = random.Random(0)
    for _ in range(50):
        options = {"add_generation_prompt": rng.random() < 0.5}
        if rng.random() < 0.5:
            options["enable_thinking"] = rng.random() < 0.5
        options["tools"] = rng.choice([None, None, [{"name": "f<é>", "type": "function"}]])
        messages = chat(rng)
        wanted = hf.apply_chat_template(messages, tokenize=False, **options)
        values = {"messages": messages, "documents": None, "bos_token": "<s>"} | options
        assert render(template, values) == wanted


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__base__'] }}",
    "{{ messages | attr('__class__') | attr('__init__') }}",
    "{{ [''] | map(attribute='__class__') | first | attr('mro') }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__code__ }}",
    "{{ '{0.__class__.__base__}'.format(1) }}",
    "{{ ('{0.__class__.__base__}' | attr('format'))(1) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ self._TemplateReference__context.environment }}",
    "{% set messages.append = 1 %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% extends '/etc/passwd' %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.mro() }}",
    "{{ dict.__subclasses__() }}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_the_sandbox_keeps_its_internals(template):
    values = {"messages": [{"role": "user", "content": "x"}]}
    with contextlib.suppress(ValueError):
        # What is refused as an attribute may be undefined, which shows as nothing.
        assert render(template, values) == ""


BOMBS = [
    "{{ 'x' * 10**12 }}",
    "{{ [0] * 10**12 }}",
    "{{ 10**(10**10) }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ '{:>1000000000000}'.format(1) }}",
    "{{ 'x'.ljust(10**12) }}{{ 'x' | center(10**12) }}",
    "{{ 'x\\n' | indent(10**12) }}",
    "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
    "{{ ('x' * 10**6).replace('', 'y' * 10**6) }}",
    "{{ (['x' * 10**6] * 10**6) | join }}",
    "{{ [[[1]]] | tojson(indent=10**12) }}",
    "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(9999) %}{% for i in range(9999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
    "{{ '(' * 100000 }}{{" + "(" * 100_000 + "1" + ")" * 100_000 + "}}",
    "{% if 1 %}" * 10_000 + "{% endif %}" * 10_000,
    "{{ raise_exception('x' * 10**8) }}",
    "{{ strftime_now('%' ~ '1000000000000' ~ 'd') }}{{ 1 // 0 }}",
]


def test_what_it_may_take_is_bounded():
    # In a process of its own, whose largest child is one that renders.
    program = """
import json, resource, sys
from jaxgrpo import chat_template
chat_template.SECONDS = 0.5
errors = []
for template in json.load(sys.stdin):
    try:
        chat_template.render(template, {})
    except ValueError as error:
        errors.append(str(error))
    assert chat_template.render("{{ x }}", {"x": 7}) == "7"  # the next is not affected
chat_template._stop()
print(json.dumps([errors, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""
    command, bombs = [sys.executable, "-c", program], json.dumps(BOMBS)
    done = subprocess.run(command, input=bombs, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    errors, most_kb = json.loads(done.stdout)
    assert len(errors) == len(BOMBS)
    assert all(0 < len(error) < 1100 and "\n" not in error for error in errors)
    assert most_kb < 1 << 20


def test_it_survives_what_ends_its_process():
    assert render("a", {}) == "a"
    chat_template._renderer.send_signal(signal.SIGINT)  # Ctrl-C goes to all processes
    assert render("b", {}) == "b"
    chat_template._renderer.kill()
    chat_template._renderer.wait()
    assert render("c", {}) == "c"


def test_its_process_ends_with_ours():
    program = (
        "import os\n"
        "from jaxgrpo import chat_template\n"
        "chat_template.render('x', {})\n"
        "print(chat_template._renderer.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    for _ in range(10_000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        os.sched_yield()
    assert done.stderr == b""
