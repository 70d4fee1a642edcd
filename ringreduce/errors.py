"""The exceptions of ringreduce: one class for each thing that a program can react to differently.

What is wrong on this rank alone (a wrong type, a negative root) is a TypeError or ValueError
instead, raised before anything is sent. The C++ core raises these same classes.
"""


class RingReduceError(RuntimeError):
    """Base of all errors that involve other ranks, the launcher, or the state of the library.

    Raised itself when the job was started in a way that cannot work (an `mpirun` that does not
    belong to mpi4py's MPI) and when `init` is called again with other arguments. The message says
    what to change.
    """


class MismatchError(RingReduceError):
    """The ranks differ in what they call: collective, op, dtype, shape, root, or a setting.

    Raised on every rank of the communicator, with both sides' values. Nothing was reduced; the
    communicator stays usable. Correct the rank that the message shows to be the odd one out.
    """


class PeerFailed(RingReduceError):
    """Another rank died, raised an exception, or exited, and this collective can never complete.

    Raised on every rank that is in, or calls, a collective of a communicator with that rank. The
    contents of an in-place operand are undefined and the communicator is unusable from now on. Look
    at the named rank's own output first; catch this only to save what is needed, then exit.
    """


class CollectiveTimeout(RingReduceError, TimeoutError):
    """A collective did not complete within the communicator's timeout.

    Raised on every rank, naming who has not arrived. The communicator is unusable from now on.
    Either a rank is stuck or skipped the call (see what it does), or the ranks are legitimately
    that far apart: raise `init(timeout=...)` or RINGREDUCE_TIMEOUT, in seconds.
    """


class NotInitialized(RingReduceError):
    """A communicator was used after `shutdown()`, after its own `close()`, or in a forked child.

    Move the call before it, or call `init()` again: a new explicit `init()` is allowed. A child of
    a rank is no rank: use ringreduce in the parent only.
    """


class ResourceError(RingReduceError):
    """The operating system refused memory, a file descriptor or a thread.

    The message says what was asked for, in bytes where it is memory, and which limit to raise.
    """
