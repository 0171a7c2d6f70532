"""Frozen records, and the ranges of their fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=100_000)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**40)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # sha256


class Data(BaseModel):
    """A frozen record whose fields are exactly these, of exactly these types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
