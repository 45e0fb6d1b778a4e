"""The page of `--compare`: input, stage 1 and result of every image under a slider, in one file that opens anywhere."""

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path

from diffbir.folder.manifest import DONE, Line
from diffbir.folder.previews import TITLES, has_previews, preview
from diffbir.utils.files import replacing

NAME = "compare.html"
FIGURES = {  # key of the manifest -> what the page calls it
    "output": "name", "seconds": "seconds", "distance": "change (levels of 255)", "pixels": "pixels",
    "bytes": "bytes of the input", "finished": "finished",
}  # fmt: skip


def write_gallery(folder: Path, previews: str, lines: Iterable[Line]) -> Path:
    """Writes OUTPUT/compare.html of the images that have previews below OUTPUT/`previews`, one after the other."""
    path = folder / NAME
    head, tail = TEMPLATE.split("<!-- cards -->")
    choices = "".join(f'<option value="{key}">{title}</option>' for key, title in FIGURES.items())
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(head.replace("<!-- figures -->", choices))
        for line in lines:
            base = folder / previews / line["output"]
            if line["status"] == DONE and has_previews(base):
                file.write(card(line, {title: preview(base, title) for title in TITLES}))
        file.write(tail)
    return path


def card(line: Line, pictures: dict[str, Path]) -> str:
    """One image: its pictures as data, its figures as attributes that scripts sort by."""
    width, height = line["result_size"]
    figures = {**line, "pixels": width * height}
    data = {key: figures.get(key, "") for key in FIGURES}
    name = text(line["output"])
    images = "".join(
        f'<img class="{title.replace(" ", "")}" alt="{title} of {name}" '
        f'src="data:image/jpeg;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
        for title, picture in pictures.items()
    )
    facts = (
        f"{line['size'][0]}x{line['size'][1]} to {width}x{height}, {line['seconds']:g} s, change {line['distance']:g}, "
        f"seed {line['seed']}"
    )
    settings = text(json.dumps(line["settings"], indent=1, ensure_ascii=False))
    attributes = " ".join(f'data-{key}="{text(str(value))}"' for key, value in data.items())
    return (
        f'<article {attributes}><h2>{name}</h2><div class="pair" style="aspect-ratio:{width}/{height}">{images}'
        f'<input type="range" min="0" max="100" value="50" aria-label="slider of {name}"></div>'
        f"<p>{text(facts)}</p><details><summary>settings</summary><pre>{settings}</pre></details></article>\n"
    )


def text(value: str) -> str:
    return html.escape(value.encode("utf-8", "backslashreplace").decode())


TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Restored images</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem; background: #f4f4f2; color: #222; }
header { display: flex; gap: 1rem; flex-wrap: wrap; align-items: center; position: sticky; top: 0; z-index: 2;
  background: #f4f4f2; padding: .5rem 0; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
article { background: #fff; padding: .75rem; border-radius: 6px; min-width: 0; }
h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; }
pre { overflow: auto; font-size: 12px; }
.pair { position: relative; overflow: hidden; max-height: 85vh; --at: 50%; }
.pair img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; display: none; }
.pair img.left, .pair img.right { display: block; }
.pair img.left { z-index: 1; clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.pair::after { content: ""; position: absolute; z-index: 1; inset: 0 auto 0 var(--at); width: 2px; background: #fff; }
.pair input { position: absolute; inset: 0; z-index: 1; width: 100%; height: 100%; margin: 0; opacity: 0;
  cursor: ew-resize; }
</style>
<header>
<label>left <select id="left"><option value="input">input<option value="stage1">stage 1<option value="result">result
</select></label>
<label>right <select id="right"><option value="result">result<option value="stage1">stage 1<option value="input">input
</select></label>
<label>sorted by <select id="key"><!-- figures --></select></label>
<label><input type="checkbox" id="down"> largest first</label>
<span id="count"></span>
</header>
<main>
<!-- cards -->
</main>
<script>
const by = id => document.getElementById(id), main = document.querySelector("main");
const cards = [...main.querySelectorAll("article")];
function show() {
  for (const image of main.querySelectorAll("img")) {
    const kind = image.classList[0];
    image.classList.toggle("left", kind === by("left").value);
    image.classList.toggle("right", kind === by("right").value);
  }
}
function sort() {
  const key = by("key").value, sign = by("down").checked ? -1 : 1, number = x => x !== "" && !isNaN(x);
  const order = (a, b) => number(a) && number(b) ? a - b : a.localeCompare(b);
  cards.sort((a, b) => sign * order(a.dataset[key], b.dataset[key]));
  main.append(...cards);
}
main.addEventListener("input", event => {
  event.target.parentElement.style.setProperty("--at", event.target.value + "%");
});
for (const id of ["left", "right"]) by(id).addEventListener("change", show);
for (const id of ["key", "down"]) by(id).addEventListener("change", sort);
by("count").textContent = cards.length + " images";
show();
sort();
</script>
</html>
"""
