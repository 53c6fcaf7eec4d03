"""The demo page: a picture of one's own, or one of the select split, beside the ensemble's answer and every vote.

Gradio draws the frame and takes the uploads; the answers are HTML of our own. Nothing is loaded from elsewhere, so the
page works without a network.
"""

import asyncio
import base64
import html
import io
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from upath import UPath

from ensemble.file import Ensemble
from trainables.data.packed import ImageRows
from trainables.data.share import open_run_data, select_images
from trainables.errors import UserError
from trainables.run_directory import select_labels

if TYPE_CHECKING:
    import gradio

Answer = Callable[[bytes], Awaitable[dict[str, Any]]]
"""From the bytes of an image file to what `ensemble.serve.answer.Answerer` says about it."""

MOST_BARS = 10
MINUTES_KEPT = 10  # that uploads stay on disk
READ = 4  # uploads that are in memory at a time: to ask for one again takes a hundred bytes
QUEUED = 64  # answers that wait, of all tabs; Gradio's own queue has no end
SESSIONS = 64  # tabs that Gradio remembers, each in 20 kB; its own limit is 10,000
OWN, SELECT = "Your picture", "Select split"


@dataclass(frozen=True, eq=False)
class Examples:
    """The select split's images, uint8 (N, H, W, 3), with labels int64 (N,): what the ensemble was chosen on."""

    images: ImageRows
    rows: np.ndarray
    labels: np.ndarray
    classes: list[str]

    @classmethod
    def of(cls, run: UPath) -> "Examples | None":
        """None when the data set cannot be opened, neither from this machine nor from beside the run; or when the
        select split is empty, for a refit was trained on it, too."""
        try:
            data, splits = open_run_data(run)
            if not len(splits.select):
                return None
            labels = select_labels(run)
            rows = select_images(run, data, splits, labels)
        except (UserError, OSError):  # nowhere, damaged, or there is no room for a copy of it
            return None
        return cls(data.images, rows, labels, list(data.classes))

    def __len__(self) -> int:
        return len(self.rows)

    def png(self, index: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.images[self.rows[index]]).save(file, "PNG")
        return file.getvalue()

    def label(self, index: int) -> str:
        return self.classes[int(self.labels[index])]


def build_page(
    run: UPath, ensemble: Ensemble, examples: Examples | None, answer: Answer, uploads: Path
) -> "gradio.Blocks":
    """The page, to be mounted; uploads: the folder that pictures are kept in while they are looked at.

    Raises UserError when Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing is sent home
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "100"  # not 10,000: every answer takes a table of them all
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    try:
        import gradio
    except ImportError:
        raise UserError("the demo page needs the package gradio; pip install 'ninefold[serve]'") from None

    def uploaded(path: str) -> str:
        if not Path(path).resolve().is_relative_to(uploads.resolve()):
            raise gradio.Error("upload a file; nothing else is opened", print_exception=False)
        return path

    async def keep(path: str) -> str:
        return uploaded(path)

    turns = asyncio.Semaphore(READ)

    async def answer_upload(path: str | None) -> str:
        if path is None:
            return _HINT
        async with turns:
            try:
                content = Path(path).read_bytes()
            except FileNotFoundError:  # so many came after it that it had to go
                return answer_html({"error": "the picture is no longer here; upload it again"})
            return answer_html(await answer(content))

    async def answer_example(index: float) -> tuple[str, str]:
        assert examples is not None
        number = min(max(int(index), 0), len(examples) - 1)
        png, label = examples.png(number), examples.label(number)
        return picture_html(png, f"image {number} of the select split: {label}"), answer_html(await answer(png), label)

    with gradio.Blocks(title=f"Ninefold: {run.name}", delete_cache=(60, 60 * MINUTES_KEPT)) as page:
        gradio.HTML(_head_html(run, ensemble), apply_default_css=False)
        with gradio.Tabs():
            with gradio.Tab(OWN), gradio.Row():
                with gradio.Column(min_width=300):
                    upload = gradio.Image(
                        sources=["upload", "clipboard"], type="filepath", image_mode=None, height=340,
                        show_label=False, buttons=[], elem_id="upload",
                    )  # fmt: skip
                with gradio.Column(min_width=300):
                    own_answer = gradio.HTML(_HINT, elem_id="own-answer", apply_default_css=False)
            # the file is handed over unopened: what it is, and how large, is for `answer` to find out
            upload.preprocess = lambda payload: uploaded(str(payload.path)) if payload else None  # type: ignore[method-assign]
            upload.change(
                answer_upload, upload, own_answer, concurrency_limit=None, api_visibility="private",
                show_progress="minimal",
            )  # fmt: skip
            if examples is not None:
                with gradio.Tab(SELECT), gradio.Row():
                    with gradio.Column(min_width=300):
                        picture = gradio.HTML(elem_id="example", apply_default_css=False)
                        index = gradio.Slider(
                            0, len(examples) - 1, value=0, step=1, label="image", buttons=[], elem_id="index"
                        )
                    with gradio.Column(min_width=300):
                        example_answer = gradio.HTML(elem_id="example-answer", apply_default_css=False)
                shown: dict[str, Any] = {
                    "fn": answer_example, "inputs": index, "outputs": [picture, example_answer],
                    "concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden",
                }  # fmt: skip
                index.change(**shown, trigger_mode="always_last")
                page.load(**shown)
    for block in page.blocks.values():
        # Gradio, mounted, would copy any file of this machine, or fetch any address, that a request names as its upload
        block.async_move_resource_to_block_cache = keep  # type: ignore[method-assign,assignment]
    page.state_session_capacity = SESSIONS
    return page.queue(max_size=QUEUED)


def mount_options() -> dict[str, Any]:
    """How the page looks, and what of Gradio it does without: keyword arguments of gradio.mount_gradio_app."""
    import gradio

    # Gradio's own themes name fonts of Google's servers
    theme = gradio.themes.Base(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    theme = theme.set(slider_color="#0072b2", slider_color_dark="#56b4e9")
    return {"theme": theme, "css": _CSS, "footer_links": [], "run_history": False, "ssr_mode": False, "pwa": False}


def answer_html(answer: dict[str, Any], truth: str | None = None) -> str:
    """An answer as a person reads it; `truth` is the picture's true class, if that is known."""
    if "error" in answer:
        return f'<div class="nf nf-refusal" role="alert">{html.escape(answer["error"])}</div>'
    label = answer["label"]
    verdict = ""
    if truth is not None:
        right = truth == label
        verdict = f'<p class="nf-truth">{"✓" if right else "✗"} true label: {html.escape(truth)}</p>'
    if answer.get("unsure"):
        others = [name for name in answer["set"] if name != label]
        among = f"; it could be {', '.join(map(html.escape, others[:MOST_BARS]))}" if others else ""
        verdict += f'<p class="nf-unsure">not sure of it{among}</p>'
    ranked = sorted(answer["probs"].items(), key=lambda item: -item[1])
    bars = "".join(_bar_row(name, p, name == truth) for name, p in ranked[:MOST_BARS])
    if len(ranked) > MOST_BARS:
        bars += _bar_row(f"{len(ranked) - MOST_BARS} others", sum(p for _, p in ranked[MOST_BARS:]), False)
    votes = "".join(_vote_row(member, label) for member in answer["members"])
    agreeing = sum(member["label"] == label for member in answer["members"])
    return (
        f'<div class="nf nf-answer"><p class="nf-label"><b>{html.escape(label)}</b> '
        f"<span>{answer['probability']:.1%}</span></p>{verdict}"
        f'<table class="nf-bars" aria-label="probabilities">{bars}</table>'
        f"<h3>Votes: {agreeing} of {len(answer['members'])} for {html.escape(label)}</h3>"
        '<table class="nf-votes"><thead><tr><th>member</th><th>says</th><th>weight</th></tr></thead>'
        f"<tbody>{votes}</tbody></table></div>"
    )


def picture_html(png: bytes, text: str) -> str:
    source = base64.b64encode(png).decode()
    return f'<img class="nf-picture" alt="{html.escape(text)}" src="data:image/png;base64,{source}">'


def _bar_row(name: str, probability: float, is_true: bool) -> str:
    return (
        f"<tr{' class=nf-true' if is_true else ''}><th>{html.escape(name)}</th>"
        f'<td><div style="width:{100 * probability:.1f}%"></div></td><td>{probability:.1%}</td></tr>'
    )


def _vote_row(member: dict[str, Any], label: str) -> str:
    agrees = member["label"] == label
    return (
        f"<tr><td>{html.escape(member['architecture'])} <small>{html.escape(member['id'])}</small></td>"
        f"<td>{'✓' if agrees else '✗'} {html.escape(member['label'])} <small>{member['probability']:.0%}</small></td>"
        f"<td>{member['weight']:.0%}</td></tr>"
    )


def _head_html(run: UPath, ensemble: Ensemble) -> str:
    score = ensemble.claim or ensemble.scores.get("select", {})
    told = f"{len(ensemble.members)} members, chosen by {ensemble.selector}"
    if {"accuracy", "images"} <= score.keys():
        kind = "expected accuracy" if ensemble.claim else "fitted select accuracy"
        also = ", also used to tune" if score.get("shared") else ""
        told += f"; {kind} {score['accuracy']:.2%} on {score['images']:,} images{also}"
        if "interval" in score:
            low, high = score["interval"]
            told += f" ({low:.2%} to {high:.2%})"
    name = f"<small>Ninefold</small> {html.escape(run.name)}"
    return f'<div class="nf nf-head"><h1>{name}</h1><p>{html.escape(told)}</p></div>'


_HINT = '<div class="nf nf-hint">Drop a picture on the left, paste one, or choose a file.</div>'

_CSS = """
.nf { color: var(--body-text-color); font-size: 15px; line-height: 1.45; }
.nf small, .nf-label span, .nf-head p, .nf-hint, .nf thead { opacity: 0.72; font-weight: 400; }
.nf h1 { font-size: 1.5rem; font-weight: 650; margin: 0 0 0.15rem; }
.nf h1 small { font-size: 1.5rem; margin-right: 0.25rem; }
.nf h3 { font-size: 1rem; font-weight: 650; margin: 1.2rem 0 0; }
.nf p { margin: 0; }
.nf-hint, .nf-refusal { padding: 1rem; border-radius: 8px; border: 1px dashed var(--border-color-primary); }
.nf-refusal { border: 2px solid #d55e00; }
.nf-label { font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
.nf-label b { font-weight: 650; margin-right: 0.25rem; }
.nf-truth { font-weight: 600; margin-top: 0.2rem; }
.nf-unsure { color: var(--body-text-color-subdued); margin-top: 0.2rem; }
.nf table { width: 100%; border-collapse: collapse; margin-top: 0.6rem; font-variant-numeric: tabular-nums; }
.nf th, .nf td { padding: 3px 10px 3px 0; text-align: left; font-weight: 400; }
.nf th:last-child, .nf td:last-child { text-align: right; padding-right: 0; }
.nf-bars th { width: 1%; max-width: 11em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.nf-bars td:last-child { width: 3.5em; }
.nf-bars td div { background: #0072b2; height: 12px; min-width: 2px; border-radius: 2px; }
.dark .nf-bars td div { background: #56b4e9; }
.nf-bars .nf-true th { font-weight: 650; }
.nf-bars .nf-true th::after { content: " (true)"; font-weight: 400; }
.nf-votes thead { font-size: 13px; }
.nf-votes tbody tr { border-top: 1px solid var(--border-color-primary); }
.nf-votes td { overflow-wrap: anywhere; }
.nf-picture { width: 100%; max-height: 340px; object-fit: contain; image-rendering: pixelated; border-radius: 8px; }
#upload img { width: 100%; height: 100%; object-fit: contain; }
"""
