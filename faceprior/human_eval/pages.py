"""What the local pages share (Gradio, the extra `pages`): the entry by name, images to magnify, keys, the server.

    pip install "faceprior[pages]"

A page runs on this machine only and needs no network. Every answer is on the disk before the next question is shown, so
a page can be closed or killed at any time. A button with the id `key-x` is pressed by the key x.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from faceprior.human_eval.files import BenchmarkError, is_file_stem
from faceprior.images import ImageError, load_image

if TYPE_CHECKING:
    import gradio

logger = logging.getLogger(__name__)

_warn_once = functools.cache(logger.warning)  # a question is loaded again for every person and visit

# one after the other, so that an answer is on the disk before the next question is shown
EVENTS = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "answers"}

BLOCKS = {"analytics_enabled": False, "fill_width": True, "delete_cache": (600, 3600)}

# Keys press buttons. Each event is sent when the one before has arrived, since quick keys may change places on the way.
# The pointer on any image is the place that all of them magnify, so that faces can be compared.
_SCRIPT = """<script>
document.addEventListener("keydown", (event) => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.target.matches("input, textarea")) {
    if (key === "Escape") event.target.blur();
    return;
  }
  const button = document.getElementById("key-" + key);
  if (!button || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  button.click();
});
const send = window.fetch;
let sent = Promise.resolve();
window.fetch = (address, options) => {
  if (!String(address).includes("/queue/join")) return send(address, options);
  const answer = sent.then(() => send(address, options));
  sent = answer.catch(() => {});
  return answer;
};
const point = (event) => {
  const picture = event.target.closest && event.target.closest(".picture");
  if (!picture) return;
  const box = picture.getBoundingClientRect();
  document.body.style.setProperty("--x", 100 * (event.clientX - box.left) / box.width + "%");
  document.body.style.setProperty("--y", 100 * (event.clientY - box.top) / box.height + "%");
};
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
</script>"""

_STYLE = """
.picture { overflow: hidden; }
.picture img { width: 100%; height: 58vh; object-fit: contain; }
.large.picture img { height: 76vh; }
body.magnified .picture img {
  transform: scale(3); transform-origin: var(--x, 50%) var(--y, 50%); image-rendering: pixelated;
}
#order { text-align: center; }
#progress { text-align: right; }
@media (max-width: 640px) { .picture img, .large.picture img { height: 38vh; } #progress { text-align: left; } }
"""


class Entry(NamedTuple):
    """The parts of the page on which a person gives a name: all of it, the name, the button, what is wrong."""

    column: "gradio.Column"
    name: "gradio.Textbox"
    begin: "gradio.Button"
    problem: "gradio.Markdown"

    def start(self, function: Callable[[str], list[Any]], outputs: Sequence[Any]) -> None:
        """Call a function of the name; it returns the updates of column, problem and `outputs`."""
        import gradio as gr

        outputs = [self.column, self.problem, *outputs]
        gr.on([self.begin.click, self.name.submit], function, self.name, outputs, **EVENTS)


def make_entry(title: str, rules: str) -> Entry:
    import gradio as gr

    with gr.Column() as column:
        gr.Markdown(f"# {title}\n{rules}")
        name = gr.Textbox(label="Your name (the same name resumes)", max_length=80, elem_id="annotator")
        begin = gr.Button("Start", variant="primary", elem_id="start")
        problem = gr.Markdown(elem_id="problem")
    return Entry(column, name, begin, problem)


def enter(begin: Callable[[], list[Any]], outputs: int) -> list[Any]:
    """Return the updates of an entry and of its `outputs` from `begin()`; or what is wrong, should it raise."""
    import gradio as gr

    try:
        return [gr.update(visible=False), "", *begin()]
    except (ValueError, OSError) as error:
        return [gr.skip(), str(error), *[gr.skip()] * outputs]


def require_name(name: str) -> str:
    """Return a person's name without spaces around it; BenchmarkError if no file can have it."""
    if not is_file_stem(name.strip()):
        raise BenchmarkError(
            f"the name {name!r} cannot be the name of a file: it must not be empty, begin with a dot or hold a slash;"
            " give another"
        )
    return name.strip()


def make_picture(name: str, large: bool = False) -> "gradio.Image":
    import gradio as gr

    return gr.Image(
        format="png",  # the default compresses the image
        show_label=False,
        buttons=["fullscreen"],
        interactive=False,
        elem_classes=["picture", "large"] if large else "picture",
        elem_id=f"picture-{name}",
    )


def make_key(key: str, text: str, **options: Any) -> "gradio.Button":
    """Return a button that a key presses; key: as in the browser's `event.key`, a letter in lower case."""
    import gradio as gr

    return gr.Button(text, elem_id=f"key-{key}", min_width=90, size="md", **options)


def make_magnifier() -> "gradio.Button":
    """Return the button that magnifies all images three times, at the place of the pointer, pixel by pixel."""
    button = make_key("z", "Z magnify")
    button.click(None, js="() => { document.body.classList.toggle('magnified'); }")
    return button


def load_or_warn(file: Path) -> Image.Image | None:
    """Return an image; None, and one warning in the log, where it cannot be read."""
    try:
        return load_image(file)
    except (ImageError, OSError) as error:
        _warn_once("its place on the page stays empty: %s", str(error))
        return None


def launch(
    page: "gradio.Blocks",
    port: int | None = None,
    block: bool = True,
    task: str = "Rank faces",
    files: Sequence[Path] = (),
) -> str:
    """Serve a page on this machine only, without a network; returns its address.

    port: the first free one from 7860 on if None. block: until Ctrl-C. task: what the printed line says that people do.
    files: folders whose files the page may show by their path.
    """
    import gradio as gr

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # those of the theme come from the web
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(**fonts),
        css=_STYLE,
        head=_SCRIPT,
        allowed_paths=[str(folder.resolve()) for folder in files],
    )
    if block:
        print(f"{task} at {address} (Ctrl-C ends it; every answer is on the disk already)", flush=True)
        page.block_thread()
    return address
