"""The page in a real browser without a window, against the real server with the embedded model."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffbir.command import main
from diffbir.utils.image import read_rgb

pytest.importorskip("gradio", reason="needs gradio: pip install '.[web]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 120  # seconds; a loaded machine is slow
MOST_MB = 20

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address. At the end, SIGTERM leaves nothing of the uploads behind."""
    temporary = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "diffbir", "web", "--device", "cpu", "--max-mb", str(MOST_MB)]
    env = {**os.environ, "TMPDIR": str(temporary), "no_proxy": "127.0.0.1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        lines = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
        found = next(filter(None, lines), None)
        assert found, "the server ended"
        yield found[0]
        assert list(temporary.glob("diffbir-web-*/uploads/*"))
        process.terminate()
        assert process.wait(PATIENCE) == 128 + 15
    assert list(temporary.glob("diffbir-web-*")) == []


@pytest.fixture(scope="module")
def browser(server):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page anew, as often as it is called."""
    contexts = []

    def open_page(**settings):
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(server)
        page.wait_for_selector("#examples img")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Two crops: a JPEG with EXIF, and a PNG of 16 bits with a profile-less alpha."""
    folder, exif = tmp_path_factory.mktemp("photos"), Image.Exif()
    exif[0x010E] = "a village"
    rgb = read_rgb(ROOT / "inputs/demo/village-phone.jpg")
    Image.fromarray(rgb[:40, :51]).save(folder / "village.jpg", quality=80, exif=exif)
    Image.fromarray(rgb[50:90, 50:90, 0].astype(np.uint16) * 257).save(folder / "grey.png")
    return [folder / "village.jpg", folder / "grey.png"]


def upload(page, path: Path) -> None:
    page.set_input_files("#files input[type=file]", path)


def wait_for(page, words: str) -> str:
    """The line below the picture, once it has these words."""
    page.wait_for_function("words => document.querySelector('#status [role]')?.innerText.includes(words)", arg=words)
    return page.inner_text("#status [role]")


def download(page, folder: Path) -> Path:
    with page.expect_download() as started:
        page.click("#results a")
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path


def by_command_line(line: str, photo: Path, output: Path) -> bytes:
    """What the command line that the page shows makes of the photo."""
    words = shlex.split(line)
    assert words[:5] == ["diffbir", "--input", photo.name, "--output", "RESTORED"]
    assert main(["--input", str(photo), "--output", str(output), "--device", "cpu", *words[5:]]) == 0
    return (output / f"{photo.stem}.png").read_bytes()


def set_number(page, control: str, value: float) -> None:
    page.fill(f"#{control} input[type=number]", str(value))
    page.press(f"#{control} input[type=number]", "Tab")


def test_a_photo_is_restored_compared_and_downloaded_as_by_the_command_line(visit, photos, tmp_path):
    page = visit()
    assert page.inner_text("h1") == "DiffBIR"
    assert not page.is_visible("#stop")
    assert page.locator("#faces").is_visible()
    upload(page, photos[0])
    wait_for(page, "village.jpg is here")
    set_number(page, "guidance", 60)
    set_number(page, "upscale", 1.5)
    page.click("#go")
    wait_for(page, "76x60 pixels in")

    after = page.locator("#slider img").nth(1)
    before = after.get_attribute("style")
    box = page.locator("#slider [data-testid=slider] .icon-wrap").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 5, steps=5)
    page.mouse.up()
    moved = after.get_attribute("style")
    places = [float(re.search(r"0px 0px 0px ([\d.]+)%", style)[1]) for style in (before, moved)]
    assert places[0] == pytest.approx(50, abs=1)
    assert places[1] > 60

    source = after.get_attribute("src")
    page.click("#stages button >> nth=1")  # stage 1 in place of the result
    page.wait_for_function("was => document.querySelectorAll('#slider img')[1].src != was", arg=source)
    line = page.input_value("#command textarea")
    assert "--guidance-scale 4667 " in line + " "
    file = download(page, tmp_path)
    assert file.name == "village_restored.png"
    assert file.read_bytes() == by_command_line(line, photos[0], tmp_path / "out")
    page.wait_for_selector("#go", state="visible")


def test_two_users_at_once_get_each_their_own(visit, photos, tmp_path):
    pages = [visit(), visit()]
    for page, photo in zip(pages, photos, strict=True):
        upload(page, photo)
        wait_for(page, "is here")
    for page in pages:
        page.click("#go")
    for page, photo in zip(pages, photos, strict=True):
        assert photo.name in wait_for(page, "pixels in")
        (tmp_path / photo.stem).mkdir()
        file = download(page, tmp_path / photo.stem)
        line = page.input_value("#command textarea")
        assert file.read_bytes() == by_command_line(line, photo, tmp_path / photo.stem / "out")
    assert Image.open(file).mode.startswith("I")  # 16 bits a channel


def test_an_example_is_sampled_before_ones_eyes_and_stopped(visit, server, photos):
    page = visit()
    page.click("#examples button >> nth=2")
    wait_for(page, "hedgehog-small.jpg is here")
    page.get_by_text("More", exact=True).click()
    page.click("#solver input")
    page.get_by_role("option", name="ddpm", exact=True).click()
    page.wait_for_function("document.querySelector('#guidance input').value == '70'")  # the chain's own
    set_number(page, "steps", 100)
    page.click("#go")
    wait_for(page, "step 1 of 100")
    page.wait_for_selector("#slider img[src*='now']")
    page.click("#stop")
    assert wait_for(page, "Stopped.") == "Stopped."
    page.wait_for_selector("#go", state="visible")
    start = time.monotonic()
    script(server, photos[0])  # the one place is free again
    assert time.monotonic() - start < 60
    assert page.inner_text("#status [role]") == "Stopped."


def test_a_text_that_is_called_a_picture_is_refused_in_a_sentence(visit, tmp_path):
    page = visit()
    (tmp_path / "text.png").write_text("no picture")
    upload(page, tmp_path / "text.png")
    sentence = "text.png is not an image that can be read here; replace or remove it"
    assert wait_for(page, "text.png") == sentence
    page.wait_for_selector(f"[data-testid=toast-body] >> text={sentence}")
    page.click("#go")
    page.wait_for_selector("#go", state="visible")
    assert wait_for(page, "text.png") == sentence
    assert "Traceback" not in page.content()


def test_200_mb_are_refused_in_a_sentence_by_the_page_and_by_the_server(visit, server, tmp_path):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(200 << 20)  # of no room on the disk
    page = visit()
    upload(page, large)
    page.wait_for_selector("[data-testid=toast-body] >> text=exceed the maximum allowed size of 20")
    with large.open("rb") as file:
        answer = httpx.post(f"{server}/gradio_api/upload", files={"files": file}, timeout=PATIENCE)
    assert answer.status_code == 413
    assert "exceeded maximum allowed size" in answer.text


def test_it_is_dark_where_the_visitor_wants_it_and_fits_a_phone(visit):
    phone = visit(viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True, has_touch=True)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    assert phone.evaluate(brightness) < 150
    desk = visit(color_scheme="light")
    assert desk.evaluate(brightness) > 600
    beside = desk.locator("#slider").bounding_box()["x"] - desk.locator("#files").bounding_box()["x"]
    below = phone.locator("#slider").bounding_box()["x"] - phone.locator("#files").bounding_box()["x"]
    assert beside > 300
    assert below == pytest.approx(0, abs=2)


def script(server: str, photo: Path, **settings) -> Path:
    from gradio_client import Client, handle_file

    client = Client(server, verbose=False)
    return Path(client.predict(handle_file(photo), **settings, api_name="/restore"))


def test_a_script_restores_as_the_command_line_does(server, photos, tmp_path):
    restored = script(server, photos[0], realism=70, solver="ddim", steps=2, seed=5)
    line = f"diffbir --input {photos[0].name} --output RESTORED --guidance-scale 3000 --solver ddim --steps 2 --seed 5"
    assert restored.read_bytes() == by_command_line(line, photos[0], tmp_path / "out")


def test_a_script_can_cancel(server, photos):
    from gradio_client import Client, handle_file

    job = Client(server, verbose=False).submit(
        handle_file(photos[0]), solver="ddpm", steps=100, upscale=4, api_name="/restore"
    )
    deadline = time.monotonic() + PATIENCE
    while not job.outputs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.outputs()
    job.cancel()
    start = time.monotonic()
    script(server, photos[0])
    assert time.monotonic() - start < 60  # 100 steps of this size take longer


@pytest.mark.parametrize(
    "settings, words",
    [({"upscale": 8, "seed": -1}, "less than minimum"), ({"preset": "/etc/passwd"}, "not in the list of choices")],
)
def test_a_script_is_told_what_is_wrong(server, photos, settings, words):
    with pytest.raises(Exception, match=words):
        script(server, photos[0], **settings)


def test_no_path_of_a_visitor_is_opened(server):
    rest = ["mini", "standard", 100, 1, 0, "standard", 0]
    secret = ROOT / "inputs/demo/hedgehog-small.jpg"
    client = httpx.Client(base_url=f"{server}/gradio_api", timeout=PATIENCE)
    with client:
        for path in (secret, "/etc/passwd", f"../../..{secret}", f"file://{secret}", "http://example.com/a.png"):
            picture = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
            answer = client.post("/call/restore", json={"data": [picture, *rest]})
            if "://" in str(path):
                assert answer.status_code == 403
                continue
            events = client.get(f"/call/restore/{answer.json()['event_id']}").text
            assert "event: error" in events
            assert "event: complete" not in events
        for path in (secret, "/etc/passwd", "..%2f..%2f..%2f..%2fetc%2fpasswd", "pyproject.toml", "http://example.com"):
            assert client.get(f"/file={path}").status_code in (403, 404)


def test_it_listens_on_this_computer_alone(server):
    import socket

    port = int(server.rpartition(":")[2])
    hosts = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {"127.0.0.1"}
    for host in hosts:
        with pytest.raises(OSError), socket.create_connection((host, port), timeout=2):
            pass
