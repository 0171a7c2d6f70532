"""The most bytes that live at once, of what runs on shapes."""

import torch

from workers.profile.live_bytes import LiveBytes

META = torch.device("meta")


def test_what_nothing_holds_any_more_is_not_counted() -> None:
    given = torch.empty(1000, device=META)
    with LiveBytes() as live:
        one = given + 1
        assert live.peak == 4000
        two = one * 2
        del one
        three = two.view(10, 100).to(torch.float64)  # a view is of the same bytes
        del two
        for _ in range(5):
            three = three + 1
    assert live.peak == 16000


def test_what_was_there_before_is_not_counted() -> None:
    layer = torch.nn.Linear(1000, 1000, device=META)
    with torch.no_grad(), LiveBytes() as live:
        layer(torch.empty(1, 1000, device=META))
    assert live.peak < 100_000
