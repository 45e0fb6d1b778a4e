"""What a run says: before it, of what is done already; and after it."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from diffbir.folder import gallery, manifest
from diffbir.folder.manifest import DONE, FAILED, PENDING, REFUSED, Line
from diffbir.folder.plan import TODO, Item, Plan, pixels_of
from diffbir.folder.previews import has_previews
from diffbir.folder.writing import failure

# Bytes a pixel of a photo in each format, roughly, for estimates.
DENSITY = {"png": 1.8, "tiff": 2.2, "bmp": 3.0, "jpg": 0.5, "webp": 0.35, "avif": 0.3, "same": 1.0}
PACE = ("preset", "stage", "solver", "steps", "precision")  # settings that seconds depend on


def say(sentence: str) -> None:
    print(printable(sentence), file=sys.stderr)


def printable(text: str) -> str:
    """Names of files needn't be valid Unicode; a terminal wants it."""
    return text.encode("utf-8", "backslashreplace").decode()


def tell_finished(plan: Plan) -> None:
    """How many results are there already, and how many of them with other settings."""
    done = [item for item in plan.items if item.state == DONE]
    if not done:
        return
    other = [item for item in done if item.differs]
    changes = Counter(f"{name} {then}, now {now}" for item in other for name, (then, now) in item.differs.items())
    text = f"{count(len(done), 'image')} finished before"
    if other:
        text += f"; {len(other)} of them with other settings ({'; '.join(c for c, _ in changes.most_common(3))})"
    say(f"{text}; --overwrite redoes them")


def dry_run(plan: Plan, output: Path, processes: int) -> None:
    """Every image with its sizes and what would be done with it, then the sum."""
    for item in plan.items:
        size, result = item.size, item.result_size(plan.settings)
        sizes = f"{size[0]}x{size[1]} -> {result[0]}x{result[1]}" if size and result else "no readable header"
        other = ", other settings" if item.differs else ""
        state = {TODO: "restore", DONE: f"finished{other}", REFUSED: f"refused: {item.reason}"}[item.state]
        print(printable(f"{item.source.name}  {sizes}  {output / item.output}  {state}"))
    todo = plan.todo
    pixels = sum(pixels_of(item, plan.settings) for item in todo)
    room = pixels * DENSITY[plan.settings.format]
    print(
        f"{len(todo)} of {count(len(plan.items), 'image')} to restore: {pixels / 1e6:.1f} megapixels, about "
        f"{room / 1e6:.0f} MB, {duration(plan, pixels, processes)}"
    )


def duration(plan: Plan, pixels: int, processes: int) -> str:
    """By what earlier images in this output folder took."""
    now = plan.settings.line(("", ""))
    like = [
        line["seconds"] / (line["result_size"][0] * line["result_size"][1])
        for line in plan.lines.values()
        if line["status"] == DONE and all(line["settings"].get(key) == now[key] for key in PACE)
    ]
    if not like:
        return "time unknown: no image in this folder was restored with such settings yet"
    seconds = median(like) * pixels / processes
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} min"


def finish(plan: Plan, output: Path, previews: str | None, errors: Sequence[str], stopped: int) -> int:
    """Puts the manifest in order, makes the page of `--compare`, and says what became of every image.

    Args:
        previews: folder of the pictures for the page; None for no page.
        errors: why processes ended early.
        stopped: status of a process that a signal ended, or 0.

    Returns:
        1 if an image of the run has no result, else 0.

    Raises:
        UserError: the folder can't be written to.
    """
    lines = manifest.read(output)
    own = [lines.get(item.output, {"output": item.output, "status": PENDING}) for item in plan.items]
    try:
        manifest.rewrite(output, lines.values())
        page = gallery.write_gallery(output, previews, own) if previews else None
    except OSError as error:
        raise failure(error, output / manifest.NAME) from error
    for line in own:
        if line["status"] in (FAILED, REFUSED):
            say(f"error: {line['error']}")
    for error in errors:
        say(f"error: {error}")
    done = [line for line in own if line["status"] == DONE]
    before = sum(item.state == DONE for item in plan.items)
    earlier = f" ({before} of them before)" if before else ""
    if page:
        without = sum(not has_previews(output / previews / line["output"]) for line in done)
        if without:
            say(f"{count(without, 'image')} restored before without --compare are not in it; --overwrite redoes them")
        print(printable(f"compare them in {page}"))
    print(printable(f"{len(done)} of {count(len(own), 'image')} restored{earlier}, in {output}"))
    tell_tasks(done, plan.items)
    tell_faces(done)
    if stopped:
        say("stopped; the same command goes on")
    return 0 if len(done) == len(own) and not errors else 1


def tell_tasks(done: Sequence[Line], items: Sequence[Item]) -> None:
    tasks = Counter(line["task"] for line in done if line.get("task"))
    if tasks:
        say("tasks that were chosen: " + ", ".join(f"{task} {number}" for task, number in sorted(tasks.items())))


def tell_faces(done: Sequence[Line]) -> None:
    """How many faces were found, and in which images none."""
    looked = [line for line in done if "faces" in line]
    if not looked:
        return
    faces = [face for line in looked for face in line["faces"]]
    without = [line["output"] for line in looked if not line["faces"]]
    kept = sum(not face["restored"] for face in faces)
    text = f"{count(len(faces), 'face')} in {count(len(looked) - len(without), 'image')}"
    text += f", {kept} left to the background's model" if kept else ""
    if without:
        text += f"; no face found in {count(len(without), 'image')} ({without[0]}{', ...' if len(without) > 1 else ''})"
    say(text)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
