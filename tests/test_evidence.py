"""The comparison's statistics by hand, its measures on answers by hand, and SFT the plain way."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrpo.config_file import parse_args
from jaxgrpo.data import load_problems
from jaxgrpo.models.hf import load_hf
from jaxgrpo.rewards.pool import Compared
from jaxgrpo.rollout import Answers
from jaxgrpo.tokenizer import load_tokenizer
from jaxgrpo.types import Problem
from scripts import compare
from scripts.evidence.arms import ARMS
from scripts.evidence.grounding import is_grounded
from scripts.evidence.measure import _values, over_seeds
from scripts.evidence.report import conclusions, write_report
from scripts.evidence.sft import fine_tune, in_epochs
from scripts.evidence.statistics import mcnemar, pass_at_k
from scripts.evidence.tasks import TASKS


@pytest.mark.parametrize(
    ("only_one", "only_other", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (1, 5, 2 * 7 / 64), (3, 3, 1.0), (0, 10, 2 / 1024)],
)
def test_mcnemar_by_hand(only_one, only_other, p):
    one = [True] * only_one + [False] * only_other + [True, False] * 3
    other = [False] * only_one + [True] * only_other + [True, False] * 3
    assert mcnemar(one, other) == pytest.approx(p)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_mean_over_all_choices(k):
    rng = np.random.default_rng()
    right = (rng.random((6, 4)) < 0.4).tolist()
    plain = np.mean([np.mean([any(c) for c in itertools.combinations(r, k)]) for r in right])
    assert pass_at_k(right, k) == pytest.approx(plain)


@pytest.mark.parametrize(
    ("field", "value", "grounded"),
    [
        ("vendor", "O'Brien  TEXTILES", True),
        ("vendor", "Obrien Textiles", False),
        ("amount", 1043.75, True),
        ("amount", 104375.0, False),
        ("amount", 7.0, True),
        ("amount", True, False),
        ("date", "2024-03-05", True),
        ("date", "March 5, 2024", True),
        ("date", "2024-04-05", False),
        ("date", "soon", False),
        ("currency", "USD", True),
        ("currency", "EUR", False),
    ],
)
def test_what_stands_in_the_text(field, value, grounded):
    text = "On March 5, 2024 O'Brien Textiles charged $1,043.75 for 7 lamps."
    assert is_grounded(field, value, text) is grounded


def test_numbers_and_months_of_other_languages():
    text = "Ausgestellt am 5. März 2023, zu zahlen 1.234,50 €; payé le 12 juillet"
    assert is_grounded("amount", 1234.5, text)
    assert is_grounded("date", "2023-03-05", text)
    assert is_grounded("date", "2023-07-12", text)
    assert is_grounded("currency", "EUR", text)
    assert not is_grounded("date", "2023-08-12", text)


@pytest.mark.parametrize("name", TASKS)
def test_the_right_values_of_a_task_stand_in_its_texts(name):
    task = TASKS[name]
    lines = task.problem_lines(200).splitlines()
    assert len(lines) == 200
    for row in map(json.loads, lines):
        text = row["messages"][-1]["content"]
        for field, value in row["ground_truth"].items():
            assert value is None or task.is_grounded(field, value, text)


def test_invented_values_and_abstention_by_hand():
    row = {"messages": [{"role": "user", "content": "Moss & Fern, 12.50, no currency"}]}
    row["ground_truth"] = {"vendor": "Moss & Fern", "amount": 12.5, "currency": None}
    texts = {
        '{"vendor": "Moss & Fern", "amount": 12.5, "currency": null}': (True, True, True),
        '{"vendor": "Moss & Fern", "amount": 12.5, "currency": "EUR"}': (True, True, False),
        '{"vendor": "Fern", "amount": 12.5, "currency": null}': (False, True, True),
        "no JSON": (False, False, False),
    }
    compared = [
        Compared(1.0, "valid", "", dict(zip(row["ground_truth"], right, strict=True)), all(right))
        for right in texts.values()
    ]
    nothing = np.zeros(4)
    answers = Answers(Problem(0, "0", (1,), row), *[nothing] * 5, [*texts])
    values = _values([(answers, compared)], is_grounded)
    assert (values["invented"]["count"], values["invented"]["rate"]) == (1, 1 / 3)
    assert (values["abstained"]["count"], values["abstained"]["rate"]) == (2, 2 / 4)


def test_over_seeds_is_the_mean_within_the_widest_interval():
    shares = [{"rate": 0.5, "low": 0.4, "high": 0.6}, {"rate": 0.7, "low": 0.55, "high": 0.9}]
    runs = [{"free": {"x": share}} for share in shares]
    assert over_seeds(runs, "free", "x") == {"rate": 0.6, "low": 0.4, "high": 0.9}
    assert over_seeds([{"free": {}}], "free", "x") is None


def test_sft_is_the_gradient_of_the_answers_mean_cross_entropy(capsys):
    config = parse_args(["--update.lr", "1e-3", "--update.clip-norm", "0", "--update.b1", "0"])
    config = replace(config, mesh=replace(config.mesh, fsdp=8))
    tokenizer = load_tokenizer(config.model.path)
    problems = load_problems(config.data.train, tokenizer, 128)[:32]
    shown = [(problem, json.dumps(problem.ground_truth)) for problem in problems]
    tuned = fine_tune(config, tokenizer, shown, steps=2, batch=16, microbatches=2)
    assert capsys.readouterr().out.splitlines()[-1] == "  step 2 of 2"

    model = load_hf(config.model.path)
    # Adam without its memory, written out; the warm-up of two steps begins at half.
    second = jax.tree.map(jnp.zeros_like, model)
    for step, lr in ((1, 0.5e-3), (2, 1e-3)):
        grads = jax.jit(jax.grad(_cross_entropy))(
            model, *_sequences(tokenizer, shown[16 * step - 16 : 16 * step])
        )
        b2 = config.update.b2
        second = jax.tree.map(lambda v, g, b2=b2: b2 * v + (1 - b2) * g * g, second, grads)
        model = jax.tree.map(
            lambda w, g, v, lr=lr, scale=1 - b2**step: (
                w - lr * g / (jnp.sqrt(v / scale) + config.update.eps)
            ),
            model,
            grads,
            second,
        )
    start = load_hf(config.model.path)
    leaves = [jax.tree.leaves(jax.device_get(each)) for each in (tuned, model, start)]
    for ours, plain, before in zip(*leaves, strict=True):
        assert np.abs(ours - plain).max() < 0.02 * np.abs(plain - before).max()


def _sequences(tokenizer, shown):
    ids = np.zeros((len(shown), 256), np.int32)
    answer = np.zeros(ids.shape, bool)
    for row, mask, (problem, text) in zip(ids, answer, shown, strict=True):
        tokens = [*tokenizer.hf.encode(text, add_special_tokens=False), tokenizer.stop_ids[0]][:64]
        row[: len(problem.prompt) + len(tokens)] = [*problem.prompt, *tokens]
        mask[len(problem.prompt) :][: len(tokens)] = True
    return ids, answer


def _cross_entropy(model, ids, answer):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        model.logits(ids)[:, :-1], ids[:, 1:]
    )
    return jnp.mean(losses, where=answer[:, 1:])


def test_epochs_have_every_demonstration_once():
    shown = [(number, "") for number in range(5)]
    stream = [number for number, _ in itertools.islice(in_epochs(shown, 0), 15)]
    epochs = [stream[:5], stream[5:10], stream[10:]]
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 3
    assert len(set(map(tuple, epochs))) > 1


def test_the_report_says_what_is_significant_and_what_is_not(tmp_path):
    def share(count, n=40):
        return {"count": count, "rate": count / n, "low": count / n - 0.1, "high": count / n + 0.1}

    def run(free, constrained):
        def decoding(count):
            record = {"schema_valid": share(40), "exact": share(count), "fields": {"x": count / 40}}
            record |= {
                "invented": share(1),
                "abstained": None,
                "tokens": 9.0,
                "seconds": 2,
                "n": 40,
            }
            greedy = record | {"right": [i < count for i in range(40)]}
            sampled = record | {"pass_at": {"1": 0.5, "2": 0.75}}
            return {"greedy": greedy, "sampled": sampled}

        measured = {"free": decoding(free), "constrained": decoding(constrained)}
        return {"seed": 0, "seconds": 3.0, "sets": {"easy": measured, "hard": measured}}

    results = {
        "base": [run(10, 30)],
        "sft_correct": [run(22, 20)],
        "grpo": [run(30, 31), run(12, 33)],
    }
    write_report(tmp_path, {"commit": "x"}, results)
    assert json.loads((tmp_path / "results.json").read_text())["arms"] == results
    table = (tmp_path / "table.md").read_text()
    assert "## easy, 40 problems" in table
    assert "| base | 100.0 [90.0, 110.0] | 25.0 [15.0, 35.0] | 2.5 [-7.5, 12.5] |  | 9.0 |" in table
    assert "| GRPO, as configured | 100.0 [90.0, 110.0] | 52.5 [20.0, 85.0] |" in table
    lines = "\n".join(
        conclusions({k: [r["sets"]["easy"] | r for r in v] for k, v in results.items()})
    )
    assert "configured against base: +27.5 points all right, significant with 1 of 2 seeds" in lines
    assert (
        "constrained decoding against base, constrained decoding: +5.0 points all right, **not"
        in lines
    )
    # The best arm against the other trained one, each as it answers best: +9 and +11 of 40.
    assert (
        "configured, constrained decoding against SFT, right answers: +25.0 points all right,"
        " significant (McNemar, p = 0.0039, 0.00098)" in lines
    )
    # Where the base is best, every seed of the others is against it, once.
    easy = run(10, 35)["sets"]["easy"], run(2, 34)["sets"]["easy"], run(2, 20)["sets"]["easy"]
    lines = "\n".join(conclusions({"base": [easy[0]], "grpo": [*easy[1:]]}))
    assert (
        "configured, constrained decoding against base, constrained decoding: -20.0 points" in lines
    )
    assert "base, constrained decoding against GRPO" not in lines
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_command_measures_an_arm_once_and_reports(tmp_path, monkeypatch, capsys):
    heldout = "configs/invoices/heldout_50.jsonl"
    argv = [f"--out={tmp_path}", "--arms=base", f"--heldout={heldout}", "--problems=5"]
    monkeypatch.setattr("sys.argv", ["x", *argv, "--samples=0"])
    compare.main()
    record = json.loads((tmp_path / "results.json").read_text())
    [base] = record["arms"]["base"]
    greedy = base["sets"]["heldout_50"]["constrained"]["greedy"]
    assert greedy["n"] == greedy["schema_valid"]["count"] == len(greedy["right"]) == 5
    assert "base, constrained decoding" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 1000
    monkeypatch.setattr(compare, "try_arm", None)  # what is measured is not measured again
    compare.main()
    assert "against base, constrained decoding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("none.toml", "none.toml: No such file or directory; name a TOML file"),
        ("--run.stepz 3", "unknown option --run.stepz; the nearest known one is --run.steps"),
        ("--run.steps x", "run.steps"),
        ("--run.steps 1 more", "unexpected argument 'more'"),
        ("--arms base,best", "no arm best; there are base, prompt"),
        ("--model.path {0}/none", "no model in {0}/none"),
    ],
)
def test_what_the_command_cannot_do_it_says_in_a_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", *argv.format(tmp_path).split()])
    with pytest.raises(SystemExit) as caught:
        compare.main()
    assert caught.value.code == 2
    assert said.format(tmp_path) in capsys.readouterr().err.splitlines()[-1]


def test_fields_of_the_configuration_are_options(tmp_path, monkeypatch, capsys):
    seen = []

    def try_arm(arm, task, config, heldout, args, place):
        seen.append(config)
        place.mkdir()
        return {}

    monkeypatch.setattr(compare, "try_arm", try_arm)
    monkeypatch.setattr(compare, "write_report", lambda *_: (tmp_path / "table.md").write_text(""))
    argv = f"configs/invoice_smollm2_135m.toml --arms base --out {tmp_path} --model.path {tmp_path}"
    argv += " --run.steps 7 --sampling.constrain --rewards fields 2 --samples 0"
    monkeypatch.setattr("sys.argv", ["x", *argv.split()])
    compare.main()
    [config] = seen
    assert (config.run.steps, config.sampling.constrain) == (7, True)
    assert config.rewards == {"fields": 2.0}
    assert config.update.schedule == "linear"  # of the file
    compare.main()  # the same again
    monkeypatch.setattr("sys.argv", ["x", *argv.replace("steps 7", "steps 8").split()])
    with pytest.raises(SystemExit):
        compare.main()
    assert "has results with another run: name another --out" in capsys.readouterr().err


def test_a_task_leaves_out_arms_that_there_are():
    for task in TASKS.values():
        assert set(task.without) < ARMS.keys()
