"""What a command line offers, by name and without torch; the modules that need torch say what each name means."""

PRECISIONS = ("fp32", "fp16", "bf16")  # utils.precision
ALIGNMENTS = ("wavelet", "adain", "none")  # utils.color
NEVER, AUTOMATIC = 0, -1  # sides of windows that aren't pixels; model.sampling.tiling
FORMATS = ("png", "jpg", "webp", "tiff", "bmp", "avif", "same")  # folder.writing
