"""What a skipped test says, and when it has failed."""

from __future__ import annotations

import pytest
from missing import CPU, EVERYTHING, GPU, is_failure, skip_without, told


def reason_of(what: str, detail: str = "") -> str:
    with pytest.raises(pytest.skip.Exception) as skipped:
        skip_without(what, detail)
    return f"Skipped: {skipped.value.msg}"


@pytest.mark.parametrize("what", ["Chromium", "small disk", "vLLM", GPU, CPU])
def test_only_another_device_may_be_missing_where_everything_is_required(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the test is marked with: one for a GPU that misses vLLM there has failed."""
    reason = reason_of(what, "no such file")
    monkeypatch.delenv(EVERYTHING, raising=False)
    assert not is_failure(reason)
    monkeypatch.setenv(EVERYTHING, "1")
    assert is_failure(reason) == (what not in (GPU, CPU))
    assert is_failure("Skipped: for no reason that is known here")


def test_the_last_lines_count_and_say_how_to_get_it() -> None:
    reasons = [reason_of("vLLM"), reason_of("Chromium"), reason_of("vLLM", "again"), "Skipped: so"]
    assert told(reasons) == [
        "2 not run: no vLLM; make setup",
        "1 not run: no Chromium; apt-get install chromium, or CHROMIUM=PATH make test",
        "1 not run: so",
    ]
