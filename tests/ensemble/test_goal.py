"""Metrics other than accuracy: as scikit-learn has them, and what choosing and answering for them changes."""

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from upath import UPath

from ensemble.file import Ensemble, read_ensemble
from ensemble.running import EnsembleSoFar
from ensemble.select import Select, choose
from ensemble.selection.goal import METRICS, Decision, Goal, Judge, read_goal
from ensemble.selection.metrics import auroc, log_loss, macro_f1, mean_recall
from search.study.objective import Contribution, OwnScores, value_by
from tests.ensemble.test_select import run_command
from trainables.errors import UserError
from trainables.run_directory import CandidateInfo, write_candidate
from trainables.storage import write_array, write_json

SHARES = np.array([0.8, 0.15, 0.05])


def draw(rows: int, models: int, seed: int = 0, shares: np.ndarray = SHARES):
    """Probabilities (M, N, C) of calibrated models that see the label through noise of their own, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(shares), rows, p=shares)
    probs = []
    for _ in range(models):
        logits = np.log(shares) + 1.6 * (1.6 * np.eye(len(shares))[labels] + rng.normal(size=(rows, len(shares))))
        probs.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    return np.array(probs, np.float32), labels


def make_run(path, probs, labels):
    run = UPath(path)
    write_json(run / "run.json", {"classes": ["a", "b", "c"], "split_fingerprint": "f"})
    write_array(run / "select_labels.npy", labels)
    for m, p in enumerate(probs):
        write_candidate(run, CandidateInfo(f"c{m}"), p)
    return run


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn(seed):
    (probs,), labels = draw(200, 1, seed)
    probs = probs.round(2) / probs.round(2).sum(axis=1, keepdims=True)  # with ties
    answers = Decision(1 / SHARES).answers(probs)
    assert mean_recall(answers, labels) == pytest.approx(balanced_accuracy_score(labels, answers))
    assert macro_f1(answers, labels) == pytest.approx(f1_score(labels, answers, average="macro"))
    assert auroc(probs, labels) == pytest.approx(roc_auc_score(labels, probs, multi_class="ovr"))
    two, truth = probs[labels < 2][:, :2], labels[labels < 2]
    assert auroc(two, truth) == pytest.approx(np.mean([roc_auc_score(truth == c, two[:, c]) for c in (0, 1)]))


def test_a_class_that_nobody_is_of_is_left_out():
    probs = np.array([[0.5, 0.5, 0], [0.2, 0.8, 0]])
    labels = np.array([0, 1])
    assert auroc(probs, labels) == 1.0
    assert auroc(probs, np.array([1, 1])) == 0.5
    assert macro_f1(np.array([0, 0]), labels) == pytest.approx(f1_score(labels, [0, 0], average="macro"))


def test_answers_for_equal_recall_are_held_against_how_frequent_a_class_is():
    probs, labels = draw(4000, 1)
    goal = Goal("balanced_accuracy")
    plain, fair = Decision(), goal.decide(probs, labels)
    assert goal.value(probs[0], labels, fair) > goal.value(probs[0], labels, plain) + 0.1
    assert Goal().value(probs[0], labels, fair) < Goal().value(probs[0], labels, plain), "that is what it costs"
    f1 = Goal("macro_f1")
    best = f1.decide(probs, labels)
    assert f1.value(probs[0], labels, best) >= max(f1.value(probs[0], labels, d) for d in (plain, fair))


def test_the_cheapest_answer_is_given():
    cost = np.array([[0, 1, 1], [1, 0, 1], [30, 30, 0]], float)  # to miss c is dear
    probs, labels = draw(2000, 1)
    goal = Goal("cost", cost)
    decision = goal.decide(probs, labels)
    assert decision.answers(np.array([[0.9, 0.05, 0.05]])).tolist() == [2]
    assert goal.value(probs[0], labels, decision) < 0.7 * goal.value(probs[0], labels, Decision())
    expected = np.mean([cost[y, a] for y, a in zip(labels, decision.answers(probs[0]), strict=True)])
    assert goal.value(probs[0], labels, decision) == pytest.approx(expected)


def test_intervals_hold_what_is_true():
    goal, held = Goal("balanced_accuracy"), 0
    (many,), truth = draw(200_000, 1, 99)
    true = goal.value(many, truth, goal.decide(many[None], truth))
    for seed in range(60):
        probs, labels = draw(300, 1, seed)
        low, high = goal.measure(probs, labels, goal.decide(probs, labels))["interval"]
        held += low <= true <= high
    assert held >= 53


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_a_rare_class_is_not_given_up(metric, tmp_path):
    probs, labels = draw(500, 8)
    run = make_run(tmp_path / "run", probs, labels)
    plain, fair = choose(Select(run=(str(run),))), choose(Select(run=(str(run),), metric=metric))
    other, truth = draw(4000, 8, seed=7)

    def recall(ensemble, c):
        answers = ensemble.decision.answers(ensemble.predict([other[int(m.id[1:])] for m in ensemble.members]))
        return (answers[truth == c] == c).mean()

    assert recall(fair, 2) > recall(plain, 2) + 0.1
    told = fair.scores["claim"]["metric"]
    assert told["name"] == metric
    decided = fair.decision.answers(fair.predict([other[int(m.id[1:])] for m in fair.members]))
    true = (mean_recall if metric == "balanced_accuracy" else macro_f1)(decided, truth)
    assert told["interval"][0] < true < told["interval"][1]
    assert "metric" not in plain.scores["claim"]
    assert fair.scores["gain"]["metric"]["interval"][0] < fair.scores["gain"]["metric"]["interval"][1]


def test_a_good_candidate_for_the_metric_is_not_passed_over_for_accurate_ones(tmp_path):
    """Eight models that never say "c" are more accurate than the one that knows it."""
    rng = np.random.default_rng(0)
    labels = rng.choice(2, 400, p=[0.95, 0.05])
    blind = [np.clip(0.95 + rng.normal(0, 0.01, 400), 0.9, 0.99) for _ in range(8)]
    sees = np.where(rng.random(400) < 0.88, labels == 0, labels == 1) * 0.8 + 0.1
    probs = [np.stack([p, 1 - p], axis=1).astype(np.float32) for p in [*blind, sees]]
    run = UPath(tmp_path / "run")
    write_json(run / "run.json", {"classes": ["a", "b"], "split_fingerprint": "f"})
    write_array(run / "select_labels.npy", labels)
    for m, p in enumerate(probs):
        write_candidate(run, CandidateInfo(f"c{m}"), p)
    ensemble = choose(Select(run=(str(run),), metric="balanced_accuracy"))
    assert "c8" in {member.id for member in ensemble.members}
    assert ensemble.scores["claim"]["metric"]["value"] > 0.8
    assert ensemble.scores["best_single"]["id"] == "c8"


def test_the_command_says_what_it_is_about_and_the_file_keeps_it(tmp_path):
    probs, labels = draw(300, 5)
    run = make_run(tmp_path / "run", probs, labels)
    table = tmp_path / "costs.csv"
    table.write_text("label,c,b,a\na,1,1,0\nc,0,20,20\nb,1,0,1\n")
    for metric, shown in (("auroc", "AUROC"), ("macro_f1", "macro F1"), (f"cost:{table}", "cost"), ("log_loss", "")):
        done = run_command("--run", run, "--metric", metric, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        ensemble = read_ensemble(run)
        name = metric.partition(":")[0]
        assert (ensemble.metric, ensemble.name) == (name, f"auto-{name}")
        if shown:
            value = ensemble.scores["claim"]["metric"]["value"]
            told = f"{value:.4f}" if name == "cost" else f"{value:.2%}"
            assert f"expect {shown} {told}" in " ".join(done.stdout.split())
        again = Ensemble.from_dict(json.loads(json.dumps(ensemble.to_dict())), ensemble.name)
        answers = [e.decision.answers(probs[0]).tolist() for e in (ensemble, again)]
        assert answers[0] == answers[1]
    cost = read_goal(f"cost:{table}", ["a", "b", "c"]).cost
    assert cost is not None
    assert cost.tolist() == [[0, 1, 1], [1, 0, 1], [20, 20, 0]]


@pytest.mark.parametrize(
    ("metric", "content", "message"),
    [
        ("recall", None, "--metric is 'recall', expected accuracy, log_loss, .* auroc or cost:FILE"),
        ("cost", None, "--metric is 'cost', expected"),
        ("auroc:x", None, "--metric is 'auroc:x', expected"),
        ("cost:gone.csv", None, "cannot be read"),
        ("cost:t.csv", "", "cannot be read"),
        ("cost:t.csv", "label,a,b\na,0,1\nb,1,0\n", "has other classes than the data set"),
        ("cost:t.csv", "label,a,b,c\na,0,x,1\nb,1,0,1\nc,1,1,0\n", "cannot be read"),
        ("cost:t.csv", "label,a,b,c\na,0,1\nb,1,0,1\nc,1,1,0\n", "cannot be read"),
        ("cost:t.csv", "label,a,b,c\na,0,-1,1\nb,1,0,1\nc,1,1,0\n", "has negative or no costs"),
        ("cost:t.csv", "label,a,b,c\na,0,nan,1\nb,1,0,1\nc,1,1,0\n", "has negative or no costs"),
    ],
)  # fmt: skip
def test_metrics_that_are_none(metric, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_goal(metric, ["a", "b", "c"])


@pytest.mark.parametrize(
    "damage",
    [
        {"decision": {"factors": [1.0, float("nan")]}},
        {"decision": {"factors": [[1.0]]}},
        {"decision": {"cost": [[1.0, 2.0]]}, "metric": "cost"},
        {"decision": {"cost": "x"}, "metric": "cost"},
        {"metric": "cost"},
        {"metric": "speed"},
    ],
)
def test_damaged_decisions_are_refused(damage):
    with pytest.raises(UserError, match="damaged"):
        Ensemble.from_dict({"members": [{"id": "a", "weight": 1.0}]} | damage, "x")


def test_the_ensemble_so_far_is_about_the_metric_too(tmp_path):
    probs, labels = draw(400, 1)
    fair = probs[0] / SHARES
    fair = (fair / fair.sum(axis=1, keepdims=True)).astype(np.float32)
    blind = np.eye(3, dtype=np.float32)[np.where(labels == 2, 0, labels)] * 0.7 + 0.1  # to the rare class alone
    for goal, best in ((Goal(), "c0"), (Goal("balanced_accuracy"), "c1")):
        run = make_run(tmp_path / goal.name, [blind, fair], labels)
        live = EnsembleSoFar(run, 9, goal)
        assert live.best_single is not None
        assert live.best_single[0] == best


def test_samplers_are_told_the_metric():
    probs, labels = draw(300, 2)
    for name in METRICS:
        cost = 1 - np.eye(3) if name == "cost" else None
        goal = Goal(name, cost)
        valued, own = value_by(goal, "metric", labels, 9)
        assert valued == ("accuracy" if goal.higher_is_better else "log_loss"), "that is the direction"
        if name in ("accuracy", "log_loss"):
            assert own is None
            continue
        assert isinstance(own, OwnScores)
        own.add("0", probs[0])
        assert own.values() == {"0": goal.value(probs[0], labels, goal.decide(probs[:1], labels))}
    assert value_by(Goal("auroc"), "log_loss", labels, 9) == ("log_loss", None)


def test_what_a_candidate_adds_counts_every_class_the_same():
    probs, labels = draw(300, 2)
    goal = Goal("balanced_accuracy")
    valued, fair = value_by(goal, "ensemble", labels, 9)
    assert valued == "ensemble"
    assert isinstance(fair, Contribution)
    fair.add("0", probs[0])
    judge = Judge(goal, labels, 3)
    assert judge.weights is not None
    assert fair.values()["0"] == pytest.approx(judge.losses(probs[0]).mean() - np.log(3), abs=1e-4)
    plain = value_by(Goal(), "ensemble", labels, 9)[1]
    assert isinstance(plain, Contribution)
    plain.add("0", probs[0])
    assert plain.values()["0"] == pytest.approx(log_loss(probs[0], labels) - np.log(3), abs=1e-4)
