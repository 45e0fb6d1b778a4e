"""Opens a page for restoring photos in a browser: `diffbir web`. By default it uses the embedded model, and only this
computer can see it.

Uploads and results lie in a private folder, and are deleted after a while and when the page is closed down.
"""

import argparse
from pathlib import Path

from diffbir.command import add_machine, between
from diffbir.utils.cli import UserError, entry_point

PASSWORD = "--password-file FILE, whose first line is the password"


def parser(name: str | None = None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(name, description=__doc__, add_help=False)

    page = p.add_argument_group("the page")
    page.add_argument(
        "--preset",
        nargs="+",
        metavar="NAME",
        help="models to choose from, by name or YAML; the first is chosen (default: the embedded one, and those whose "
        "weights are here)",
    )
    page.add_argument(
        "--examples",
        type=Path,
        metavar="FOLDER",
        help="photos to try the page with (default: those of the repository, where they are here)",
    )
    page.add_argument("--open", action="store_true", help="open it in the browser")

    reach = p.add_argument_group("who can see it")
    reach.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is every computer around (default: this one alone)")
    reach.add_argument(
        "--port", type=between(1, 65535), help="where it listens (default: the first free one from 7860 on)"
    )
    reach.add_argument(
        "--share",
        action="store_true",
        help="a public address for a week, by way of Gradio's servers; needs a password",
    )
    reach.add_argument("--user", default="diffbir", help="to sign in with the password (default: %(default)s)")
    reach.add_argument("--password-file", type=Path, metavar="FILE", help="its first line is a password for the page")

    limits = p.add_argument_group("limits")
    limits.add_argument(
        "--max-mb", type=between(1, 4096), default=50, metavar="N", help="of an uploaded file (default: %(default)s)"
    )
    limits.add_argument(
        "--max-megapixels",
        type=between(1, 4096),
        default=16,
        metavar="N",
        help="of a picture and of a result (default: %(default)s)",
    )
    limits.add_argument(
        "--max-pictures", type=between(1, 1000), default=20, metavar="N", help="at once (default: %(default)s)"
    )
    limits.add_argument(
        "--concurrency",
        type=between(1, 64),
        default=1,
        metavar="N",
        help="pictures that are restored at the same time (default: %(default)s)",
    )
    limits.add_argument(
        "--queue", type=between(1, 4096), default=16, metavar="N", help="visitors that may wait (default: %(default)s)"
    )
    limits.add_argument(
        "--keep",
        type=minutes,
        default=60.0,
        metavar="MINUTES",
        help="after which uploads and results are deleted (default: %(default)g)",
    )

    add_machine(p.add_argument_group("machine"))
    other = p.add_argument_group("other")
    other.add_argument("-h", "--help", action="help", help="show this page")
    return p


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{value:g} is no time to keep files for")
    return value


def read_password(args: argparse.Namespace) -> str | None:
    """Raises:
    UserError: it can't be read, or there is none and the page would be public.
    """
    if args.password_file is None:
        if args.share:
            raise UserError(f"--share makes the page public, and is refused without a password; give {PASSWORD}")
        return None
    try:
        password = args.password_file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--password-file {args.password_file} cannot be read ({error}); give a text file") from error
    if not password:
        raise UserError(f"--password-file {args.password_file} is empty; its first line is the password")
    return password


@entry_point
def main(argv: list[str] | None = None, name: str | None = None) -> int:
    """The command line of the page; help calls it `name`."""
    args = parser(name).parse_args(argv)
    password = read_password(args)
    from diffbir.web.serve import serve  # torch and gradio take long to load

    return serve(args, password)
