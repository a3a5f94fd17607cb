"""Chat templates, compared with transformers, which renders them with jinja2."""
import json
import subprocess

import pytest
import transformers

# In the manner of well-known families.
FAMILIES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "qwen3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set content = message.content %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ ns.last_query_index ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "llama3": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "mistral": """{%- set loop_messages = messages -%}
{{ bos_token }}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate!') }}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}""",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
             "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
             "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "phi3": "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
            "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "deepseek": "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}"
                "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}"
                "{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
                "{%- if message['role'] == 'assistant' and message['content'] is not none %}{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
                "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}",
}

ODD = {
    "loops": "{% for i in range(5) if i != 2 %}{{ loop.index }}/{{ loop.length }}{% if not loop.last %}, {% endif %}{% else %}none{% endfor %}"
             "{% for a in [] %}x{% else %} empty{% endfor %}{% for k, v in {'a': 1, 'b': [2, 3]}.items() %} {{ k }}={{ v | tojson }}{% endfor %}",
    "break": "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, s='') %}{% for m in messages + messages %}{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s ~ ns.n %}{% endfor %}{{ ns.n }} {{ ns.s }}",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ {'a': none, 'b': true, 'ü': [1.5, 'x\"<']} | tojson }}",
    "slices": "{% set x = [1, 2, 3, 4, 5] %}{{ x[1:] | join }} {{ x[:-1] | tojson }} {% for i in x[::-1] %}{{ i }}{% endfor %} {{ x[::2] | length }} {{ x[-1] }} {{ messages[0].content[2:5] }} {{ messages[0]['content'][:-1] }}",
    "macros": "{% macro turn(role, text='nothing', end=false) %}<{{ role }}>{{ text|trim }}{% if end %}</{{ role }}>{% endif %}{% endmacro %}"
              "{{ turn('a') }}{{ turn('b', messages[0].content, end=true) }}"
              "{% macro around() %}({{ caller() }}){% endmacro %}{% call around() %}x{% endcall %}",
    "filters": "{{ messages | map(attribute='role') | join('+') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ [3, 1, 2] | sort | first }}"
               " {{ ' x ' | trim }} {{ nothing | default('d') }} {{ 'a-b' | replace('-', '+') }} {{ 'abc' | length }} {{ [1, 2] | last }} {{ 'aBc' | capitalize }} {{ '7' | int + 1 }}",
    "tests": "{{ messages is iterable }} {{ messages[0] is mapping }} {{ nothing is defined }} {{ none is none }} {{ 3 is odd }} {{ 'a' in ['a'] }} {{ 'x' not in 'abc' }} {{ 1 == 1.0 }}",
    "expressions": "{{ 7 / 2 }} {{ 7 % 3 }} {{ 2 * 5 }} {{ -3 + 1 }} {{ 'a' if false else 'b' }} {{ ('x' if false) }}| {{ not true or false and true }} {{ 'a' ~ 1 }} {{ 3.0 }} {{ true }}",
    "whitespace": "  {% if true %}\n  a\n  {%- endif %}\n\n  {# note #}\n b {{- ' c ' -}} d\n{% set x = 1 %}\n\tend\n",
    "set block": "{% set text %}<{{ messages[0].role }}>{% endset %}{{ text }}{{ text | length }}",
    "braces": "{{ '{{' }}{{ '{%' }} { % }",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "strftime": "{{ strftime_now('%Y') }} {{ strftime_now('%d %B %Y') }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ sep_token is defined }}",
    "no tools": "{{ tools is none }} {{ documents is none }} {{ tools is defined }}",
}

MESSAGES = ["Hello", " a \"quoted\" <tag>\n\n ünï 日本 ", "{{ 7 * 6 }} {% raw %}", "<|im_end|>"]

@pytest.fixture
def folder(demo_model, tmp_path):
    """The bundled model, with a tokenizer of its own."""

    def make(config, **files):
        for path in demo_model.iterdir():
            if not (tmp_path / path.name).exists():
                (tmp_path / path.name).symlink_to(path)
        base = json.loads((demo_model / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
        for name, content in ({"tokenizer_config.json": json.dumps(base | config)} | files).items():
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).write_text(content)
        return tmp_path

    return make


@pytest.fixture
def ours(tools):
    def render(path, *messages):
        done = subprocess.run([tools / "chat_tool", path], input="".join(json.dumps(m) + "\n" for m in messages), capture_output=True, text=True, check=True)
        return list(map(json.loads, done.stdout.splitlines()))

    return render


def theirs(path, message, **options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False, **options)


@pytest.mark.parametrize("template", [pytest.param(text, id=name) for name, text in (FAMILIES | ODD).items()])
def test_templates_are_rendered_as_transformers_does(template, folder, ours):
    path = folder({"chat_template": template})
    for message, made in zip(MESSAGES, ours(path, *MESSAGES), strict=True):
        assert made == theirs(path, message), message


@pytest.mark.parametrize("config, files", [
    ({"chat_template": "config"}, {"chat_template.jinja": "file"}),
    ({"chat_template": "config"}, {}),
    ({"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain {{ eos_token }}"}]}, {}),
    ({"chat_template": "{{ bos_token }} {{ eos_token }}", "bos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}}, {}),
    ({"chat_template": "{{ bos_token is defined }}", "bos_token": None}, {}),
])
def test_where_the_template_is(config, files, folder, ours):
    path = folder(config, **files)
    assert ours(path, "x") == [theirs(path, "x")]


def test_the_file_of_processors(folder, ours):
    assert ours(folder({}, **{"chat_template.json": json.dumps({"chat_template": "from the file {{ messages[0].content }}"})}), "x") == ["from the file x"]


@pytest.mark.parametrize("config, says", [
    ({}, ["the model has none", "chat_template in tokenizer_config.json", "chat_template.jinja"]),
    ({"chat_template": [{"name": "rag", "template": ""}, {"name": "tool_use", "template": ""}]}, ["a template named default", "rag, tool_use"]),
    ({"chat_template": 7}, ["tokenizer_config.json", "chat_template", "7"]),
    ({"chat_template": "{{ raise_exception('Only for the assistant') }}"}, ["tokenizer_config.json", "Only for the assistant"]),
    ({"chat_template": "{% for m in messages %}"}, ["tokenizer_config.json"]),
    ({"chat_template": "{{ messages | no_such_filter }}"}, ["tokenizer_config.json", "no_such_filter"]),
    # What llama.cpp's engine does not have is refused.
    ({"chat_template": "{{ 7 // 2 }}"}, ["tokenizer_config.json"]),
    ({"chat_template": "{% raw %}{{ x }}{% endraw %}"}, ["tokenizer_config.json", "raw"]),
])
def test_what_is_wrong_is_said(config, says, folder, run):
    done = run("generate", folder(config), "--chat", "--prompt", "x", "--max-tokens", 1)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    for text in ["[chat template]", *says]:
        assert text in done.stderr or text == "[chat template]" and "[json]" in done.stderr, done.stderr


# Templates that are so deep.
DEEP = {
    "parentheses": lambda n: "{{ " + "(" * n + "1" + ")" * n + " }}",
    "lists": lambda n: "{{ " + "[" * n + "1" + "]" * n + " | length }}",
    "objects": lambda n: "{{ " + "{'a': " * n + "1" + "}" * n + " | length }}",
    "sums in sums": lambda n: "{{ " + "(" * (n // 2) + "1" + " + 1)" * (n // 2) + " }}",
    "negations": lambda n: "{{ " + "not " * n + "true }}",
    "signs": lambda n: "{% set a = 1 %}{{ " + "- " * n + "a }}",
    "sums": lambda n: "{{ 1" + " + 1" * n + " }}",
    "products": lambda n: "{{ 1" + " * 1" * n + " }}",
    "comparisons": lambda n: "{{ 1 " + "in [1] or 1 " * (n // 3) + "}}",
    "filters": lambda n: "{{ 'a'" + " | trim" * n + " }}",
    "members": lambda n: "{% set a = namespace() %}{{ a" + ".b" * n + " is defined }}",
    "calls": lambda n: "{{ 'a'" + ".strip()" * (n // 2) + " }}",
    "tests": lambda n: "{{ 1" + " is defined and 1" * (n // 2) + " }}",
    "choices": lambda n: "{{ 1" + " if false else 1" * n + " }}",
    "if": lambda n: "{% if true %}" * n + "a" + "{% endif %}" * n,
    "elif": lambda n: "{% if false %}" + "{% elif false %}" * n + "{% else %}a{% endif %}",
    "for": lambda n: "{% for i in [1] %}" * n + "a" + "{% endfor %}" * n,
    "macros": lambda n: "{% macro a() %}" * n + "a" + "{% endmacro %}" * n,
    "filter blocks": lambda n: "{% filter trim %}" * n + "a" + "{% endfilter %}" * n,
    "call blocks": lambda n: "{% macro a() %}{{ caller() }}{% endmacro %}" + "{% call a() %}" * (n - 1) + "a" + "{% endcall %}" * (n - 1),
    "set blocks": lambda n: "{% set a %}" * n + "a" + "{% endset %}" * n,
}


@pytest.mark.parametrize("template", [pytest.param(of, id=name) for name, of in DEEP.items()])
def test_templates_are_no_deeper_than_the_stack(template, folder, ours):
    path = folder({"chat_template": template(18)})
    if template is not DEEP["members"]:  # jinja2 has no members of what is not there
        assert ours(path, "x") == [theirs(path, "x")]
    for deep in (300, 30_000):
        (made,) = ours(folder({"chat_template": template(deep)}), "x")
        assert "[chat template]" in made["error"] and "at most 250 deep" in made["error"], made


@pytest.mark.parametrize("piece", [
    "{% set f(a=1) %}",  # a block, in spite of its "="
    "{% if true %}{% endgeneration %}",
    "{% set {% if true %}",
])
def test_nesting_cannot_be_hidden(piece, folder, ours):
    (made,) = ours(folder({"chat_template": piece * 30_000}), "x")
    assert "at most 250 deep" in made["error"], made


def test_templates_may_be_long(folder, ours):
    """What stands one after another is not deep."""
    path = folder({"chat_template": "{% set a = 1 %}{% set b %}x{% endset %}{% if a + 1 > 1 %}{{ (a) }}{% elif (b) %}{% else %}{% endif %}{% for i in [1] %}{{ i }}{% endfor %}" * 1000
                   + "{% set names = {" + ", ".join(f"'a{i}': 'b'" for i in range(1000)) + "} %}{{ names | length }}"})
    assert ours(path, "x") == [theirs(path, "x")]


def test_special_tokens_are_tokens_and_the_begin_is_not_doubled(demo_model, folder, run, ours, tools):
    """Of a tokenizer that puts a begin of text before what it is given, with special tokens that the template writes."""
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text())
    begin = {"id": "<|endoftext|>", "type_id": 0}
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": begin}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"SpecialToken": begin}],
                                   "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
    turn = {"id": 8191, "content": next(token for token, i in tokenizer["model"]["vocab"].items() if i == 8191), "special": True,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"].append(turn)
    template = "{{ bos_token }}" + turn["content"] + "{{ messages[0].content }}" + turn["content"] + "\n"
    path = folder({"chat_template": template}, **{"tokenizer.json": json.dumps(tokenizer)})
    expected = transformers.AutoTokenizer.from_pretrained(path).apply_chat_template(
        [{"role": "user", "content": "It was a cold evening"}], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert expected.count(0) == 1 and expected.count(8191) == 2
    (text,) = ours(path, "It was a cold evening")
    line = subprocess.run([tools / "tokenize_tool", path], input=text.encode().hex() + "\n", capture_output=True, text=True, check=True).stdout
    assert list(map(int, line.split())) == expected
    made = json.loads(run("generate", path, "--chat", "--prompt", "It was a cold evening", "--max-tokens", 2, "--json").stdout)
    assert made["prompt_tokens"] == len(expected)
