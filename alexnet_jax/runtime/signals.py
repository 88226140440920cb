"""SIGINT and SIGTERM: raised where nothing is unsaved, collected while training, deferred while processes start."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_S = 1.5  # after a signal, a compilation may take so long

_nothing_unsaved = False  # whether this process may exit at once, see `exit_while_blocked`


def _in_main_thread() -> bool:
    """Return whether this thread may set signal handlers; a notebook's worker thread may not."""
    return threading.current_thread() is threading.main_thread()


class Stopped(KeyboardInterrupt):
    """A signal in a block of `raised_signals`; no `Exception`, so that it is not reported as a corrupt file."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


@contextlib.contextmanager
def _unsaved(state: bool) -> Iterator[None]:
    """Note whether the block has something to save; a Stopped leaves the note, because the process ends next."""
    global _nothing_unsaved
    before, _nothing_unsaved = _nothing_unsaved, not state
    try:
        yield
    except Stopped:
        before = _nothing_unsaved
        raise
    finally:
        _nothing_unsaved = before


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Raise Stopped at a SIGINT or SIGTERM of the block, which has nothing to save."""

    def handle(number, frame):
        raise Stopped(number)

    if not _in_main_thread():
        yield
        return
    with _unsaved(False):
        handlers = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class Signals(list[int]):
    """The signals that a block of `collected_signals` has received."""

    raises = False

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Raise Stopped at a signal of this block, in addition: it may wait for long."""
        self.raises = True
        try:
            yield
        finally:
            self.raises = False


@contextlib.contextmanager
def collected_signals() -> Iterator[Signals]:
    """Yield a list that receives the first SIGINT and SIGTERM of the block; a second one acts as before the block.

    If the block ends without an exception, the first one then acts as before the block.
    """
    received = Signals()
    handlers: dict[int, Any] = {}

    def handle(number, frame):
        received.append(number)
        signal.signal(number, handlers[number])
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving a checkpoint and exiting; press again to exit immediately\n".encode())
        if received.raises:
            raise Stopped(number)

    with _unsaved(True):
        if _in_main_thread():
            handlers.update({number: signal.signal(number, handle) for number in STOP_SIGNALS})
        try:
            yield received
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM at the end of the block; the processes that it starts never receive them.

    A process that is half started when its parent stops, or that Ctrl-C reaches too, dies with a traceback.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # which a new process inherits
    received: list[int] = []
    handlers: dict[int, Any] = {}
    if _in_main_thread():  # another thread may take the signal, and Python then handles it in this one
        handlers = {n: signal.signal(n, lambda number, _: received.append(number)) for n in STOP_SIGNALS}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
    for number in received:
        signal.raise_signal(number)


def exit_at_signals() -> None:
    """Exit with code 130 or 143 at SIGINT or SIGTERM, and remove temporary folders; a command calls it first.

    If a compilation takes longer than `EXIT_S`, the process exits in it, without removing them.
    """

    def handle(number, frame):
        global _nothing_unsaved
        _nothing_unsaved = False  # to remove the folders may take longer
        atexit.register(_exit, 128 + number)
        sys.exit(128 + number)

    global _nothing_unsaved
    _nothing_unsaved = True
    for stop in STOP_SIGNALS:
        signal.signal(stop, handle)
    exit_while_blocked(EXIT_S, lambda number: os._exit(128 + number))


def _exit(code: int) -> None:
    """Exit without the rest of the interpreter's exit, in which threads of XLA that still compute may crash."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_while_blocked(seconds: float, exit_process: Callable[[int], Any]) -> None:
    """Exit from another thread if Stopped cannot be raised for some seconds after a signal, and nothing is unsaved.

    Python handles a signal when a function of C++ returns, and a compilation is one that takes up to minutes.

    Args:
      exit_process: takes the signal's number and exits.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)

    def watch():
        while True:
            number = os.read(receiver, 1)[0]
            if number in STOP_SIGNALS and _nothing_unsaved:
                time.sleep(seconds)
                if _nothing_unsaved:
                    exit_process(number)

    threading.Thread(target=watch, daemon=True).start()
