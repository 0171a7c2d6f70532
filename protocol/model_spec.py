"""The model of a stack, as a person named it, and what is added to it."""

from protocol.data import Data

DEMO = "demo"
PARTS = ("revision", "controlnet", "ip_adapter", "transformer")  # of a model, beside its name


class ModelSpec(Data):
    """A model and what is added to it; each a folder, a file or a hub id."""

    name: str = DEMO  # a folder, a hub id, or demo
    revision: str | None = None  # of a hub model: branch, tag or commit
    controlnet: str | None = None  # for jobs that bring a control image
    ip_adapter: str | None = None  # weights, as a path or OWNER/NAME/PATH on the hub
    transformer: str | None = None  # the denoiser's weights in one file, likewise
