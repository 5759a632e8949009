"""Chat templates in the manner of several families, each with its marks and whether the tokenizer calls them special."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken

from rlhf.models.tiny import byte_tokenizer
from rlhf.models.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Family:
    """`special` and `plain` are added to the byte tokenizer; `end` closes an assistant's turn."""

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...]
    end: str

    def tokenizer(self) -> ChatTokenizer:
        """Return the byte tokenizer with the marks and the template of this family."""
        hf = byte_tokenizer()
        hf.add_tokens([AddedToken(text, special=True, normalized=False) for text in self.special], special_tokens=True)
        hf.add_tokens([AddedToken(text, special=False, normalized=False) for text in self.plain])
        hf.chat_template = self.template
        hf.model_max_length = 10**6
        return ChatTokenizer(hf, pad_id=0, eos_ids=(hf.convert_tokens_to_ids(self.end),))


LLAMA = Family(
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    (),
    "<|eot_id|>",
)
MISTRAL = Family(
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + '</s>' }}"
    "{% else %}{{ raise_exception('only users and assistants speak') }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    (),
    "</s>",
)
GEMMA = Family(
    "{{ '<bos>' }}{% set lead = '' %}"
    "{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ (lead if loop.first else '') + (m.content | trim) + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    ("\n\n", "<table>", "<h1>"),
    "<end_of_turn>",
)
QWEN = Family(
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{% else %}{% set said = m.content %}{% if m.role == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set said = '<think>\\n' + thought + '\\n</think>\\n\\n' + said.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + said + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ("<|endoftext|>",),
    ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    "<|im_end|>",
)
PHI = Family(
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    ("<|system|>", "<|endoftext|>"),
    ("<|user|>", "<|assistant|>", "<|end|>"),
    "<|end|>",
)
FAMILIES = {"llama": LLAMA, "mistral": MISTRAL, "gemma": GEMMA, "qwen": QWEN, "phi": PHI}
