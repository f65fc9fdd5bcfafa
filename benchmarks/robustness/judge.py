"""Verdicts: ok, refused with the reason, or wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator

from ippro_tp import IPPROError

OK, REFUSED, WRONG, NONE = "ok", "refused", "WRONG", "·"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A verdict and what there is to say about it."""

    verdict: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.note}" if self.note else self.verdict


class WrongError(Exception):
    """A check found something that is not as it should be."""


class Skipped(Exception):  # no error
    """There is nothing to check here; says why."""


class Refused(Exception):  # the package says that it does not do this
    """What the package says."""


class _OutOfTime(BaseException):
    """Nothing may catch this but the judge."""


@contextlib.contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


LIMIT = 180
"""Seconds that one check may take."""


def judged(check: Callable[[], str | None]) -> Cell:
    """Run a check; errors of the package that explain themselves are refusals, all others are wrong."""
    try:
        with warnings.catch_warnings(), _within(LIMIT):
            warnings.simplefilter("ignore")
            return Cell(OK, check() or "")
    except _OutOfTime:
        return Cell(WRONG, f"not done in {LIMIT} s")
    except Skipped as why:
        return Cell(NONE, str(why))
    except Refused as why:
        return Cell(REFUSED, str(why))
    except WrongError as why:
        return Cell(WRONG, str(why))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = "/ippro_tp/" in frames[-1].filename
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, IPPROError) or (
            own and isinstance(error, (ValueError, TypeError, NotImplementedError))
        ):
            return Cell(REFUSED, message)
        place = next((f for f in reversed(frames) if "/ippro_tp/" in f.filename), frames[-1])
        return Cell(WRONG, f"{message} ({place.filename.split('/')[-1]}:{place.lineno})")
