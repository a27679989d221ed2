"""What a stranger's template may take is bounded, and what a good one writes is what transformers writes."""

import time

import psutil
import pytest

from saap.base.chat_template import ChatTemplate, TemplateError

TURNS = [{"role": "user", "content": "<b> é"}, {"role": "assistant", "content": "so"}]


def test_turns_are_written_with_the_special_tokens_and_helpers():
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m | tojson }}\n{% if loop.first %}{% continue %}{% endif %}!"
        "{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    plain = '<s>{"role": "user", "content": "<b> é"}\n{"role": "assistant", "content": "so"}\n!'
    assert template.render(TURNS) == plain
    assert template.render(TURNS, add_generation_prompt=True) == plain + "?"


def test_what_the_template_generates_is_marked():
    source = "{% for m in messages %}A{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    template = ChatTemplate(source, {})
    assert template.render(TURNS) == "A<b> éAso"
    assert template.render_marked(TURNS) == ("A<b> éAso", [(1, 6), (7, 9)])


REFUSED = {
    "{{ raise_exception('no system') }}": "^no system$",
    "{% if %}": "Expected an expression",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ 'x' * 10**9 }}": "takes more than 300 MiB",
    "{{ '%1000000000d' % 5 }}": "takes more than 300 MiB",
    "{{ '' | center(1000000000) }}": "takes more than 300 MiB",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": r"takes more than 1\.5 s",
    "{{ (10**9)**(10**7) }}": r"takes more than 1\.5 s",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% for m in range(99999) %}{{ 'x' * 999 }}{% endfor %}": "16 million characters",
}  # fmt: skip


@pytest.mark.parametrize("source", REFUSED)
def test_a_hostile_template_ends_in_a_line(source):
    began, before = time.process_time(), psutil.Process().memory_info().rss
    with pytest.raises(TemplateError, match=REFUSED[source]) as caught:
        ChatTemplate(source, {}).render(TURNS)
    assert "\n" not in str(caught.value)
    assert time.process_time() - began < 1 and psutil.Process().memory_info().rss - before < 50 << 20


def test_a_template_that_was_ended_serves_the_next_conversation_and_leaves_no_process():
    template = ChatTemplate("{% for a in range(messages[0].n | int) %}{{ 'x' * 9999999 }}{% endfor %}!", {})
    with pytest.raises(TemplateError):
        template.render([{"n": "99"}])
    assert template.render([{"n": "0"}]) == "!"
    child = psutil.Process(template._process.pid)
    del template
    assert not child.is_running()
