"""The page: what stands where, and what happens on a click."""

import html
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffbir.model.sampling.solvers import SOLVERS
from diffbir.utils.cli import UserError
from diffbir.web.examples import Example
from diffbir.web.uploads import new_place, uploaded
from diffbir.web.wish import OWN, Wish, realism
from diffbir.web.workshop import INPUT, NOW, RESULT, STAGE1, News, Workshop

log = logging.getLogger(__name__)

TITLE = "DiffBIR"
SENTENCE = (
    "Restores photos that are noisy, blurred, compressed or small, all at once: a first network removes the damage, a "
    "diffusion model puts the detail back."
)
READY = "Drop a photo, or choose one of the examples."
SHOW = """() => {
    document.getElementById('slider').scrollIntoView({behavior: 'smooth', block: 'nearest'});
    return [];
}"""  # on a phone the picture is further down
JOB = "restore"  # whose number at the same time is limited


@dataclass(frozen=True)
class Limits:
    """Of a visit.

    Args:
        pictures: at once.
        queue: visitors that may wait.
        concurrency: pictures that are restored at the same time.
    """

    pictures: int = 20
    queue: int = 16
    concurrency: int = 1


def build_page(shop: Workshop, limits: Limits, examples: Sequence[Example] = ()) -> gr.Blocks:
    """Args:
    examples: photos to try; Gradio must be allowed to serve their thumbnails.
    """
    first, *_ = offers = list(shop.models.offers.values())
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{TITLE}</h1><p>{SENTENCE}</p>", elem_id="head", padding=False)
        shown = gr.State([])  # (name, title, input, picture) of everything in the gallery
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320):
                files = gr.File(label="Photos", file_count="multiple", height=150, elem_id="files")
                if examples:
                    gr.HTML("or try one of these", elem_classes="heading", padding=False)
                samples = gr.Gallery(
                    [(str(example.thumbnail), example.path.stem.replace("-", " ")) for example in examples],
                    show_label=False, columns=6, height="auto", object_fit="cover", allow_preview=False,
                    interactive=False, container=False, visible=bool(examples), elem_id="examples", buttons=[],
                )  # fmt: skip
                with gr.Row():
                    go = gr.Button("Restore", variant="primary", size="lg", elem_id="go")
                    stop = gr.Button("Stop", variant="stop", size="lg", visible=False, elem_id="stop")
                guidance = gr.Slider(
                    0, 100, realism(shop.models.defaults(first).guidance_scale), step=1, buttons=["reset"],
                    label="Faithful … realistic", elem_id="guidance",
                    info="left keeps to what the photo shows, right adds detail that may not have been there",
                )  # fmt: skip
                upscale = gr.Slider(
                    1, 8, 1, step=0.5, label="Enlarge", info="size of the result over that of the photo",
                    buttons=["reset"], elem_id="upscale",
                )  # fmt: skip
                with gr.Row():
                    preset = gr.Dropdown([offer.name for offer in offers], value=first.name, label="Model",
                                         min_width=140, elem_id="preset")  # fmt: skip
                    tasks = list(dict.fromkeys(task for offer in offers for task in offer.tasks))
                    task = gr.Dropdown([OWN, *tasks], value=OWN, label="Task", min_width=140, elem_id="task",
                                       interactive=bool(first.tasks))  # fmt: skip
                faces = gr.Checkbox(False, label="Restore faces apart", elem_id="faces")
                with gr.Accordion("More", open=False):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, elem_id="seed",
                                     info="another number, another picture of the same likelihood")  # fmt: skip
                    solver = gr.Dropdown([OWN, *SOLVERS], value=OWN, label="Solver", elem_id="solver",
                                         info="standard is the model's own")  # fmt: skip
                    steps = gr.Slider(0, 100, 0, step=1, label="Steps", info="more are slower; 0 is the model's own",
                                      buttons=["reset"], elem_id="steps")  # fmt: skip
            with gr.Column(scale=7, min_width=320):
                slider = gr.ImageSlider(
                    show_label=False, type="filepath", interactive=False, max_height=560, buttons=["fullscreen"],
                    elem_id="slider",
                )  # fmt: skip
                status = gr.HTML(line(READY), elem_id="status", padding=False)
                results = gr.File(
                    label="Download, in full quality", file_count="multiple", interactive=False, visible=False,
                    elem_id="results",
                )  # fmt: skip
                hint = gr.HTML("Click a stage to compare it with the input", elem_classes="heading", padding=False,
                               visible=False)  # fmt: skip
                stages = gr.Gallery(
                    show_label=False, columns=3, container=False, height="auto", allow_preview=False,
                    object_fit="contain", visible=False, elem_id="stages", buttons=[],
                )  # fmt: skip
                command = gr.Textbox(
                    label="The same on the command line", lines=2, interactive=False, visible=False, buttons=["copy"],
                    elem_id="command",
                )  # fmt: skip
        wishes = [preset, task, guidance, upscale, seed, solver, steps, faces]

        def wish(name, task, guidance, upscale, seed, solver, steps, faces) -> Wish:
            offer = shop.models.offer(name)
            return Wish(offer, task, guidance, upscale, int(seed or 0), solver, int(steps), bool(faces))

        def look(paths: list[str] | None) -> Iterator[tuple[Any, ...]]:
            """Shows the first upload; all are read, so that one that can't be is refused at once."""
            with told():
                try:
                    pictures = [str(shop.look(path)) for path in checked(paths)]
                except UserError as error:
                    yield None, line(str(error)), *empty()
                    raise
                text = f"{len(pictures)} photos are here." if len(pictures) > 1 else f"{Path(paths[0]).name} is here."
                yield (pictures[0], pictures[0]), line(text), *empty()

        def work(paths: list[str] | None, *wishes: Any) -> Iterator[dict]:
            """Restores the uploads one after the other; every news changes the page."""
            with told():
                try:
                    yield from changes(checked(paths), wish(*wishes))
                except UserError as error:
                    yield {status: line(str(error))}
                    raise

        def changes(paths: list[Path], asked: Wish) -> Iterator[dict]:
            ready: list[str] = []
            show: list[tuple[str, str, str, str]] = []
            for i, path in enumerate(paths):
                for news in shop.restore(path, asked):
                    count = f" ({i + 1} of {len(paths)})" if len(paths) > 1 else ""
                    share = (i + news.share) / len(paths)
                    change: dict = {status: line(news.text + count, share if share < 1 else None)}
                    if pair := to_compare(news):
                        change[slider] = pair
                    if news.result:
                        ready.append(str(news.result))
                        source = str(news.pictures[INPUT])
                        show += [(path.name, t, source, str(news.pictures[t])) for t in (INPUT, STAGE1, RESULT)]
                        captions = [(file, f"{t}, {name}" if len(paths) > 1 else t) for name, t, _, file in show]
                        lines = "\n".join(asked.command(path.name) for path in paths)
                        change |= {
                            shown: list(show),
                            results: gr.update(value=list(ready), visible=True),
                            hint: gr.update(visible=True),
                            stages: gr.update(value=captions, visible=True),
                            command: gr.update(value=lines, visible=True),
                        }
                    yield change

        def by_script(
            picture, preset, task, realism, upscale, seed, solver, steps, faces=False
        ) -> Iterator[str | None]:
            """Restores a picture: as the page does, and as the command line does with the same settings."""
            with told():
                (path,) = checked([picture] if picture else None)
                for news in shop.restore(path, wish(preset, task, realism, upscale, seed, solver, steps, faces)):
                    yield news.result and str(news.result)  # nothing until the end; a script may cancel before

        def checked(paths: list[str] | None) -> list[Path]:
            """Raises:
            UserError: none, too many, or none of the visitor's.
            """
            if not paths:
                raise UserError("there is no photo yet; drop one, or choose an example")
            if len(paths) > limits.pictures:
                raise UserError(f"{len(paths)} photos are too many at once; drop at most {limits.pictures}")
            return [uploaded(path, shop.folder) for path in paths]

        def empty() -> tuple[Any, ...]:
            """Of `after`."""
            gone = gr.update(visible=False)
            return gr.update(value=None, visible=False), gone, gr.update(value=None, visible=False), gone, []

        def adapt(name: str, solver: str) -> tuple[Any, ...]:
            """Task and guidance as the preset, and the solver, have them."""
            with told():
                offer = shop.models.offer(name)
                defaults = shop.models.defaults(offer, **({} if solver == OWN else {"solver": solver}))
                choices = gr.update(choices=[OWN, *offer.tasks], value=OWN, interactive=bool(offer.tasks))
                return choices, realism(defaults.guidance_scale)

        def take(event: gr.SelectData) -> list[str]:
            """A copy of an example, as if it had been uploaded."""
            example = examples[event.index].path
            return [str(shutil.copy(example, new_place(shop.folder) / example.name))]

        def compare(show: list, event: gr.SelectData) -> tuple[str, str]:
            _, _, source, picture = show[event.index]
            return source, picture

        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        after = [results, hint, stages, command, shown]
        files.upload(look, files, [slider, status, *after], **quiet)
        files.clear(lambda: (None, line(READY), *empty()), None, [slider, status, *after], queue=False, **quiet)
        samples.select(take, None, files, **quiet).then(look, files, [slider, status, *after], **quiet)
        stages.select(compare, shown, slider, **quiet)
        for control in (preset, solver):
            control.input(adapt, [preset, solver], [task, guidance], **quiet)

        def buttons(running: bool) -> tuple[Any, ...]:
            return gr.update(visible=not running), gr.update(visible=running)

        limit = {"concurrency_limit": limits.concurrency, "concurrency_id": JOB}
        started = go.click(
            lambda: (*buttons(True), line("Waiting …", 0.0)), None, [go, stop, status],
            js=SHOW, queue=False, **quiet,
        )  # fmt: skip
        run = started.then(
            work, [files, *wishes], [slider, status, *after], api_visibility="private", show_progress="minimal",
            show_progress_on=status, **limit,
        )  # fmt: skip
        for end in (run.success, run.failure):
            end(lambda: buttons(False), None, [go, stop], queue=False, **quiet)
        # In two turns: what the run had said before it was stopped may arrive after the first.
        stopped = stop.click(lambda: buttons(False), None, [go, stop], cancels=[run], queue=False, **quiet)
        stopped.then(lambda: line("Stopped."), None, status, queue=False, **quiet)

        with gr.Row(visible=False):  # what scripts use
            picture, restored, script = gr.File(label="picture"), gr.File(label="restored"), gr.Button()
            script.click(by_script, [picture, *wishes], restored, api_name=JOB, **limit)
    return page.queue(max_size=limits.queue, default_concurrency_limit=4)


def to_compare(news: News) -> tuple[str, str] | None:
    """What is on both sides of the slider."""
    right = news.pictures.get(RESULT) or news.pictures.get(NOW) or news.pictures.get(INPUT)
    return (str(news.pictures[INPUT]), str(right)) if right else None


def line(text: str, share: float | None = None) -> str:
    """The sentence below the picture, with a bar while something goes on."""
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<div role="status">{html.escape(text)}{bar}</div>'


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong is told on the page in a sentence."""
    try:
        yield
    except UserError as error:
        raise sentence(str(error)) from None
    except gr.Error:
        raise
    except Exception as error:
        log.exception("the page failed")
        raise sentence("something went wrong here; the log of the server tells what") from error


def sentence(text: str) -> gr.Error:
    return gr.Error(html.escape(text, quote=False), duration=None, title="That did not work", print_exception=False)
