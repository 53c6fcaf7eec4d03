"""The demo page: a picture of one's own, or one of the select split, beside the ensemble's answer and every vote.

Gradio draws the frame and takes the uploads; the answers are HTML of our own. Nothing is loaded from elsewhere, so the
page works without a network.
"""

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

from ensemble.ensemble import Ensemble
from trainables.candidate import read_run, select_labels
from trainables.data import open_data
from trainables.errors import UserError
from trainables.splits import load_splits

if TYPE_CHECKING:
    import gradio

Answer = Callable[[bytes], Awaitable[dict[str, Any]]]
"""From the bytes of an image file to what `ensemble.answer.Answerer` says about it."""

MOST_BARS = 10
MINUTES_KEPT = 10  # that uploads stay on disk
OWN, SELECT = "Your picture", "Select split"


@dataclass(frozen=True, eq=False)
class Examples:
    """The select split's images, uint8 (N, H, W, 3), with labels int64 (N,): what the ensemble was chosen on."""

    images: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    classes: list[str]

    @classmethod
    def of(cls, run: UPath) -> "Examples | None":
        """None when the data set is not prepared on this machine."""
        info = read_run(run)
        path = Path(info["data"].get("path", ""))
        if not (path / "meta.json").exists():
            return None
        return cls(open_data(path).images, load_splits(run).select, select_labels(run), list(info["classes"]))

    def __len__(self) -> int:
        return len(self.rows)

    def png(self, index: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.images[self.rows[index]]).save(file, "PNG")
        return file.getvalue()

    def label(self, index: int) -> str:
        return self.classes[int(self.labels[index])]


def build_page(run: UPath, ensemble: Ensemble, examples: Examples | None, answer: Answer) -> "gradio.Blocks":
    """The page, to be mounted; raises UserError when Gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing is sent home
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError:
        raise UserError("the demo page needs the package gradio; pip install 'ninefold[serve]'") from None

    class Upload(gradio.Image):
        """Hands over the uploaded file unopened: what it is, and how large, is for `answer` to find out."""

        is_template = True  # drawn as the Image that it is

        def preprocess(self, payload: Any) -> str | None:
            return payload.path if payload else None

        async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
            if str(url_or_file_path).startswith(("http://", "https://")):
                raise gradio.Error("upload a file; addresses are not fetched")  # nobody would limit their size
            return await super().async_move_resource_to_block_cache(url_or_file_path)

    async def answer_upload(path: str | None) -> str:
        if path is None:
            return _HINT
        return answer_html(await answer(Path(path).read_bytes()))

    async def answer_example(index: float) -> tuple[str, str]:
        assert examples is not None
        number = min(max(int(index), 0), len(examples) - 1)
        png, label = examples.png(number), examples.label(number)
        return picture_html(png, f"image {number} of the select split: {label}"), answer_html(await answer(png), label)

    with gradio.Blocks(title=f"Ninefold: {run.name}", delete_cache=(60, 60 * MINUTES_KEPT)) as page:
        gradio.HTML(_head_html(run, ensemble))
        with gradio.Tabs():
            with gradio.Tab(OWN), gradio.Row():
                with gradio.Column(min_width=300):
                    upload = Upload(
                        sources=["upload", "clipboard"], type="filepath", image_mode=None, height=340,
                        show_label=False, buttons=[], elem_id="upload",
                    )  # fmt: skip
                with gradio.Column(min_width=300):
                    own_answer = gradio.HTML(_HINT, elem_id="own-answer")
            upload.change(
                answer_upload, upload, own_answer, concurrency_limit=None, api_visibility="private",
                show_progress="minimal",
            )  # fmt: skip
            if examples is not None:
                with gradio.Tab(SELECT), gradio.Row():
                    with gradio.Column(min_width=300):
                        picture = gradio.HTML(elem_id="example")
                        index = gradio.Slider(
                            0, len(examples) - 1, value=0, step=1, label="image", buttons=[], elem_id="index"
                        )
                    with gradio.Column(min_width=300):
                        example_answer = gradio.HTML(elem_id="example-answer")
                shown: dict[str, Any] = {
                    "fn": answer_example, "inputs": index, "outputs": [picture, example_answer],
                    "concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden",
                }  # fmt: skip
                index.change(**shown, trigger_mode="always_last")
                page.load(**shown)
    return page


def mount_options() -> dict[str, Any]:
    """How the page looks, and what of Gradio it does without: keyword arguments of gradio.mount_gradio_app."""
    import gradio

    # Gradio's own themes name fonts of Google's servers
    theme = gradio.themes.Base(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return {"theme": theme, "css": _CSS, "footer_links": [], "run_history": False, "ssr_mode": False, "pwa": False}


def answer_html(answer: dict[str, Any], truth: str | None = None) -> str:
    """An answer as a person reads it; `truth` is the picture's true class, if that is known."""
    if "error" in answer:
        return f'<div class="nf nf-refusal" role="alert">{html.escape(answer["error"])}</div>'
    label = answer["label"]
    verdict = ""
    if truth is not None:
        right = truth == label
        verdict = (
            f'<p class="nf-truth {"nf-right" if right else "nf-wrong"}">{"✓" if right else "✗"} '
            f"true label: {html.escape(truth)}</p>"
        )
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
        '<table class="nf-votes"><thead><tr><th>member</th><th>says</th><th></th><th>weight</th></tr></thead>'
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
        f"<td>{'✓' if agrees else '✗'} {html.escape(member['label'])}</td>"
        f"<td>{member['probability']:.0%}</td><td>{member['weight']:.0%}</td></tr>"
    )


def _head_html(run: UPath, ensemble: Ensemble) -> str:
    score = ensemble.scores.get("select", {})
    told = f"{len(ensemble.members)} members, chosen by {ensemble.selector}"
    if "accuracy" in score:
        told += f"; select accuracy {score['accuracy']:.2%}"
        if "interval" in score:
            low, high = score["interval"]
            told += f" (95 %: {low:.2%} to {high:.2%}"
            told += f", {score['images']} images)" if "images" in score else ")"
    return f'<div class="nf nf-head"><h1>{html.escape(run.name)}</h1><p>{html.escape(told)}</p></div>'


_HINT = '<div class="nf nf-hint">Drop a picture on the left, paste one, or choose a file.</div>'

_CSS = """
.nf { color: var(--body-text-color); font-size: 15px; line-height: 1.4; }
.nf-head h1 { font-size: 1.5rem; font-weight: 650; margin: 0.25rem 0; color: inherit; }
.nf-head p { color: var(--body-text-color-subdued); margin: 0; }
.nf-hint, .nf-refusal { padding: 1rem; border-radius: 8px; border: 1px dashed var(--border-color-primary); }
.nf-hint { color: var(--body-text-color-subdued); }
.nf-refusal { border: 2px solid #d55e00; }
.nf-label { font-size: 1.9rem; margin: 0; }
.nf-label b { font-weight: 650; color: inherit; }
.nf-label span { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; margin-left: 0.25rem; }
.nf-truth { margin: 0.1rem 0 0; font-weight: 600; }
.nf table { width: 100%; border-collapse: collapse; margin: 0.75rem 0 0; display: table; }
.nf th, .nf td { border: 0; padding: 2px 6px 2px 0; text-align: left; font-weight: 400; color: inherit; }
.nf-bars th { width: 7.5em; max-width: 9em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.nf-bars td:last-child { width: 4em; text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
.nf-bars td div { background: #0072b2; height: 12px; min-width: 1px; border-radius: 2px; }
.nf-bars .nf-true th { font-weight: 650; }
.nf-bars .nf-true th::after { content: " ◂ true"; font-weight: 400; }
.nf h3 { font-size: 1rem; font-weight: 650; margin: 1.1rem 0 0; color: inherit; }
.nf-votes thead th { color: var(--body-text-color-subdued); font-size: 13px; }
.nf-votes tbody tr { border-top: 1px solid var(--border-color-primary); }
.nf-votes td:nth-child(n + 3), .nf-votes th:nth-child(n + 3) {
  text-align: right; font-variant-numeric: tabular-nums; padding-right: 0;
}
.nf small { color: var(--body-text-color-subdued); }
.nf-picture { width: 100%; max-height: 340px; object-fit: contain; image-rendering: pixelated; border-radius: 8px; }
#upload img { width: 100%; height: 100%; object-fit: contain; }
"""
