"""The model card of an exported ensemble: what it is worth and on which images, what it was made from, its licences."""

import html
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from upath import UPath

from ensemble.file import Ensemble
from ensemble.show import claim_in_words, risk_in_words
from trainables.models.licences import UNKNOWN, licence_of, source_of
from trainables.run_directory import Candidate, RunInfo, read_run

MOST_CLASSES = 200  # that are named
USE = """```python
import sys
from huggingface_hub import snapshot_download

folder = snapshot_download("{repository}")  # or this folder, where it is on this machine
sys.path.insert(0, folder)
from ninefold_model import EnsembleModule

model = EnsembleModule.from_pretrained(folder)
answers = model.answer(["cat.jpg"])  # paths, bytes of files, Pillow images, or pixels uint8 (H, W, 3)
print(answers.labels, answers.probabilities.max(axis=1))
```"""


def write_card(runs: Sequence[UPath], ensemble: Ensemble, repository: str | None) -> str:
    """README.md of the Hugging Face folder. repository: its name on the hub, OWNER/NAME, where it is known."""
    info = read_run(runs[0])
    members = [(member, member.candidate(runs)) for member in ensemble.members if member.weight > 0]
    candidates = [candidate for _, candidate in members]
    sections = [
        "---",
        _header(runs[0].name, ensemble, info, candidates).to_yaml(),
        "---",
        "",
        f"# {_plain(repository or runs[0].name)}",
        "",
        f"An ensemble of {len(members)} image classifier{'s'[: len(members) - 1]}, selected by "
        f"`{_plain(ensemble.selector)}` from a sweep of Ninefold.",
        "",
        "## What to expect",
        "",
        *_worth(ensemble),
        "",
        "## Use",
        "",
        "The code in `ninefold_model/` needs the packages of `requirements.txt`, and nothing of Ninefold.",
        "",
        USE.format(repository=repository or "OWNER/NAME"),
        "",
        _preprocessing(info),
        "",
        "## Members",
        "",
        "| weight | architecture | pixels | views | starts from | licence of these weights |",
        "|---|---|---|---|---|---|",
        *[_row(member.weight, candidate) for member, candidate in members],
        "",
        "## Data",
        "",
        *_data(info),
        "",
        "## Licences",
        "",
        *_licences(candidates),
    ]
    return "\n".join(sections) + "\n"


def licences(candidates: Sequence[Candidate]) -> dict[str, str]:
    """The licence of the weights that each pretrained backbone started from, by its name."""
    configs = [candidate.info.config for candidate in candidates if candidate.info.config is not None]
    return {config.backbone: licence_of(config.backbone) for config in configs if config.pretrained}


def _header(name: str, ensemble: Ensemble, info: RunInfo, candidates: Sequence[Candidate]) -> ModelCardData:
    by_backbone = licences(candidates)
    kinds = set(by_backbone.values())
    claim = ensemble.claim or {}
    results = None
    if claim:
        results = [
            EvalResult(
                task_type="image-classification", dataset_type=info.data.name, dataset_name=info.data.name,
                dataset_split=str(claim.get("split", "select")), metric_type="accuracy", metric_value=claim["accuracy"],
            )
        ]  # fmt: skip
    sources = [source_of(backbone) for backbone in by_backbone]
    hub = "https://huggingface.co/"
    return ModelCardData(
        license=kinds.pop() if len(kinds) == 1 else "other" if kinds else UNKNOWN,
        tags=["image-classification", "ensemble", "ninefold", "pytorch", "timm"],
        pipeline_tag="image-classification",
        metrics=["accuracy"],
        base_model=[source.removeprefix(hub) for source in sources if source.startswith(hub)] or None,
        model_name=name,
        eval_results=results,
    )


def _worth(ensemble: Ensemble) -> list[str]:
    lines = []
    if ensemble.claim is not None:
        lines.append(f"{_sentence(claim_in_words(ensemble.claim))}.")
    select = ensemble.scores.get("select")
    if select and "accuracy" in select:
        lines.append(
            f"On the {select.get('images', '')} images of the select split, on which it was chosen, which flatters it: "
            f"{select['accuracy']:.2%}."
        )
    if not lines:
        lines.append("Nothing is claimed: no image was held out from what this ensemble was trained and chosen on.")
    if ensemble.risk is not None and "risk" in ensemble.scores:
        lines += ["", f"{_sentence(risk_in_words(ensemble.risk.level, ensemble.scores['risk']))}."]
    if ensemble.metric != "accuracy":
        lines += ["", f"It was selected for {ensemble.metric}, so its answer need not be the most probable class."]
    return lines


def _preprocessing(info: RunInfo) -> str:
    height, width = info.data.size or (0, 0)
    ways = {"squash": "squashed", "crop": "cropped in the middle", "pad": "padded with grey"}
    return (
        "`EnsembleModule.read` brings pictures to what the networks were trained on: upright by their EXIF "
        f"orientation, on white where they are transparent, {ways[info.data.fit]} to {width} x {height} pixels "
        "(bicubic), uint8 RGB. "
        "Each member's resizing, normalisation and views are in the model, as `config.json` says."
    )


def _row(weight: float, candidate: Candidate) -> str:
    config = candidate.info.config
    assert config is not None  # describe_model has refused it
    start, licence = "random weights", "none needed"
    if config.pretrained:
        source, licence = source_of(config.backbone), licence_of(config.backbone)
        start = f"[its pretrained weights]({source})" if source.startswith("https:") else source
    size = candidate.info.image_size or config.image_size
    return f"| {weight:.3f} | `{config.backbone}` | {size} | {config.tta} | {start} | {licence} |"


def _data(info: RunInfo) -> list[str]:
    sizes = info.splits
    parts = [("train", sizes.train), ("tune", sizes.tune), ("select", sizes.select), ("test", sizes.test)]
    named = ", ".join(f"{images:,} to {name}" for name, images in parts if images)
    names = ", ".join(f"`{_plain(name)}`" for name in info.classes[:MOST_CLASSES])
    more = f", and {len(info.classes) - MOST_CLASSES} more" if len(info.classes) > MOST_CLASSES else ""
    lines = [f"Data set: `{_plain(info.data.name)}`{f'; images: {named}' if named else ''}."]
    if sizes.shared:
        lines.append("Tune and select are the same images.")
    return [*lines, "", f"{len(info.classes)} classes: {names}{more}."]


def _licences(candidates: Sequence[Candidate]) -> list[str]:
    by_backbone = licences(candidates)
    lines = [f"- Weights of `{name}`: {licence}." for name, licence in by_backbone.items()]
    if UNKNOWN in by_backbone.values():
        lines.append("- Where the licence is unknown, ask at the source before you pass these weights on.")
    if not by_backbone:
        lines.append("- All members were trained from random weights.")
    return [*lines, "- The code in `ninefold_model/`: apache-2.0.", "- The images have a licence of their own."]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(text: Any) -> str:
    """A name out of a run, which may be somebody else's: without what Markdown or HTML would take for its own."""
    return html.escape(str(text), quote=False).replace("`", "'").replace("|", "/").replace("\n", " ")
