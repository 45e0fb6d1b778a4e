"""Where things are that configurations saved by older runs name; `utils.config` looks targets up here.

A class that left its module for another one comes first, then whole modules.
"""

CLASSES = {
    "dataset.data_module.DrawSampler": "dataset.order.DrawSampler",
    "dataset.files.Captions": "dataset.sources.tables.Captions",
    "dataset.files.PairFolders": "dataset.sources.pairs.PairFolders",
    "dataset.files.Table": "dataset.sources.tables.Table",
    "dataset.kernels.Blur": "dataset.degradations.blur.Blur",
    "dataset.kernels.RandomBlur": "dataset.degradations.blur.RandomBlur",
    "dataset.kernels.RandomSinc": "dataset.degradations.blur.RandomSinc",
    "dataset.noise.CameraNoise": "dataset.degradations.camera.CameraNoise",
    "dataset.noise.RandomCameraNoise": "dataset.degradations.camera.RandomCameraNoise",
    "model.restorer.Options": "model.options.Options",
    "utils.callbacks.ExportWeights": "model.training.ema.ExportWeights",
    "utils.guards.Checkpoint": "model.training.checkpointing.Checkpoint",
    "utils.guards.WholeCheckpoints": "model.training.checkpointing.WholeCheckpoints",
}

MODULES = {
    "dataset.batched": "dataset.degradations.batched",
    "dataset.files": "dataset.sources.files",
    "dataset.jpeg": "dataset.degradations.jpeg",
    "dataset.jpeg_torch": "dataset.degradations.jpeg_torch",
    "dataset.kernels": "dataset.degradations.kernels",
    "dataset.levels": "dataset.degradations.levels",
    "dataset.noise": "dataset.degradations.noise",
    "dataset.recipes": "dataset.degradations.recipes",
    "dataset.resize": "dataset.degradations.resize",
    "dataset.shards": "dataset.sources.shards",
    "dataset.sources": "dataset.pairs",
    "model.attention": "model.networks.attention",
    "model.autoencoder": "model.networks.autoencoder",
    "model.cache": "model.sampling.cache",
    "model.condition": "model.networks.condition",
    "model.control": "model.networks.control",
    "model.denoiser": "model.sampling.denoiser",
    "model.diffusion": "model.sampling.diffusion",
    "model.first_stage": "model.training.autoencoder",
    "model.guidance": "model.sampling.guidance",
    "model.layers": "model.networks.layers",
    "model.prior": "model.training.prior",
    "model.rrdbnet": "model.networks.rrdbnet",
    "model.scunet": "model.networks.scunet",
    "model.solvers": "model.sampling.solvers",
    "model.stage1": "model.training.stage1",
    "model.stage2": "model.training.stage2",
    "model.striped": "model.sampling.striped",
    "model.swinir": "model.networks.swinir",
    "model.text": "model.networks.text",
    "model.tiling": "model.sampling.tiling",
    "model.trainable": "model.training.base",
    "model.unet": "model.networks.unet",
    "utils.callbacks": "model.training.logging",
    "utils.guards": "model.training.guards",
    "utils.sharding": "model.training.sharding",
    "utils.training": "model.training.run",
}


def today(target: str) -> str:
    """The dotted name that a class has today, without the namespace."""
    if target in CLASSES:
        return CLASSES[target]
    module, _, name = target.rpartition(".")
    return f"{MODULES[module]}.{name}" if module in MODULES else target
