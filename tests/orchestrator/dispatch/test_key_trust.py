"""How long a key's workers rest."""

from orchestrator.dispatch.key_trust import FIRST_SECONDS, MOST_SECONDS, KeyTrust
from orchestrator.principal import LOCAL_USER, KeyHolder


def test_each_failure_in_a_row_doubles_the_rest_and_work_ends_it() -> None:
    now = 0.0
    trust, box = KeyTrust(lambda: now), KeyHolder("box")
    rests = []
    for _ in range(12):
        trust.failed(box)
        trust.failed(box)  # several workers of a host that is gone are one failure
        assert trust.rests(box)
        due = trust.next_due()
        assert due is not None
        rests.append(due - now)
        now = due
        assert not trust.rests(box)
    assert rests[:3] == [FIRST_SECONDS, 2 * FIRST_SECONDS, 4 * FIRST_SECONDS]
    assert rests[-1] == MOST_SECONDS
    trust.failed(box)
    trust.worked(box)
    assert not trust.rests(box)
    assert trust.next_due() is None
    trust.failed(LOCAL_USER)
    assert not trust.rests(LOCAL_USER)
