"""The errors that users see: one line each, with what was wrong, the value, and the remedy."""


class LokiError(Exception):
    """Anything a user can mend; the command line prints it in one line and exits with 2."""


class InputError(LokiError):
    """A value, option or file given by the user that cannot be used."""


class ArchitectureError(LokiError):
    """A model whose feed-forward output projections cannot be found."""


class ArtefactError(LokiError):
    """A file of ours (log, positions, adapter, run) that is damaged or belongs to something else."""


class OutputError(LokiError):
    """A place that cannot be written to."""
