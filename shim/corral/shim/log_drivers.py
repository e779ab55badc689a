"""From what was asked for to the log of a container."""

from collections.abc import Mapping

from corral.shim import log_program, report
from corral.shim.errors import ShimError
from corral.shim.journal import JournalFraming, JournalReceiver
from corral.shim.log_options import Destination, LogOptions, ToJournal, ToSyslog
from corral.shim.logs import FileLog, Log, LogFile, NoLog
from corral.shim.loop import Loop
from corral.shim.outbox import Receiver
from corral.shim.sending import PipingLog, SendingLog
from corral.shim.spool import Spool
from corral.shim.syslog import SyslogFraming, SyslogReceiver


def open_log(
    loop: Loop, wanted: LogOptions, *, directory: int | None = None, resumed: Mapping[str, int] | None = None
) -> Log:
    """The log that a container asked for.

    directory: an fd of its bundle, for a Spool. resumed: streams() of the log of a shim that was killed, owned if there
    is no error; what is sent to has to be there only if it is None.
    Raises OSError if a file cannot be opened, ShimError if a server is not there or a program fails.
    """
    if wanted.driver == "none":
        return NoLog()
    file = LogFile(wanted.path, max_size=wanted.max_size, max_files=wanted.max_files) if wanted.path else None
    if wanted.to is None:
        assert file is not None
        return FileLog(file, wanted.driver, _spool_in(directory), attrs=wanted.attrs)
    # An heir finds by its lines how far a cache has come.
    cache = None if file is None else FileLog(file, "json-file", blocks=False)
    try:
        return _sending(loop, wanted, wanted.to, cache, directory, resumed)
    except BaseException:
        if cache is not None:
            cache.close()
        raise


def _sending(
    loop: Loop,
    wanted: LogOptions,
    to: Destination,
    cache: Log | None,
    directory: int | None,
    resumed: Mapping[str, int] | None,
) -> Log:
    limit = wanted.buffer_size

    def tell(text: str) -> None:
        if directory is not None:
            report.write(directory, text)

    match to:
        case ToSyslog():
            server = SyslogReceiver(to.address)
            _connect(server, f"the syslog server {to.address}", may_fail=resumed is not None)
            framing = SyslogFraming(to.facility, to.form, to.tag, to.hostname)
            return SendingLog(loop, server, framing, limit=limit, cache=cache, spool=_spool_in(directory), tell=tell)
        case ToJournal():
            journal = JournalReceiver(to.socket)
            _connect(journal, f"the journal at {to.socket}", may_fail=resumed is not None)
            entries = JournalFraming(to.fields)
            return SendingLog(loop, journal, entries, limit=limit, cache=cache, spool=_spool_in(directory), tell=tell)
        case _:
            program = (
                log_program.start(to.args, to.env, directory)
                if resumed is None
                else log_program.resumed(resumed, to.args[0], directory)
            )
            return PipingLog(
                loop,
                program.pipes,
                held=program.attendance,
                limit=limit,
                cache=cache,
                spool=_spool_in(directory),
                tell=tell,
            )


def _connect(receiver: Receiver, what: str, *, may_fail: bool) -> None:
    try:
        receiver.connect()
    except OSError as e:
        if not may_fail:
            message = f"{what} cannot be reached: {e.strerror}; start it, or choose another log driver"
            raise ShimError("failed_precondition", message) from e


def _spool_in(directory: int | None) -> Spool | None:
    if directory is None:
        return None
    try:
        return Spool(directory)
    except OSError:  # a full disk is no reason to have no container
        return None
