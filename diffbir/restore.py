"""What the command line does once its flags are right."""

import argparse
import signal
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from diffbir.folder import begin, report
from diffbir.folder.captioner import Captioner
from diffbir.folder.inputs import find_sources
from diffbir.folder.plan import Plan, Settings, make_plan, split
from diffbir.folder.processes import (
    Silent,
    Team,
    Terminated,
    device_of,
    local_rank,
    parent_lives,
    run_devices,
    stoppable,
    team,
)
from diffbir.folder.prompts import Prompts, read_prompts
from diffbir.folder.restorers import AUTO, Faces, Restorers
from diffbir.folder.sizes import Target
from diffbir.folder.work import Share, work
from diffbir.folder.writing import check_format, check_output
from diffbir.model.networks.text import NullTextEncoder
from diffbir.model.options import Options
from diffbir.model.restorer import options_of
from diffbir.utils.cli import UserError
from diffbir.utils.decode import limited_to
from diffbir.utils.device import pick_device, pick_precision


@dataclass
class Job:
    """What all processes know.

    Args:
        shares: one for each process.
    """

    plan: Plan
    restorers: Restorers
    prompts: Prompts
    captioner: Captioner | None = None
    shares: list[Share] = field(default_factory=list)


def restore(args: argparse.Namespace) -> int:
    """Restores every image that the flags of `diffbir.command` name.

    Returns:
        0; 1 if some images failed; 130 or 143 after Ctrl-C or SIGTERM, from which the same command goes on.

    Raises:
        UserError: nothing to restore, a flag whose value can't be used, or a folder that can't be written to.
    """
    crew = team()
    try:
        with stoppable(), ExitStack() as until_done:
            if args.max_megapixels is not None:
                until_done.enter_context(limited_to(args.max_megapixels * 10**6))
            return run(args, crew, until_done)
    except Silent:
        return 1
    except Terminated:  # before the first image
        return 128 + signal.SIGTERM


def run(args: argparse.Namespace, crew: Team, until_done: ExitStack) -> int:
    output = Path(args.output).expanduser()
    job = crew.share(lambda: prepare(args, output, crew, until_done))
    if args.dry_run:
        if crew.rank == 0:
            report.dry_run(job.plan, output, max(crew.size, args.devices))
        return crew.leave(0)
    stopped, errors = 0, []
    try:
        errors = crew.gather("\n".join(compute(args, job, crew)))
    except (KeyboardInterrupt, Terminated) as stop:
        stopped = 128 + (signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
    if crew.rank:
        return stopped or crew.leave(0)
    code = report.finish(job.plan, output, args.compare and job.shares[0].compare, list(filter(None, errors)), stopped)
    return stopped or crew.leave(code)


def prepare(args: argparse.Namespace, output: Path, crew: Team, until_done: ExitStack) -> Job:
    """Everything that can go wrong before the first image, in the order in which it leaves least behind."""
    if crew.size > 1 and args.devices > 1:
        raise UserError("--devices starts processes, and torchrun has started some already; use one of them")
    if (args.long_side is not None and args.size is not None) or (
        args.upscale is not None and (args.long_side or args.size)
    ):
        raise UserError("--upscale, --long-side and --size exclude each other; give one")
    check_format(args.format)
    first = device_of(args.device, local_rank()) if max(crew.size, args.devices) > 1 else args.device
    device = pick_device(first)
    flags = {f.name: getattr(args, f.name) for f in fields(Options) if getattr(args, f.name) is not None}
    faces = None
    if args.faces:
        faces = Faces(args.face_preset, flags, args.face_threshold, args.only_center_face, args.face_detector)
    restorers = Restorers(
        args.preset, args.task, args.stage1, args.stage, pick_precision(args.precision, device), args.offload,
        tuple(args.overrides), tuple(args.lora), first, faces, args.compile,
    )  # fmt: skip
    options = options_of(restorers.config(), flags)
    settings = Settings(
        restorers.facts(), asdict(options), Target(args.long_side, args.size), args.format, args.quality, args.suffix,
        args.exif, args.captioner,
    )  # fmt: skip
    sources = find_sources(args.input, output)
    prompts = read_prompts(args.prompts, (options.prompt, options.negative_prompt), sources)
    batch = args.batch if args.batch is not None else 1 if device.type == "cpu" else 0
    plan = make_plan(sources, output, settings, prompts, args.overwrite, batch)
    job = Job(plan, restorers, prompts, Captioner(args.captioner) if args.captioner is not None else None)
    if unused := prompts.unused:
        report.say(f"--prompts {args.prompts}: no image is called {unused[0]} ({len(unused)} such rows)")
    if args.dry_run:
        return job
    check_output(output)
    processes = max(crew.size, args.devices)
    if plan.todo and processes == 1:  # a model that can't be built leaves no folder behind
        restorers.build()
    stages = begin.free_name("stages", plan) if args.save_stages else None
    compare = begin.free_name("compare", plan) if args.compare else None
    saved = begin.free_name("faces", plan) if args.save_faces else None
    begin.begin(plan, output, until_done, stages, compare, saved)
    for batches in split(plan, processes):
        job.shares.append(Share(output, plan.items, batches, settings, args.task == AUTO, stages, compare, saved))
    report.tell_finished(plan)
    return job


def compute(args: argparse.Namespace, job: Job, crew: Team) -> list[str]:
    """This process's share, or all that it starts processes for; returns what went wrong, as sentences."""
    if not job.plan.todo:
        return []
    if args.devices > 1:
        return run_devices(work_in_process, [(args.device, job, share) for share in job.shares])
    job.restorers.device = device_of(args.device, local_rank()) if crew.size > 1 else args.device
    try:
        restore_share(job, job.shares[crew.rank], crew.rank)
    except UserError as error:
        return [str(error)]
    return []


def work_in_process(device: str, job: Job, share: Share, rank: int) -> None:
    job.restorers.device = device_of(device, rank)
    restore_share(job, share, rank)


def restore_share(job: Job, share: Share, rank: int) -> None:
    """Raises:
    UserError: the model can't be built, or results can't be written.
    """
    if not share.batches:
        return
    restorer = job.restorers.build()
    textless = restorer.text_encoder is None or isinstance(restorer.text_encoder, NullTextEncoder)
    if rank == 0 and textless and (job.captioner or any(any(item.prompt) for item in job.plan.todo)):
        report.say("this model knows no text; prompts change nothing")
    captioner = None if textless else job.captioner
    if captioner:
        captioner.device = restorer.device
    work(share, job.restorers, rank, quiet=rank > 0, going_on=parent_lives, captioner=captioner)
