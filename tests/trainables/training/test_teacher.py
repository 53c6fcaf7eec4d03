"""A teacher says what the ensemble says, of the view that the student sees; and a student learns from that alone."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from upath import UPath

from ensemble.file import read_ensemble
from trainables.config import TrialConfig
from trainables.data.dataset import Data
from trainables.data.share import open_run_data
from trainables.data.splits import Splits
from trainables.inference import predict_probs
from trainables.job import Alone, DataSource, Job, Lesson, LessonMember
from trainables.models.weights import find_weights
from trainables.run_directory import list_candidates
from trainables.storage import write_array
from trainables.train import train
from trainables.training.augment import Pixels
from trainables.training.teacher import Teacher
from trainables.trial import run_trial

STUDENT = TrialConfig(
    backbone="speednet", width=0.25, image_size=16, epochs=6, batch_size=12, lr=5e-3, precision="fp32",
    weight_decay=0.0, flip="random",
)  # fmt: skip


def teach(run: UPath, **options: object) -> Lesson:
    ensemble = read_ensemble(run)
    members = tuple(
        LessonMember(str(member.candidate([run]).path), member.weight, member.temperature)
        for member in ensemble.members
    )
    return Lesson(members, ensemble.name, ensemble.temperature, **options)  # type: ignore[arg-type]


def test_it_says_what_the_ensemble_says_of_a_plain_view(small_run: UPath) -> None:
    data, splits = open_run_data(small_run)
    lesson = dataclasses.replace(teach(small_run), temperature=0.8)
    weighed = [dataclasses.replace(m, temperature=t) for m, t in zip(lesson.members, (0.7, 1.0, 1.5), strict=True)]
    lesson = dataclasses.replace(lesson, members=tuple(weighed))
    teacher = Teacher(lesson, data, splits, torch.device("cpu"), lambda: None)
    student = Pixels.of((0.3, 0.4, 0.5), (0.2, 0.3, 0.4), torch.device("cpu"))
    images = np.asarray(data.images[splits.select])
    x = student(torch.from_numpy(images), images.shape[1])  # at the stored size nothing is lost on the way
    expected = []
    for voter in teacher.voters:
        probs = predict_probs(voter.net, images, None, voter.pixels, voter.size)
        hot = probs.astype(float) ** (1 / voter.temperature)
        expected.append(voter.weight * hot / hot.sum(axis=1, keepdims=True))
    mean = np.sum(expected, axis=0) ** (1 / 0.8)
    np.testing.assert_allclose(
        teacher(x, student).numpy(), mean / mean.sum(axis=1, keepdims=True), atol=1e-3
    )  # the student rounds its view


def test_targets_mix_labels_and_answers(small_run: UPath) -> None:
    data, splits = open_run_data(small_run)
    pixels = Pixels.of((0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
    x = pixels(torch.from_numpy(np.array(data.images[:4])), 16)
    labels = torch.eye(3)[[0, 1, 2, 0]]
    labels[3] = 0  # an image without a label
    answers = Teacher(teach(small_run), data, splits, torch.device("cpu"), lambda: None)(x, pixels)
    some = Teacher(teach(small_run, share=0.25), data, splits, torch.device("cpu"), lambda: None)
    targets = some.targets(x, pixels, labels)
    np.testing.assert_allclose(targets[:3], 0.25 * answers[:3] + 0.75 * labels[:3], atol=1e-6)
    np.testing.assert_allclose(targets[3], answers[3], atol=1e-6)
    soft = Teacher(teach(small_run, softness=4.0), data, splits, torch.device("cpu"), lambda: None)(x, pixels)
    assert (soft.max(dim=1).values < answers.max(dim=1).values).all()
    assert (soft.argmax(dim=1) == answers.argmax(dim=1)).all()


def test_a_student_of_wrong_labels_learns_what_the_teacher_knows(small_run: UPath) -> None:
    data, splits = open_run_data(small_run)
    wrong = np.random.default_rng(0).integers(0, 3, len(data.labels))
    wrong[splits.tune] = data.labels[splits.tune]
    taught_nothing = dataclasses.replace(data, labels=wrong)
    alone = train(STUDENT, taught_nothing, splits)
    taught = train(STUDENT, taught_nothing, splits, lesson=teach(small_run, share=1.0))
    assert taught.metrics["select_accuracy"] > 0.8
    assert alone.metrics["select_accuracy"] < taught.metrics["select_accuracy"] - 0.2  # of 18 images


def test_images_without_labels_are_learned_from(small_run: UPath, tmp_path: Path) -> None:
    data, splits = open_run_data(small_run)
    few = dataclasses.replace(splits, train=np.sort(np.random.default_rng(1).permutation(splits.train)[:12]))
    rest = np.setdiff1d(splits.train, few.train)
    write_array(UPath(tmp_path / "more.npy"), np.asarray(data.images[rest]))
    config = dataclasses.replace(STUDENT, epochs=6)
    without = train(config, data, few, lesson=teach(small_run))
    more = train(config, data, few, lesson=teach(small_run, unlabelled=str(tmp_path / "more.npy")))
    assert more.metrics["select_accuracy"] > without.metrics["select_accuracy"] + 0.1


def test_a_lesson_that_was_cut_goes_on_as_if_it_had_not_been(small_run: UPath, tmp_path: Path) -> None:
    data, splits = open_run_data(small_run)
    config, lesson = dataclasses.replace(STUDENT, epochs=3), teach(small_run)
    whole = train(config, data, splits, lesson=lesson)
    path = UPath(tmp_path / "state.safetensors")
    train(config, data, splits, lambda metrics: metrics["epoch"] == 1, checkpoint=path, lesson=lesson)
    again = train(config, data, splits, checkpoint=path, lesson=lesson)
    assert again.resumed == [1]
    assert np.array_equal(whole.probs["select"], again.probs["select"])


def test_a_probe_that_teaches_has_not_seen_what_its_student_is_scored_on(
    data: Data, splits: Splits, small_run: UPath, tmp_path: Path
) -> None:
    """Its head was fitted once more on all labelled images when it became a candidate."""
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    config = TrialConfig(
        backbone="tf_efficientnet_lite0", pretrained=True, image_size=32, epochs=0, precision="fp32", tta="mirror"
    )
    found, own = open_run_data(run)
    source = DataSource(str(found.path), "folder")
    run_trial(Job("probe", config, str(run), source, find_weights("tf_efficientnet_lite0")), Alone())
    probe = next(candidate for candidate in list_candidates(run) if candidate.id == "probe")
    assert probe.info.refitted
    lesson = Lesson((LessonMember(str(probe.path), 1.0),))
    teacher = Teacher(lesson, found, own, torch.device("cpu"), lambda: None)
    (voter,) = teacher.voters
    says = predict_probs(voter.net, found.images, own.select, voter.pixels, voter.size, "mirror")
    np.testing.assert_allclose(says, probe.probs("select"), atol=2e-2)
    assert (says.argmax(axis=1) == probe.probs("select").argmax(axis=1)).all()


def test_a_network_that_teaches_is_the_one_from_before_its_last_epochs(
    data: Data, splits: Splits, small_run: UPath, tmp_path: Path
) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    found, own = open_run_data(run)
    config = dataclasses.replace(STUDENT, epochs=2, refit=1.0)
    run_trial(Job("further", config, str(run), DataSource(str(found.path), "folder")), Alone())
    further = next(candidate for candidate in list_candidates(run) if candidate.id == "further")
    assert further.info.refitted
    lesson = Lesson((LessonMember(str(further.path), 1.0),))
    (voter,) = Teacher(lesson, found, own, torch.device("cpu"), lambda: None).voters
    says = predict_probs(voter.net, found.images, own.select, voter.pixels, voter.size, config.tta)
    np.testing.assert_allclose(says, further.probs("select"), atol=1e-4)


def test_what_was_taught_is_said(small_run: UPath, tmp_path: Path) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    source = DataSource(str(open_run_data(run)[0].path), "folder")
    job = Job("student", dataclasses.replace(STUDENT, epochs=1), str(run), source, lesson=teach(run))
    assert run_trial(job, Alone()).outcome == "finished"
    info = next(candidate for candidate in list_candidates(run) if candidate.id == "student").info
    assert info.taught_by == "equal"


def test_a_member_without_weights_cannot_teach(small_run: UPath, tmp_path: Path) -> None:
    run = UPath(shutil.copytree(str(small_run), tmp_path / "run"))
    (run / "candidates" / "0000" / "weights.safetensors").unlink()
    source = DataSource(str(open_run_data(run)[0].path), "folder")
    result = run_trial(Job("student", STUDENT, str(run), source, lesson=teach(run)), Alone())
    assert result.outcome == "invalid"
    assert "candidate 0000 has no weights" in result.error


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
