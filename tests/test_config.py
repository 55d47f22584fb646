"""The configuration: TOML and command line in, TOML out, and what is refused on the way."""

import dataclasses
import math
import os
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrpo.config import (
    DEFAULT,
    Config,
    InputPath,
    RewardName,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    validate,
)
from jaxgrpo.config_file import load_config, parse_args, save_config


def write(folder: Path, text: str, name: str = "c.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def changed(config: Config, changes: dict) -> Config:
    """The same with `section.field` (or `rewards`) set to other values."""
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if key:
            value = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: value})
    return config


# Loading


def test_what_a_file_does_not_say_keeps_its_default(tmp_path):
    path = write(tmp_path, "")
    named = RunConfig(dir=f"runs/{path.stem}")  # runs of two files do not meet in one directory
    assert load_config(path) == Config(run=named)
    config = load_config(write(tmp_path, "[rollout]\ngroup = 4\n[run]\nfresh = true\n"))
    assert config == Config(
        rollout=RolloutConfig(group=4), run=dataclasses.replace(named, fresh=True)
    )


def test_values_arrive_as_the_fields_types(tmp_path):
    config = load_config(
        write(
            tmp_path,
            """
            update = {lr = 1, b1 = 0.5}
            sampling.top_k = 5
            [grpo]
            loss = "cispo"
            clip_high = inf
            [rewards]
            fields = 2
            "my.rewards:short" = -0.25
            """,
        )
    )
    assert (config.update.lr, config.update.b1) == (1.0, 0.5)
    assert type(config.update.lr) is float
    assert config.sampling == SamplingConfig(top_k=5)
    assert (config.grpo.loss, config.grpo.clip_high) == ("cispo", math.inf)
    assert config.rewards == {"fields": 2.0, "my.rewards:short": -0.25}  # not added to the default
    assert all(type(weight) is float for weight in config.rewards.values())


def test_input_paths_start_in_the_files_folder_and_the_run_where_the_command_is(tmp_path):
    (tmp_path / "configs").mkdir()
    text = """
        [run]
        dir = "runs/a"
        [model]
        path = "../qwen"
        [data]
        train = "/data/./train.jsonl"
        heldout = ["a.jsonl", "sub/b.jsonl"]
        [rewards]
        "mine.py:score" = 1
        "pkg.mod:score" = 1
        graded = 1
        """
    write(tmp_path / "configs", text)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "configs")
    root = str(tmp_path.resolve())
    for folder in ("configs", "elsewhere"):  # a linked folder is the folder it leads to
        config = load_config(tmp_path / folder / "c.toml")
        assert config.run.dir == "runs/a"
        assert config.model.path == f"{root}/qwen"
        assert config.data.train == "/data/train.jsonl"
        assert config.data.heldout == (f"{root}/configs/a.jsonl", f"{root}/configs/sub/b.jsonl")
        assert config.data.schema == ""
        assert set(config.rewards) == {f"{root}/configs/mine.py:score", "pkg.mod:score", "graded"}


def test_home_is_understood_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = load_config(write(tmp_path, '[model]\npath = "~/qwen"\n'))
    assert config.model.path == "/somewhere/qwen"


@pytest.mark.parametrize(
    ("text", "line", "name", "nearest"),
    [
        ("[runn]\nsteps = 3\n", 1, "runn", "run"),
        ("\n[run]\nstep = 3\n", 3, "run.step", "run.steps"),
        ("steps = 3\n", 1, "steps", "run.steps"),
        ("[run]\nlr = 3\n", 2, "run.lr", "update.lr"),  # another section's own, before any alike
        ("[runn]\n[run]\nseed = 1\n", 1, "runn", "run"),
        ("[grpo]\nkl = 'k1'\n# of a batch\ngroup = 8\n", 4, "grpo.group", "rollout.group"),
        ("run.seed = 1\nrun.stes = 2\n", 2, "run.stes", "run.steps"),
        ("run = {seed = 1, stps = 2}", 1, "run.stps", "run.steps"),
        ("[run]\n'ste\\ps' = 2\n", 2, "run.ste\\ps", "run.steps"),
        ("[run]\r\nseed = 1\r\nstps = 2\r\n", 3, "run.stps", "run.steps"),
        ("[run.sted]\nx = 1\n", 1, "run.sted", "seed"),
    ],
)
def test_an_unknown_name_is_told_its_line_and_the_nearest(tmp_path, text, line, name, nearest):
    path = write(tmp_path, text)
    error = f"{path}:{line}: {name} is unknown; the nearest known one is {nearest}"
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[run]\nsteps = 'many'\n", "2: run.steps is 'many'; it must be an int"),
        ("[run]\nsteps = 10.0\n", "2: run.steps is 10.0; it must be an int"),
        ("[run]\nsteps = true\n", "2: run.steps is True; it must be an int"),
        ("[run]\nfresh = 1\n", "2: run.fresh is 1; it must be true or false"),
        ("[run]\ndir = 3\n", "2: run.dir is 3; it must be a string"),
        ("[update]\nlr = '1e-6'\n", "2: update.lr is '1e-6'; it must be a number"),
        ("[update]\nlr = false\n", "2: update.lr is False; it must be a number"),
        ("[grpo]\nkl = 'k4'\n", "2: grpo.kl is 'k4'; it must be one of 'k1', 'k2', 'k3'"),
        ("[grpo]\nkl = ['k1']\n", "2: grpo.kl is ['k1']; it must be one of 'k1', 'k2', 'k3'"),
        ("[data]\nheldout = 'a'\n", "2: data.heldout is 'a'; it must be a list of strings"),
        ("[rewards]\ngraded = 'x'\n", "2: rewards.graded is 'x'; it must be a number"),
        (
            "[lora]\nrank = 4\ntargets = ['q', 'w']\n",
            "3: lora.targets is 'w'; it must be one of 'q', 'k', 'v', 'o', 'gate', 'up', 'down'",
        ),
        ("rewards = ['graded']\n", "1: rewards is ['graded']; it must be a table"),
        ("[[run]]\nsteps = 1\n", "1: run is [{'steps': 1}]; it must be a table"),
        ("\nrun = 3\n", "2: run is 3; it must be a table"),
        # The line is where the statement begins, past values that look like others.
        (
            '[run]\ndir = """\nsteps = 1\n"""\nsteps = "x"\n',
            "5: run.steps is 'x'; it must be an int",
        ),
        (
            "[eval]\nevery = 1\n[data]\nmax_prompt_tokens = 9\nheldout = [\n  'a', # b\n  2,\n]\n",
            "5: data.heldout is 2; it must be a string",
        ),
        (
            "[checkpoint]\nevery = 5\n[eval]\n# every = 1\nevery = 'x'\n",
            "5: eval.every is 'x'; it must be an int",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path, text, error):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:{error}')}$"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[run]\nsteps 3\n", 2),
        ("[run]\nsteps = many\n", 2),
        ("[run]\nseed = 1\nseed = 2\n", 3),
        ("[run]\nseed = 1\n[model]\n[run]\n", 4),
        ("[rewards]\ngraded = 1\nmine.py:score = 1\n", 3),
        ('[data]\nheldout = ["a",\n"b"\n\n', 3),  # never closed: the last line that says something
    ],
)
def test_broken_toml_is_named_with_its_line(tmp_path, text, line):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:{line}: [^\n]*double quotes$"):
        load_config(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.toml: No such file or directory; name a TOML"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="Is a directory; name a TOML"):
        load_config(tmp_path)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"[run]\nseed = 1\ndir = 'caf\xe9'\n")
    with pytest.raises(ValueError, match=r"latin\.toml:3: no UTF-8 text"):
        load_config(latin)


# Saving

PATHS = st.text().map(lambda text: os.path.normpath("/" + text))
STRATEGIES = {
    bool: st.booleans(),
    int: st.integers(),
    float: st.floats(allow_nan=False),
    str: st.text(),
    InputPath: st.just("") | PATHS,
    RewardName: st.text().filter(lambda name: ".py:" not in name)
    | PATHS.map(lambda path: f"{path}.py:score"),
}


def anything_of(hint) -> st.SearchStrategy:
    """Any value that a field of this type can hold once it has been read."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{name: anything_of(hints[name]) for name in hints})
    if kind is typing.Literal:
        return st.sampled_from(args)
    if kind is tuple:
        return st.lists(anything_of(args[0]), max_size=3).map(tuple)
    if kind is dict:
        return st.dictionaries(anything_of(args[0]), anything_of(args[1]), max_size=3)
    return STRATEGIES[hint]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(config=anything_of(Config))
def test_saved_and_loaded_is_the_same(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "saved.toml"
    save_config(config, path)
    assert load_config(path) == config


def test_a_saved_file_is_one_to_read(tmp_path):
    config = changed(
        Config(),
        {
            "data.heldout": ("/a.jsonl", '/"\x7f\n.jsonl'),
            "update.lr": 3e-4,
            "rewards": {"graded": 1.0, "os.path:join": 0.5},
        },
    )
    save_config(config, tmp_path / "c.toml")
    text = (tmp_path / "c.toml").read_text(encoding="utf-8")
    assert text.startswith('[run]\ndir = "runs/default"\nseed = 0\nsteps = 50\nfresh = false\n')
    assert 'heldout = ["/a.jsonl", "/\\"\\u007f\\n.jsonl"]\n' in text
    assert "\nlr = 0.0003\n" in text
    assert '\n[rewards]\ngraded = 1.0\n"os.path:join" = 0.5\n' in text


def test_a_name_that_is_no_unicode_cannot_be_saved(tmp_path):
    config = changed(Config(), {"data.train": os.fsdecode(b"/caf\xe9.jsonl")})
    with pytest.raises(ValueError, match=r"cannot hold 'train = \"/caf\\udce9\.jsonl\"'"):
        save_config(config, tmp_path / "c.toml")
    assert not (tmp_path / "c.toml").exists()


# The command line


@pytest.fixture
def default(tmp_path, monkeypatch) -> Path:
    """Stands in for the embedded default."""
    path = write(tmp_path, "[run]\nsteps = 7\n[rewards]\nfields = 1\n", "default.toml")
    monkeypatch.setattr("jaxgrpo.config_file.DEFAULT", path)
    return path


def test_options_override_the_file_and_the_file_the_defaults(tmp_path, default):
    assert parse_args([]) == load_config(default)
    assert parse_args([]).run.steps == 7
    path = write(tmp_path, "[run]\nsteps = 3\nseed = 5\nfresh = true\n[model]\nremat = 'full'\n")
    assert parse_args([str(path)]) == load_config(path)

    words = "--run.steps 10 --mesh.fsdp -1 --update.lr=1e-3 --grpo.loss gspo --run.no-fresh"
    assert parse_args([str(path), *words.split()]) == changed(
        load_config(path),
        {
            "run.steps": 10,
            "mesh.fsdp": -1,
            "update.lr": 1e-3,
            "grpo.loss": "gspo",
            "run.fresh": False,
        },
    )
    assert parse_args(["--run.fresh"]).run == dataclasses.replace(
        load_config(default).run, fresh=True
    )


def test_hyphens_and_underscores_are_the_same(default):
    for option in ("--sampling.max-tokens", "--sampling.max_tokens"):
        assert parse_args([option, "12"]).sampling.max_tokens == 12


def test_rewards_on_the_command_line_are_a_new_table(default):
    words = "--rewards graded 2 pkg.mod:score -0.5 --run.seed 1"
    config = parse_args(words.split())
    assert config.rewards == {"graded": 2.0, "pkg.mod:score": -0.5}
    assert config.run.seed == 1
    assert parse_args(["--run.seed", "1"]).rewards == {"fields": 1.0}


def test_paths_of_the_command_line_start_where_it_is_run(tmp_path, default, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    path = write(tmp_path, '[model]\npath = "qwen"\n[data]\nschema = "schema.json"\n')
    monkeypatch.chdir(here)
    config = parse_args(
        [
            "../c.toml",
            *("--data.train", "a.jsonl", "--data.heldout", "../b.jsonl", "c.jsonl"),
            *("--rewards", "mine.py:score", "1", "--run.dir", "runs/x"),
        ]
    )
    assert config.model.path == str(path.parent.resolve() / "qwen")
    assert config.data.schema == str(path.parent.resolve() / "schema.json")
    assert config.data.train == str(here / "a.jsonl")
    assert config.data.heldout == (str(tmp_path / "b.jsonl"), str(here / "c.jsonl"))
    assert config.rewards == {f"{here}/mine.py:score": 1.0}
    assert config.run.dir == "runs/x"


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("--run.step 10", "run.steps"),
        ("--run.step=10", "run.steps"),
        ("--fresh", "run.fresh"),
        ("--max-tokens 9", "sampling.max_tokens"),
        ("--rollout.top-k 9", "sampling.top_k"),
        ("--rewards.graded 1", "rewards"),
    ],
)
def test_an_unknown_option_is_told_the_nearest(default, words, nearest):
    option = re.match(r"[^ =]+", words)[0]
    error = f"unknown option {option}; the nearest known one is --{nearest}"
    with pytest.raises(ValueError, match=f"^{re.escape(error)}$"):
        parse_args(words.split())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--run.steps 3 my.toml", "unexpected argument 'my.toml'; CONFIG.toml comes first"),
        ("--run.fresh True", "unexpected argument 'True'; .* a flag takes no value$"),
        ("none.toml", "none.toml: No such file or directory; name a TOML file$"),
    ],
)
def test_an_argument_out_of_place_is_one_line(default, words, error):
    with pytest.raises(ValueError, match=f"^{error}"):
        parse_args(words.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--run.steps many", "--run.steps"),
        ("--grpo.kl k4", "--grpo.kl"),
        ("--run.dir", "--run.dir"),
        ("--rewards graded 1 fields", "'fields' has no weight"),
        ("--rewards graded high", "--rewards"),
    ],
)
def test_a_wrong_value_on_the_command_line_is_one_line(default, words, says):
    with pytest.raises(ValueError, match=says) as caught:
        parse_args(words.split())
    assert not set("\n│─") & set(str(caught.value))


def test_help_shows_every_field_its_meaning_and_the_files_value(tmp_path, default, capsys):
    path = write(tmp_path, "[update]\nlr = 0.125\n")
    with pytest.raises(SystemExit) as caught:
        parse_args([str(path), "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "usage: python -m jaxgrpo.train [CONFIG.toml]" in shown
    for section, table in dataclasses.asdict(Config()).items():
        for key in table:
            option = f"--{section}.{key}".replace("_", "-")
            assert (option if section != "rewards" else "--rewards NAME WEIGHT") in shown
    assert "--update.lr FLOAT Peak learning rate of AdamW. (default: 0.125)" in shown
    assert "(default: graded 1.0)" in shown


# What must hold


@pytest.fixture
def valid(tmp_path) -> Config:
    for name in ("train.jsonl", "heldout.jsonl", "schema.json"):
        (tmp_path / name).touch()
    return changed(
        Config(),
        {
            "model.path": str(tmp_path),
            "data.train": str(tmp_path / "train.jsonl"),
            "data.heldout": (str(tmp_path / "heldout.jsonl"),),
        },
    )


def test_the_defaults_hold_once_the_files_are_there(valid):
    validate(valid)
    with pytest.raises(ValueError, match=r"^model\.path is ''"):
        validate(Config())


@pytest.mark.parametrize("path", sorted(DEFAULT.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_hold_for_any_model(tmp_path, path):
    validate(changed(load_config(path), {"model.path": str(tmp_path)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"run.seed": 2**32 - 1, "run.steps": 0, "eval.every": 0, "eval.samples": 0},
        {"rollout.group": 2, "rollout.max_refills": 0, "signal.preflight_groups": 0},
        {"update.b1": 0.0, "update.clip_norm": 0.0, "signal.min_share": 1.0},
        {"rollout.problems": 12, "update.minibatches": 2, "update.microbatches": 3},
        {"sampling.top_k": 5, "sampling.accept_mismatch": True},
        {"grpo.overlong": "soft", "grpo.overlong_buffer": 256},
        {"grpo.overlong_buffer": 0},  # unused unless soft
        {"grpo.entropy_bonus": -0.1, "grpo.clip_low": 1.0},
        {"rewards": {"graded": 0.0, "fields": -1.0}},
    ],
)
def test_the_ends_of_the_ranges_hold(valid, changes):
    validate(changed(valid, changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"run.seed": -1}, r"run.seed is -1; it must be from 0 to 2\*\*32 - 1"),
        ({"run.seed": 2**32}, "run.seed is 4294967296; it must be from 0"),
        ({"run.steps": -1}, "run.steps is -1; it must be at least 0"),
        ({"lora.rank": -1}, "lora.rank is -1; it must be at least 0"),
        ({"lora.alpha": 0.0}, "lora.alpha is 0.0; it must be above 0"),
        ({"lora.rank": 4, "lora.targets": ()}, "lora.targets is empty; name at least one weight"),
        ({"grpo.kl_beta": math.nan}, "grpo.kl_beta is nan; it must be at least 0"),
        ({"grpo.clip_high": math.inf}, "grpo.clip_high is inf; it must be at least 0 and finite"),
        ({"grpo.entropy_bonus": math.inf}, "grpo.entropy_bonus is inf; it must be finite"),
        ({"sampling.max_tokens": 0}, "sampling.max_tokens is 0; it must be at least 1"),
        ({"checkpoint.keep": 0}, "checkpoint.keep is 0; it must be at least 1"),
        ({"update.minibatches": 0}, "update.minibatches is 0; it must be at least 1"),
        ({"rollout.group": 1}, "rollout.group is 1; it must be at least 2"),
        (
            {"sampling.temperature": 0.0},
            "sampling.temperature is 0; training needs samples that differ",
        ),
        ({"update.lr": -1e-6}, "update.lr is -1e-06; it must be above 0"),
        ({"signal.min_share": 10.0}, "signal.min_share is 10.0; it must be from 0 to 1"),
        ({"sampling.top_p": 0.0}, "sampling.top_p is 0.0; it must be above 0 and at most 1"),
        ({"update.b2": 1.0}, "update.b2 is 1.0; it must be at least 0 and below 1"),
        ({"run.dir": ""}, "run.dir is ''; it must name a directory"),
        ({"run.dir": __file__}, "run.dir is .*; it must name a directory"),
        ({"model.path": "/no/qwen"}, "model.path is '/no/qwen', which is no directory"),
        ({"model.path": __file__}, "model.path is .*, which is no directory"),
        ({"data.train": ""}, "data.train is '', which is no file"),
        ({"data.train": "/no/a.jsonl"}, "data.train is '/no/a.jsonl', which is no file"),
        ({"data.heldout": ()}, "data.heldout is empty"),
        ({"data.heldout": (__file__, "/no/b")}, "data.heldout is '/no/b', which is no file"),
        ({"data.schema": "/no/s.json"}, "data.schema is '/no/s.json', which is no file"),
        ({"data.system": "/no/s.txt"}, "data.system is '/no/s.txt', which is no file"),
        ({"data.examples": "/no/e"}, "data.examples is '/no/e', which is no file"),
        ({"rewards": {}}, "rewards has no weight other than 0"),
        ({"rewards": {"graded": 0.0}}, "rewards has no weight other than 0"),
        ({"rewards": {"graded": math.nan}}, "rewards: the weight of 'graded' is nan"),
        ({"sampling.top_k": 5}, "sampling.top_k, top_p and min_p .* of the whole"),
        ({"sampling.top_p": 0.9}, "sampling.top_k, top_p and min_p .* of the whole"),
        ({"sampling.min_p": 0.1}, "sampling.top_k, top_p and min_p .* of the whole"),
        (
            {"grpo.overlong": "soft", "grpo.overlong_buffer": 257},
            r"grpo.overlong_buffer is 257; .* from 1 to sampling.max_tokens \(256\)",
        ),
        ({"grpo.overlong": "soft", "grpo.overlong_buffer": 0}, "grpo.overlong_buffer is 0"),
        ({"sampling.draft": -1}, "sampling.draft is -1; it must be at least 0"),
        ({"model.attention": "cudnn"}, "model.attention = 'cudnn' computes in bfloat16"),
    ],
)
def test_what_would_fail_late_is_refused(valid, changes, error):
    with pytest.raises(ValueError, match=f"^{error}") as caught:
        validate(changed(valid, changes))
    assert "\n" not in str(caught.value)
