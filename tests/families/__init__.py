"""A tiny pipeline of each class that we can build, with what a job of it brings; for the table of families."""

from tests.families import large_encoders, more_pictures, more_videos, pictures, videos
from tests.families.case import Case

CASES: dict[str, Case] = pictures.CASES | more_pictures.CASES | large_encoders.CASES | videos.CASES | more_videos.CASES
