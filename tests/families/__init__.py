"""A tiny pipeline of each class that we can build, with what a job of it brings; for the table of families."""

from tests.families import large_encoders, pictures, videos
from tests.families.case import Case

CASES: dict[str, Case] = pictures.CASES | videos.CASES | large_encoders.CASES
