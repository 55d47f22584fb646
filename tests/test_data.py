"""Data files are read strictly, drawn without state and packed without loss."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxgrpo.data import (
    bucket_for,
    draw,
    load_problems,
    pack_prompts,
    problem_order,
    read_frame,
)
from jaxgrpo.tokenizer import load_tokenizer
from jaxgrpo.types import Problem

TEMPLATE = """\
{%- for m in messages %}
    {%- if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}
    {%- endif %}
    {{- m.content + '|' }}
{%- endfor %}"""
ROW = {"messages": [{"role": "user", "content": "hello"}]}
LINE = json.dumps(ROW)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A token is a byte, and a prompt is the contents with a bar after each."""
    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("bytes")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", chat_template=TEMPLATE
    ).save_pretrained(path)
    return load_tokenizer(path)


@pytest.fixture
def load(tmp_path, tokenizer):
    """Writes lines (or bytes) to a file and loads it."""

    def load(*lines, max_prompt_tokens=100, **kwargs):
        file = tmp_path / "data.jsonl"
        data = (line if isinstance(line, bytes) else line.encode() for line in lines)
        file.write_bytes(b"\n".join(data))
        return load_problems(file, tokenizer, max_prompt_tokens, **kwargs)

    return load


def user(content, **more):
    return json.dumps({"messages": [{"role": "user", "content": content}], **more})


def roles(*names):
    return json.dumps({"messages": [{"role": name, "content": "x"} for name in names]})


def problems_of(lengths):
    """Problems whose prompt of length n is 1, 2, ..., n."""
    return [Problem(i, str(i), tuple(range(1, n + 1)), row={}) for i, n in enumerate(lengths)]


def test_a_line_becomes_a_problem(load, tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Grüße"}]
    row = {
        "messages": messages,
        "ground_truth": {"amount": 19.99, "n": 3, "currency": None},
        "schema": {"type": "object"},
        "id": "a",
        "source": [1, {"page": 2}],
    }
    first, second, third = load(json.dumps(row), user("x", id=7), LINE)
    assert (first.number, first.id, first.row) == (0, "a", row)
    assert tokenizer.hf.decode(first.prompt) == "be brief|Grüße|"
    assert len(first.prompt) == 9 + 8
    assert first.row == row
    assert type(first.row["ground_truth"]["amount"]) is float
    assert first.ground_truth == row["ground_truth"]
    assert (second.number, second.id) == (1, "7")
    assert (third.number, third.id, third.ground_truth) == (2, "2", None)


def test_a_system_message_and_examples_stand_around_the_rows_own(load, tokenizer, tmp_path):
    system, examples = tmp_path / "system.txt", tmp_path / "examples.jsonl"
    system.write_bytes(b"\xef\xbb\xbf Gr\xc3\xbc\xc3\x9fe\n{}\n\n")
    row = {"messages": [{"role": "system", "content": "not shown"}, *ROW["messages"]]}
    first = json.dumps(row | {"ground_truth": {"a": 1250.40, "b": None}})
    second = user("Grüße", ground_truth={"c": "ä"}, id=7)
    examples.write_text(f"{first}\n\n{second}\n", "utf-8")
    lines = (roles("system", "user", "user"), LINE)

    def prompts(system, examples):
        return [
            "".join(f"{m['role'][0]}:{m['content']}|" for m in problem.row["messages"])
            for problem in load(*lines, frame=read_frame(str(system), str(examples)))
        ]

    turns = 'u:hello|a:{"a": 1250.4, "b": null}|u:Grüße|a:{"c": "ä"}|'
    assert prompts("", "") == ["s:x|u:x|u:x|", "u:hello|"]
    assert prompts("", examples) == [f"s:x|{turns}u:x|u:x|", f"{turns}u:hello|"]
    assert prompts(system, "") == ["s: Grüße\n{}\n|u:x|u:x|", "s: Grüße\n{}\n|u:hello|"]
    assert prompts(system, examples)[1] == f"s: Grüße\n{{}}\n|{turns}u:hello|"
    [_, problem] = load(*lines, frame=read_frame(str(system), str(examples)))
    assert tokenizer.hf.decode(problem.prompt) == "".join(
        f"{message['content']}|" for message in problem.row["messages"]
    )


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("system", None, "cannot read system message .*: No such file"),
        ("system", b"\xff", "not UTF-8: invalid start byte at byte 1"),
        ("system", b" \n\n", "no system message in it"),
        ("examples", None, "cannot read data file .*: No such file"),
        ("examples", b"\n", "no examples in it"),
        ("examples", LINE.encode(), ":1: no ground_truth, which is the answer"),
        ("examples", b"\n{", ":2: not JSON"),
        ("examples", roles("user", "assistant").encode(), ":1: message 2 has role 'assistant'"),
        ("examples", user("x", ground_truth=[1]).encode(), ":1: ground_truth is not an object"),
    ],
)
def test_a_bad_system_message_or_example_is_named_in_one_line(tmp_path, name, data, says):
    file = tmp_path / "file"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ValueError, match=says) as error:
        read_frame(**{"system": "", "examples": "", name: str(file)})
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_blank_lines_bom_and_crlf_do_not_count(load):
    problems = load(b"\xef\xbb\xbf" + LINE.encode(), "", "  \t", LINE + "\r", "\r", LINE, "")
    assert [problem.number for problem in problems] == [0, 1, 2]


def test_only_a_newline_ends_a_line(load):
    content = "a\u2028b\u0085c\x0cd"
    line = json.dumps(
        {"messages": [{"role": "user", "content": content}]}, ensure_ascii=False
    ).replace("\\f", "\\u000c")
    assert load(line, LINE)[0].row["messages"][0]["content"] == content


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON: Expecting property name"),
        (LINE + LINE, "not JSON: Extra data at column"),
        ("\ufeff" + LINE, "not JSON"),
        (LINE.encode("utf-16"), "not UTF-8"),
        (b'{"x": "\xff"}', "not UTF-8: invalid start byte at byte 8"),
        ("[" * 100_000, "nested too deeply"),
        (user("x", a=float("nan")), "NaN is not a number"),
        (user("x", a=float("-inf")), "-Infinity is not a number"),
        (LINE[:-1] + ', "a": 1e400}', "1e400 is not a number"),
        (LINE[:-1] + f', "a": {"9" * 5000}}}', "Exceeds the limit"),
        (LINE[:-1] + ', "a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' occurs twice"),
        (user("\ud800"), "half a surrogate pair"),
        (user("x", **{"\udfff": 1}), "half a surrogate pair"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("{}", "no messages"),
        ('{"messages": []}', "no messages"),
        ('{"messages": {"role": "user", "content": "x"}}', "no messages"),
        ('{"messages": ["x"]}', "message 1 is not an object of role and content"),
        ('{"messages": [{"role": "user"}]}', "message 1 is not"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1 is not"),
        ('{"messages": [{"role": "user", "content": [{"text": "x"}]}]}', "message 1 is not"),
        ('{"messages": [{"role": "user", "content": "x", "name": "y"}]}', "message 1 is not"),
        (roles("user", "assistant"), "message 2 has role 'assistant', not system or user"),
        (roles("user", "system"), "the last message is not a user's"),
        (roles("user", "system", "user"), "the chat template refuses the messages: system comes f"),
        (user("x", ground_truth=[1]), "ground_truth is not an object"),
        (user("x", ground_truth=None), "ground_truth is not an object"),
        (user("x", schema=True), "schema is not an object"),
        (user("x", id=1.5), "id is neither a string nor an integer"),
        (user("x", id=True), "id is neither"),
        (user("x", id=None), "id is neither"),
    ],
)
def test_a_bad_line_is_named_in_one_line(load, tmp_path, line, says):
    with pytest.raises(ValueError, match=says) as error:
        load(LINE, "", line, LINE)
    assert str(error.value).startswith(f"{tmp_path / 'data.jsonl'}:3: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((user("x", id="a"), "", LINE, user("y", id="a")), "jsonl:4: id 'a' is that of line 1"),
        ((user("x", id=1), LINE), "jsonl:2: id '1' is that of line 1"),
    ],
)
def test_ids_are_unique(load, lines, says):
    with pytest.raises(ValueError, match=says):
        load(*lines)


def test_no_file_and_no_problems(load, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"cannot read data file .*none.jsonl: No such file"):
        load_problems(tmp_path / "none.jsonl", tokenizer, 100)
    with pytest.raises(ValueError, match=r"cannot read data file .*: Is a directory"):
        load_problems(tmp_path, tokenizer, 100)
    for lines in ((), ("", " \n")):
        with pytest.raises(ValueError, match="no problems in it"):
            load(*lines)


def test_long_prompts_are_counted_not_cut(load):
    lines = [user("x" * n) for n in (9, 10, 5, 19, 11, 10, 10, 12, 9, 10)]  # a bar follows each
    assert len(load(*lines, max_prompt_tokens=20)) == 10
    with pytest.raises(ValueError, match=r"long") as error:
        load(*lines, max_prompt_tokens=10)
    said = ":2: the prompt has 11 tokens; in all 7 of 10 prompts are longer than 10, the longest 20"
    assert said in str(error.value)
    assert "(lines 2, 4, 5, 6, 7, ...)" in str(error.value)
    assert "raise max_prompt_tokens" in str(error.value)
    with pytest.raises(ValueError, match=r"1 of 10 .* \(lines 4\)"):
        load(*lines, max_prompt_tokens=19)


def test_a_rows_schema_is_checked_where_it_stands(load, tmp_path):
    seen = []
    load(
        LINE,
        user("x", schema={"type": "string"}),
        check_schema=lambda schema, where: seen.append((schema, where)),
    )
    assert seen == [({"type": "string"}, f"{tmp_path / 'data.jsonl'}:2")]

    def refuse(schema, where):
        raise ValueError(f"{where}: no schema")

    with pytest.raises(ValueError, match=r"^[^:]*data.jsonl:1: no schema$"):
        load(user("x", schema={"type": 3}), check_schema=refuse)


def test_the_order_is_a_function_of_seed_and_epoch():
    # Written down: the same on every machine and with every version of NumPy.
    assert problem_order(8, seed=0, epoch=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert problem_order(8, seed=3, epoch=1).tolist() == [5, 6, 3, 7, 0, 1, 2, 4]
    orders = {tuple(problem_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert np.array_equal(problem_order(50, 7, 2), problem_order(50, 7, 2))


def test_every_place_is_equally_likely():
    first = np.bincount([problem_order(5, seed, 3)[0] for seed in range(2000)], minlength=5)
    assert first.sum() == 2000
    assert np.abs(first - 400).max() < 90  # five standard deviations of 17.9


@pytest.mark.parametrize("n", [1, 3, 7, 20])
def test_draws_join_into_one_series_over_epochs(n):
    problems = problems_of([3] * n)
    series = draw(problems, 0, 45, seed=5)
    keys = [key for key, _ in series]
    assert len(set(keys)) == 45
    for position, (key, problem) in enumerate(series):
        epoch = position // n
        assert key == epoch * n + problem.number
        assert problem is problems[problem_order(n, 5, epoch)[position % n]]
    for position, count in [(0, 1), (1, 7), (6, 1), (13, 20), (44, 1)]:
        assert draw(problems, position, count, seed=5) == series[position : position + count]
    for start in range(0, 45 - n, n):
        epoch = [problem.number for _, problem in series[start : start + n]]
        assert sorted(epoch) == list(range(n))


def test_prompts_are_packed():
    prompts = pack_prompts(problems_of([4, 1, 3]), 5)
    assert prompts.prefix_PL.tolist() == [[1, 2, 3, 0, 0], [0] * 5, [1, 2, 0, 0, 0]]
    assert prompts.prefix_len_P.tolist() == [3, 0, 2]
    assert prompts.last_P.tolist() == [4, 1, 3]
    assert {array.dtype for array in prompts} == {np.dtype(np.int32)}
    assert pack_prompts(problems_of([6]), 5).prefix_PL.tolist() == [[1, 2, 3, 4, 5]]


def test_a_prompt_that_does_not_fit_is_not_cut():
    with pytest.raises(ValueError, match="broadcast"):
        pack_prompts(problems_of([7]), 5)


def test_buckets_by_hand():
    assert [bucket_for(n, 512) for n in (0, 1, 32, 33, 48, 49, 65, 97, 129, 193, 257, 385)] == [
        32, 32, 32, 48, 48, 64, 96, 128, 192, 256, 384, 512,
    ]  # fmt: skip
    assert bucket_for(385, 400) == 416  # the limit in 32s, not 512
    assert bucket_for(5, 5) == 32
    assert bucket_for(1, 32_768) == 1024
    assert bucket_for(20_000, 32_768) == 24_576


@pytest.mark.parametrize("longest", [1, 31, 32, 33, 100, 512, 520, 1000, 4096, 5000, 40_960])
def test_buckets_are_few_and_not_much_too_large(longest):
    buckets = [bucket_for(length, longest) for length in range(longest + 1)]
    assert buckets == sorted(buckets)
    assert len(set(buckets)) <= 11
    assert max(buckets) < longest + 32
    assert all(bucket % 16 == 0 for bucket in buckets)
    for length, bucket in enumerate(buckets):
        assert bucket >= length
        if bucket > buckets[0]:
            assert (bucket - length) * 3 < bucket
