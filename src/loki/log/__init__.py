"""The attribution log on disk: the contract between analysing and selecting."""

from loki.log.merge import merge_logs
from loki.log.reader import AttributionLog
from loki.log.schema import LogHeader
from loki.log.writer import LogWriter

__all__ = ["AttributionLog", "LogHeader", "LogWriter", "merge_logs"]
