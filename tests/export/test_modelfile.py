"""Chat templates in Ollama's language: exact, or not at all."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf.export.modelfile import modelfile, read_layout
from rlhf.models.tiny import CHATML

DEFAULT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind {{x}}.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}"
    "{% else %}{{ '<<SYS>>' + message['content'] + '<</SYS>>' }}{% endif %}{% endfor %}"
)
NUMBERED = "{% for message in messages %}{{ loop.index ~ message['role'] ~ ': ' ~ message['content'] }}\n{% endfor %}"
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)


def renderer(template):
    def refuse(why):
        raise ValueError(why)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)
    return lambda messages, ask: compiled.render(messages=messages, add_generation_prompt=ask)


def test_a_template_is_taken_apart_exactly():
    layout = read_layout(renderer(CHATML))
    assert layout.opening == ""
    assert layout.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert layout.reply == "<|im_start|>assistant\n"
    assert layout.template() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        "<|im_start|>assistant\n"
    )


def test_a_default_system_message_stands_only_without_one():
    layout = read_layout(renderer(DEFAULT))
    assert layout.opening == "<|im_start|>system\nBe kind {{x}}.<|im_end|>\n"
    assert layout.template().startswith(
        '{{ if not .System }}<|im_start|>system\nBe kind {{ "{{" }}x}}.<|im_end|>\n{{ end }}{{ range'
    )


@pytest.mark.parametrize("template", [CHATML, DEFAULT, LLAMA3, MISTRAL])
def test_conversations_are_those_of_the_template(template):
    render, layout = renderer(template), read_layout(renderer(template))
    user, answer = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi {{.}}"}
    system = {"role": "system", "content": "Short."}
    for talk in ([user], [user, answer, user], [system, user], [system, user, answer, user, answer, user]):
        assert layout.render(talk, True) == render(talk, True)


@pytest.mark.parametrize("template", [NUMBERED, NO_SYSTEM])
def test_a_template_that_is_a_program_is_left_to_the_metadata(template):
    assert read_layout(renderer(template)) is None


def test_the_modelfile_names_file_template_and_stops(tiny_tokenizer):
    lines = modelfile("m.bf16.gguf", tiny_tokenizer).splitlines()
    assert lines[0] == "FROM ./m.bf16.gguf"
    assert lines[1].startswith('TEMPLATE """{{ range .Messages }}')
    assert lines[-1] == 'PARAMETER stop "<|im_end|>"'
