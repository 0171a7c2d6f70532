"""Whether what a worker gives as a job's pictures are such pictures; a pure look at names, dtypes and shapes."""

from collections.abc import Sequence

from protocol.job import Recipe
from protocol.pictures import MAX_PIXELS, PART_BYTES, PICTURES, SOUND, SOUND_RATE
from protocol.tensors import Tensor

Shape = Sequence[int]
MOST_LARGER = 64  # times as many pixels as a job asks for: of pipelines that enlarge


def frames_at_most(recipe: Recipe) -> int:
    """Return how many pictures, or frames of videos, a job gives at most: decoders may round frames up."""
    return recipe.num_images * (2 * recipe.frames if recipe.frames else 1)


def fault_of_part(recipe: Recipe, number: int, tensors: Sequence[Tensor]) -> str:
    """Return what is wrong with a part of a job's pictures; empty if nothing is. All together fit a disk."""
    if number >= frames_at_most(recipe):
        return f"part {number} of at most {frames_at_most(recipe)} pictures"
    if [tensor.name for tensor in tensors] != [PICTURES]:
        return "a part without pictures"
    shape = tensors[0].shape
    if fault := _fault_of_tensor(tensors[0]):
        return fault
    if shape[1] * shape[2] > MOST_LARGER * recipe.width * recipe.height or (
        shape[0] > 1 and tensors[0].nbytes > PART_BYTES
    ):
        return f"a part of {list(shape)}, which is larger than any of this job's"
    return ""


def fault_of_last_part(tensors: Sequence[Tensor]) -> str:
    """Return what is wrong with what lies beside a job's last result: pictures, and a video's sound."""
    pictures = [tensor for tensor in tensors if tensor.name not in (SOUND, SOUND_RATE)]
    if [tensor.name for tensor in pictures] != [PICTURES]:
        return "no pictures"
    sound = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in tensors if tensor.name != PICTURES}
    if sound and sound != {SOUND: ("float32", 3), SOUND_RATE: ("int32", 1)}:
        return "sound that is none"
    return _fault_of_tensor(pictures[0])


def fault_of_all(recipe: Recipe, shapes: Sequence[Shape]) -> str:
    """Return what is wrong with a job's pictures as a whole, from the shapes of their parts."""
    sizes = {tuple(shape[1:3]) for shape in shapes}
    if len(sizes) > 1:
        return f"pictures of {len(sizes)} sizes"
    count, wanted = sum(shape[0] for shape in shapes), recipe.num_images
    if recipe.frames is None and count != wanted:
        return f"{count} pictures in place of {wanted}"
    if count % wanted or count > frames_at_most(recipe):
        return f"{count} frames for {wanted} videos of {recipe.frames}"
    return ""


def _fault_of_tensor(tensor: Tensor) -> str:
    shape = tensor.shape
    fits = tensor.dtype == "uint8" and len(shape) == 4 and shape[3] == 3 and min(shape) > 0
    if fits and shape[1] * shape[2] <= MAX_PIXELS:
        return ""
    return f"pictures of {tensor.dtype} {list(shape)}, which are no uint8 [n, height, width, 3]"
