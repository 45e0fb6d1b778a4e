"""What `diffbir web` does once its flags are right."""

import argparse
import signal
import threading
from pathlib import Path

from diffbir.folder.processes import Terminated, stoppable
from diffbir.utils.cli import UserError
from diffbir.web.addresses import NoAddresses
from diffbir.web.uploads import UPLOADS, private_folder

MISSING = "the page needs another package; pip install 'diffbir[web]'"


def serve(args: argparse.Namespace, password: str | None) -> int:
    """Shows the page until Ctrl-C or SIGTERM.

    Raises:
        UserError: a preset can't be used, a package is missing, or the port is taken.
    """
    try:
        with stoppable(), private_folder(60 * args.keep) as folder:
            return show(args, password, folder)
    except Terminated:
        return 128 + signal.SIGTERM


def show(args: argparse.Namespace, password: str | None, folder: Path) -> int:
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError as error:
        raise UserError(MISSING) from error
    from diffbir.web.examples import find_examples
    from diffbir.web.models import Models
    from diffbir.web.page import Limits, build_page
    from diffbir.web.style import CSS, theme
    from diffbir.web.workshop import Workshop

    models = Models(args.preset, args.device, args.precision, args.offload)
    shop = Workshop(models, folder / UPLOADS, args.max_megapixels, args.concurrency)
    thumbnails = folder / "thumbnails"
    thumbnails.mkdir()
    gr.set_static_paths(thumbnails)
    examples = list(find_examples(args.examples, thumbnails))
    page = build_page(shop, Limits(args.max_pictures, args.queue, args.concurrency), examples)
    try:
        _, address, public = page.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            auth=(args.user, password) if password else None,
            inbrowser=args.open,
            max_file_size=f"{args.max_mb}mb",
            theme=theme(),
            css=CSS,
            footer_links=["api", "settings"],
            app_kwargs={"middleware": [Middleware(NoAddresses)]},
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"the page cannot be served ({error}); give another --port or --host") from error
    try:
        print(f"The page is at {public or address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
        shop.close()
    return 0
